"""Softmax of whole numbers, of operations that have one result in every runtime.

`e = rint(unit * exp(-s (max - c)))`, a polynomial and squarings; `rint(e / sum(e) / s_y)`. `e` are
whole numbers, whose sums are exact.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import own_rounding, rounded_product, true_divide

SQUARINGS = 5
FARTHEST = 16.0
"""So far below the highest number, `e` is zero."""
_FINEST = 2**20
_EXACT = 2**24
MOST_TERMS = _EXACT // 1024
LEAST_SCALE = FARTHEST * 2.0**-22
"""Of codes under a mask: `lowest` is a whole number that float32 holds."""


class Polynomial(NamedTuple):
    """`a0 - x (a0 - x (a0 / 2 - x a0 / 6))`, where `a0^(2^SQUARINGS)` is the largest `e`."""

    a0: np.float32
    a2: np.float32
    a3: np.float32


def unit(terms: int) -> int:
    """Return the largest `e`: as large as float32 holds sums of so many terms."""
    return min(_FINEST, 2 ** int(math.log2(_EXACT / terms)))


def polynomial(terms: int) -> Polynomial:
    """Return the polynomial for sums of so many terms."""
    a0 = unit(terms) ** (0.5**SQUARINGS)
    return Polynomial(np.float32(a0), np.float32(a0 / 2), np.float32(a0 / 6))


def lowest(scale: ArrayLike) -> jax.Array:
    """Return the whole number that a masked one becomes: far enough below every code of 8 bits."""
    return -jnp.ceil(true_divide(jnp.float32(FARTHEST), scale)) - 256.0


def exponentials(c: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """Return `e` of centered codes.

    Args:
      c: whole numbers, float32.
      scale: real units of one.
      axis: along which the highest is `unit`.
    """
    return _exponentials(jnp.max(c, axis, keepdims=True) - c, scale, c.shape[axis])


def _exponentials(below: jax.Array, scale: ArrayLike, terms: int) -> jax.Array:
    a0, a2, a3 = polynomial(terms)
    step = scale * np.float32(0.5**SQUARINGS)  # exact: a power of two
    x = jnp.minimum(rounded_product(below, step), np.float32(FARTHEST * 0.5**SQUARINGS))
    h = own_rounding(a2 - rounded_product(x, a3))
    h = own_rounding(a0 - rounded_product(x, h))
    p = own_rounding(a0 - rounded_product(x, h))
    for _ in range(SQUARINGS):
        p = rounded_product(p, p)
    return jnp.round(p)


def table(scale: ArrayLike, terms: int) -> np.ndarray:
    """Return `e` of numbers 0 to 255 below the highest of `terms`, float32."""
    return np.asarray(_exponentials(jnp.arange(256.0, dtype=jnp.float32), scale, terms))


def softmax(c: jax.Array, scale: jax.Array, axis: int, out_scale: jax.Array) -> jax.Array:
    """Return the codes of a softmax of centered codes, centered and not clipped."""
    e = exponentials(c, scale, axis)
    total = jnp.sum(e, axis, keepdims=True)
    part = true_divide(jnp.ones((), jnp.float32), out_scale)
    return jnp.round(rounded_product(e, true_divide(jnp.broadcast_to(part, total.shape), total)))
