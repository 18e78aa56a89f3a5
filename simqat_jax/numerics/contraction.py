"""Products of whole numbers in parts: what adds up to a convolution or a matrix product."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.numerics.convolution import convolve


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
