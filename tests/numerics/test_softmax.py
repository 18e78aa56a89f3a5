"""Softmax on whole numbers against NumPy, which rounds each operation by itself: the same bits."""

import jax
import numpy as np
import pytest

from simqat_jax.numerics import softmax

pytestmark = pytest.mark.usefixtures("optimized")
F32 = np.float32


def numpy_exponentials(below, scale, terms):
    unit = 2 ** min(20, int(np.log2(2**24 / terms)))
    a0 = F32(unit ** (1 / 32))
    a2, a3 = F32(unit ** (1 / 32) / 2), F32(unit ** (1 / 32) / 6)
    x = np.minimum(below * F32(scale / F32(32)), F32(0.5))
    p = a0 - x * (a0 - x * (a2 - x * a3))
    for _ in range(5):
        p = p * p
    return np.rint(p)


@pytest.mark.parametrize("terms", [2, 17, 300, 16384])
def test_exponentials_round_every_operation(terms):
    """By jit as in evaluation, and in the table of a file."""
    rng = np.random.default_rng(terms)
    compute = jax.jit(softmax.exponentials, static_argnums=2)
    for scale in rng.uniform(1e-4, 0.6, 30).astype(F32):
        c = -rng.integers(0, 256, (1, terms)).astype(F32)
        c[0, 0] = 0
        want = numpy_exponentials(-c, scale, terms)
        np.testing.assert_array_equal(compute(c, scale, 1), want)
        want = numpy_exponentials(np.arange(256, dtype=F32), scale, terms)
        np.testing.assert_array_equal(softmax.table(scale, softmax.unit(terms)), want)


def test_softmax_rounds_every_operation():
    rng = np.random.default_rng(0)
    compute = jax.jit(softmax.softmax, static_argnums=2)
    for scale, out_scale in rng.uniform((1e-3, 5e-4), (0.3, 4e-3), (20, 2)).astype(F32):
        c = rng.integers(-128, 128, (2000, 9)).astype(F32)
        e = numpy_exponentials(c.max(-1, keepdims=True) - c, scale, 9)
        want = np.rint(e * (F32(1) / out_scale / e.sum(-1, keepdims=True)))
        np.testing.assert_array_equal(compute(c, scale, -1, out_scale), want)
