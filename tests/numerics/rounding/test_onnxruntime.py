"""Sums as ONNX Runtime computes them, against exact rational arithmetic."""

from fractions import Fraction

import jax
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME

pytestmark = pytest.mark.usefixtures("optimized")


def rounded(value: Fraction) -> Fraction:
    """Round to float32 once: through a float64 rounded to odd."""
    near = float(value)
    if Fraction(near) == value:
        return Fraction(float(np.float32(near)))
    away = np.nextafter(near, np.inf if value > Fraction(near) else -np.inf)
    odd = near if int(np.float64(near).view(np.int64)) & 1 else float(away)
    return Fraction(float(np.float32(odd)))


def exact(value: float) -> Fraction:
    return Fraction(float(np.float32(value)))


def test_each_product_of_a_sum_is_rounded_once():
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.05, 3).astype(np.float32)
    a, b, c = (
        sq.Grid(float(scale), zero, 0, 255)
        for scale, zero in zip(scales, (7, 130, 60), strict=True)
    )
    qa, qb = rng.integers(0, 256, (2, 400)).astype(np.int32)
    add = ONNXRUNTIME.add
    constants = add.constants((a, b, c))

    ra, rb = (scale / scales[2] for scale in scales[:2])
    product = exact(rounded(exact(rb) * b.zero_point))
    z = rounded(c.zero_point - rounded(exact(ra) * a.zero_point + product))
    assert [float(value) for value in constants] == [float(ra), float(rb), float(z)]

    def run(x, y):
        return add.apply(x, y, constants, (a, b, c))

    centered = qa - a.zero_point, qb - b.zero_point
    got = jax.jit(run)(*centered)
    np.testing.assert_array_equal(got, run(*centered))
    for x, y, code in zip(qa, qb, np.asarray(got) + c.zero_point, strict=True):
        inner = rounded(int(y) * exact(rb) + z)
        assert float(code) == np.rint(float(rounded(int(x) * exact(ra) + inner)))
