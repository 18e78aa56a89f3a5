"""Softmax on whole numbers against NumPy, which rounds each operation by itself: the same bits."""

import jax
import numpy as np
import pytest

from simqat_jax.numerics import softmax

pytestmark = pytest.mark.usefixtures("optimized")
F32 = np.float32


def numpy_exponentials(below, scale, unit):
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
    unit = 2 ** min(20, int(np.log2(2**24 / terms)))
    for scale in rng.uniform(1e-4, 0.6, 30).astype(F32):
        c = -rng.integers(0, 256, (1, terms)).astype(F32)
        c[0, 0] = 0
        want = numpy_exponentials(-c, scale, unit)
        np.testing.assert_array_equal(compute(c, scale, 1), want)
        want = numpy_exponentials(np.arange(256, dtype=F32), scale, unit)
        np.testing.assert_array_equal(softmax.table(scale, unit), want)


def test_softmax_rounds_every_operation():
    rng = np.random.default_rng(0)
    compute = jax.jit(softmax.softmax, static_argnums=2)
    for scale, out_scale in rng.uniform((1e-3, 5e-4), (0.3, 4e-3), (20, 2)).astype(F32):
        c = rng.integers(-128, 128, (2000, 9)).astype(F32)
        e = numpy_exponentials(c.max(-1, keepdims=True) - c, scale, 2**20)
        want = np.rint(e * (F32(1) / out_scale / e.sum(-1, keepdims=True)))
        np.testing.assert_array_equal(compute(c, scale, -1, out_scale), want)


def numpy_logarithm(m):
    """Of numbers from 1: an atanh of what is left of them between 1 and 2."""
    part, power = np.frexp(m)
    root, m = F32(np.sqrt(2)), F32(2) * part
    t = (m - root) / (m + root)
    series = F32(2 / 7)
    for k in (5, 3, 1):
        series = series * (t * t) + F32(2 / k)
    return (power.astype(F32) - F32(0.5)) * F32(np.log(2)) + t * series


@pytest.mark.parametrize("terms", [1, 5, 300, 16384])
def test_logarithms_round_every_operation(terms):
    rng = np.random.default_rng(terms)
    compute = jax.jit(softmax.log_softmax, static_argnums=2)
    unit = 2 ** min(22, int(np.log2(2**30 / terms)))
    for scale, out_scale in rng.uniform((1e-3, 1e-3), (0.2, 0.1), (20, 2)).astype(F32):
        c = rng.integers(-128, 128, (max(1, 2000 // terms), terms)).astype(F32)
        below = c.max(-1, keepdims=True) - c
        total = numpy_exponentials(below, scale, unit).astype(int).sum(-1, keepdims=True)
        shift = numpy_logarithm(total.astype(F32) * F32(1 / unit)) / out_scale
        want = np.rint(below * -(scale / out_scale) - shift)
        np.testing.assert_array_equal(compute(c, scale, -1, out_scale), want)


def test_the_series_is_a_logarithm():
    m = np.geomspace(1, softmax.MOST_TERMS, 10000).astype(F32)
    real = np.log(m.astype(float))
    assert (np.abs(numpy_logarithm(m) - real) < 2e-7 * (1 + real)).all()
