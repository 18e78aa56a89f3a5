"""Norms on whole numbers against NumPy, which rounds each operation by itself: the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simqat_jax.numerics.norms import (
    MOST_ELEMENTS,
    Guard,
    Statistics,
    heron,
    normalized,
    scaled_and_shifted,
)

pytestmark = pytest.mark.usefixtures("optimized")
F32 = np.float32
LEAST, LARGEST = (1 - 1 / MOST_ELEMENTS) / MOST_ELEMENTS, 127.5**2
"""Variances of codes of which one differs by 1, and of codes at both ends."""


@pytest.mark.parametrize("epsilon", [2.0**-40, 1e-6, 1e-3, 1.0, 1e3, 1e7, 1e30])
def test_herons_iteration_arrives(epsilon):
    """Within one and a half times the rounding of a square root."""
    variances = np.geomspace(LEAST, LARGEST, 20_000).astype(np.float32) + np.float32(epsilon)
    got = np.asarray(heron(jnp.asarray(variances), jnp.float32(epsilon)))
    np.testing.assert_allclose(got, np.sqrt(variances.astype(np.float64)), rtol=1.6 * 2.0**-24)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("length", [7, 64, 1000])
def test_norms_round_every_operation(centered, length):
    rng = np.random.default_rng(length)
    c = (rng.integers(-128, 128, (300, length)) // rng.integers(1, 60, (300, 1))).astype(F32)
    scale, shift = rng.normal(20, 30, (2, 1, length)).astype(F32)
    epsilon, part = F32(0.37), F32(1) / F32(length)

    def total(x):
        return x.sum(-1, dtype=np.int64, keepdims=True).astype(F32)

    @jax.jit
    def computed(c, scale, shift):
        y = normalized(c, Statistics((1,), centered), Guard(epsilon), heron)
        return y, scaled_and_shifted(y, scale, shift)

    x, rest = c, F32(0)
    if centered:
        x = c - np.rint(total(c) * part)
        rest = total(x) * part
    variance = total(x * x) * part - rest * rest + epsilon
    deviation = np.full_like(variance, 3)
    for _ in range(13):
        deviation = (deviation + variance / deviation) * F32(0.5)
    want = (x - rest) * (F32(1) / deviation)
    y, codes = computed(c, scale, shift)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(codes, np.rint(want * scale + shift))
