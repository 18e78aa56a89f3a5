"""Sums in an order of their own, against NumPy's additions in the same order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simqat_jax.numerics.ordered_sums import ordered_sum


def folded(x, axis):
    """Add the second half to the first one, again and again."""
    while x.shape[axis] > 1:
        half = -(-x.shape[axis] // 2)
        first, second = np.split(x, [half], axis)
        rest = np.take(first, range(second.shape[axis], half), axis)
        common = np.take(first, range(second.shape[axis]), axis)
        x = np.concatenate([common + second, rest], axis)
    return x


@pytest.mark.parametrize("axes", [(0,), (1,), (2, 0), (0, 1, 2)])
@pytest.mark.parametrize("shape", [(1, 4, 7), (64, 3, 5), (33, 2, 0)])
def test_the_order_is_one_whatever_reads_and_makes_the_terms(shape, axes):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    want = 3 * np.abs(x)
    for axis in axes:
        want = folded(want, axis) if want.shape[axis] else want.sum(axis, keepdims=True)
    want = want.squeeze(axes)
    np.testing.assert_array_equal(ordered_sum(jnp.asarray(3 * np.abs(x)), axes), want)
    fused = jax.jit(lambda x: jnp.maximum(ordered_sum(3 * jnp.abs(x), axes), -1))
    np.testing.assert_array_equal(fused(x), want)


def test_short_types_are_summed_in_float32():
    x = jnp.full((1000,), 1.0, jnp.bfloat16)
    assert ordered_sum(x, (0,)).dtype == jnp.bfloat16
    assert ordered_sum(x, (0,)) == jnp.asarray(1000, jnp.bfloat16)
    assert jnp.isnan(ordered_sum(x.at[3].set(jnp.nan), (0,)))
