"""Sums of real values in an order of their own.

In which order a compiler adds depends on what it compiles the sum with, and so do the last digits.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.numerics.affine import own_rounding


def ordered_sum(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sum along axes: add the second half of an axis to its first one until one element is left.

    Each addition rounds by itself, as do the terms, so that the result is one, whatever is compiled
    around it.

    Args:
      x: real values; those of less than 32 bits are summed in float32.
      axes: none of them negative.
    """
    shape = tuple(d for axis, d in enumerate(x.shape) if axis not in axes)
    if any(x.shape[axis] == 0 for axis in axes):
        return jnp.sum(x, axes)
    total = own_rounding(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
    for axis in axes:
        while total.shape[axis] > 1:
            total = _halved(total, axis)
    return total.reshape(shape).astype(x.dtype)


def _halved(x: jax.Array, axis: int) -> jax.Array:
    length = x.shape[axis]
    short, half = length // 2, -(-length // 2)

    def part(start: int, limit: int) -> jax.Array:
        return lax.slice_in_dim(x, start, limit, axis=axis)

    added = own_rounding(part(0, short) + part(half, length))
    return added if short == half else lax.concatenate([added, part(short, half)], axis)
