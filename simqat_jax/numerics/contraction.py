"""Convolutions and matrix products of whole numbers: in parts that add up, or of bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.numerics.convolution import convolve, padded

Sums = Callable[[str, Mapping[str, Any], jax.Array, jax.Array, Any], list[jax.Array]]
"""`partial_sums` or `byte_sums`."""


def summed_axes(
    primitive: str, params: Mapping[str, Any], shape: Sequence[int]
) -> tuple[int, int] | None:
    """Return of both operands the longest axis that is summed over; None where there is none.

    Args:
      primitive: `dot_general` or `conv_general_dilated`.
      params: of the primitive.
      shape: of the second operand.
    """
    if primitive == "conv_general_dilated":
        numbers = params["dimension_numbers"]
        axes = numbers.lhs_spec[1], numbers.rhs_spec[1]
        return axes if params["feature_group_count"] == 1 else None
    (left, right), _ = params["dimension_numbers"]
    pairs = zip(left, right, strict=True)
    return max(pairs, key=lambda axes: shape[axes[1]], default=None)


def partial_sums(
    primitive: str, params: Mapping[str, Any], x: jax.Array, y: jax.Array, parts: int
) -> list[jax.Array]:
    """Multiply whole numbers, float32; exact up to 2^24.

    Args:
      primitive: `dot_general` or `conv_general_dilated`.
      params: of the primitive.
      x: the first operand.
      y: the second one.
      parts: over how many parts of `summed_axes` to sum apart from each other.

    Returns:
      What adds up to the product.
    """
    pairs = [(x, y)]
    if parts > 1:
        axes = summed_axes(primitive, params, y.shape)
        assert axes is not None, "more parts than one have an axis"
        pieces = (jnp.array_split(v, parts, axis) for v, axis in zip((x, y), axes, strict=True))
        pairs = list(zip(*pieces, strict=True))
    if primitive == "conv_general_dilated":
        return [convolve(x, y, np.float32, **params) for x, y in pairs]
    dims, highest = params["dimension_numbers"], lax.Precision.HIGHEST
    return [lax.dot_general(x, y, dims, precision=highest) for x, y in pairs]


def byte_sums(
    primitive: str, params: Mapping[str, Any], x: jax.Array, y: jax.Array, shift: jax.Array
) -> list[jax.Array]:
    """Multiply whole numbers that 8 bits hold, which processors do faster than in float32.

    Args:
      primitive: `dot_general` or `conv_general_dilated`.
      params: of the primitive.
      x: the first operand, float32; `x + shift` are int8.
      y: the second one, float32; they are int8.
      shift: a whole number, float32, scalar.

    Returns:
      The product modulo 2^32, int32; nothing for matrix products side by side.
    """
    x, y, zero = (v.astype(jnp.int8) for v in (x + shift, y, shift))
    if primitive == "dot_general":
        sums_of, (batch, _) = params["dimension_numbers"]
        if batch:
            return []
        sums = integer_dot(x, y, sums_of)
        summed, axes = sums_of[1], range(sums.ndim - y.ndim + len(sums_of[1]), sums.ndim)
    else:
        numbers, rank = params["dimension_numbers"], x.ndim - 2
        x = padded(x, zero, numbers.lhs_spec[2:], params["padding"], params["lhs_dilation"])
        still = {"padding": ((0, 0),) * rank, "lhs_dilation": (1,) * rank}
        sums = convolve(x, y, jnp.int32, **{**params, **still})
        summed, axes = numbers.rhs_spec[1:], (numbers.out_spec[1],)
    ones = jnp.ones([y.shape[axis] for axis in summed], jnp.int8)
    total = integer_dot(ones, y, (range(ones.ndim), summed))
    shape = [n if axis in axes else 1 for axis, n in enumerate(sums.shape)]
    return [sums - shift.astype(jnp.int32) * total.reshape(shape)]


def integer_dot(x: jax.Array, y: jax.Array, axes: Sequence[Sequence[int]]) -> jax.Array:
    """Return `jnp.tensordot` of whole numbers, int32.

    One row of int8 is multiplied twice: XLA on CPU has kernels for two rows and more alone.
    """
    left, right = map(tuple, axes)
    product = partial(lax.dot_general, preferred_element_type=jnp.int32)
    if x.dtype != jnp.int8 or x.size > math.prod(x.shape[axis] for axis in left):
        return product(x, y, ((left, right), ((), ())))
    left = tuple(axis + 1 for axis in left)
    return product(jnp.stack([x, x]), y, ((left, right), ((), ())))[0]
