"""Sums as ONNX Runtime computes them, against exact rational arithmetic."""

from fractions import Fraction

import jax
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME, _fused_multiply_add

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
    scales, (za, zb, zc) = rng.uniform(0.01, 0.05, 3).astype(np.float32), (7, 130, 60)
    grids = tuple(sq.Grid(float(s), z, 0, 255) for s, z in zip(scales, (za, zb, zc), strict=True))
    qa, qb = rng.integers(0, 256, (2, 400)).astype(np.int32)
    add = ONNXRUNTIME.add
    constants = add.constants(grids)

    ra, rb = (scale / scales[2] for scale in scales[:2])
    product = rounded(exact(rb) * zb)
    z = rounded(zc - rounded(exact(ra) * za + product))
    assert [float(value) for value in constants] == [float(ra), float(rb), float(z)]

    def run(x, y):
        return add.apply(x, y, constants, grids)

    got = jax.jit(run)(qa - za, qb - zb)
    np.testing.assert_array_equal(got, run(qa - za, qb - zb))
    for x, y, code in zip(qa, qb, np.asarray(got) + zc, strict=True):
        inner = rounded(int(y) * exact(rb) + z)
        assert float(code) == np.rint(float(rounded(int(x) * exact(ra) + inner)))


def test_differences_are_of_real_values():
    """Each product, their difference and the quotient are rounded by themselves."""
    rng = np.random.default_rng(1)
    a, b, y = (sq.Grid(float(s), 3, 0, 255) for s in np.asarray([0.047, 0.013, 0.02], np.float32))
    p, q = rng.integers(-255, 256, (2, 5000)).astype(np.int32)
    subtract = ONNXRUNTIME.subtract
    assert tuple(subtract.constants((a, b, y))) == ()
    x, z = (v.astype(np.float32) * np.float32(g.scale) for v, g in ((p, a), (q, b)))
    want = np.rint((x - z) / np.float32(y.scale))
    got = jax.jit(lambda p, q: subtract.apply(p, q, (), (a, b, y)))(p, q)
    np.testing.assert_array_equal(got, want)


def test_products_tie_with_the_zero_point():
    """The zero point is added before rounding, so that an odd one turns ties round."""
    products = np.arange(-99, 100, dtype=np.int32)
    for zero in (0, 76, 77):
        got = ONNXRUNTIME.multiply.apply(products, np.float32(0.5), sq.Grid(0.1, zero, 0, 255))
        np.testing.assert_array_equal(got, np.rint(products / 2 + zero) - zero)


def test_a_product_that_ties_is_rounded_by_what_is_added():
    """However little: twice rounded, it would go to the even number."""
    rng = np.random.default_rng(2)
    x, y = rng.integers(2**11, 2**12, 400) * 2 + 1, rng.integers(2**11, 2**12, 400) * 2 + 1
    signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])[rng.integers(0, 4, 400)]
    factors = 2.0 ** rng.choice([0, -30], 400)
    x, y = (x * signs[:, 0]).astype(np.float32), (y * factors).astype(np.float32)
    for least in (2.0**-60, 2.0**-120, 0.0):
        addend = (signs[:, 1] * least).astype(np.float32)
        got = np.asarray(jax.jit(_fused_multiply_add)(x, y, addend))
        numbers = zip(x, y, addend, strict=True)
        want = [float(rounded(exact(a) * exact(b) + exact(c))) for a, b, c in numbers]
        np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_roots_are_rounded_once():
    v = np.random.default_rng(3).uniform(1e-6, 2e4, 5000).astype(np.float32)
    np.testing.assert_array_equal(ONNXRUNTIME.norm.root(v, 1e-6), np.sqrt(v))
