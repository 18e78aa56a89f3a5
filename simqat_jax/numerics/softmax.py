"""Softmax of whole numbers and its logarithm, of operations with one result in every runtime.

`e = rint(unit * exp(-s (max - c)))`, a polynomial and squarings; `rint(e / sum(e) / s_y)`, or
`rint((s (c - max) - log(sum(e) / unit)) / s_y)`. `e` are whole numbers, whose sums are exact.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import own_rounding, rounded_product, true_divide
from simqat_jax.numerics.grid import Grid

SQUARINGS = 5
FARTHEST = 16.0
"""So far below the highest number, `e` is zero."""
_FINEST = 2**20
_EXACT = 2**24
MOST_TERMS = _EXACT // 1024
Axes = int | tuple[int, ...]


HALVINGS = (8, 4, 2, 1)
"""By which powers of two a sum of up to `MOST_TERMS` units is divided, to lie near 1."""


class Polynomial(NamedTuple):
    """`a0 - x (a0 - x (a0 / 2 - x a0 / 6))`, where `a0^(2^SQUARINGS)` is the largest `e`."""

    a0: np.float32
    a2: np.float32
    a3: np.float32


def unit(count: int) -> int:
    """Return the largest `e`: as large as float32 holds sums of so many terms."""
    return min(_FINEST, 2 ** int(math.log2(_EXACT / count)))


def fine_unit(count: int) -> int:
    """Return the largest `e` of a logarithm: as large as int32 holds sums of so many terms."""
    return min(2**22, 2 ** int(math.log2(2**30 / count)))


def polynomial(largest: int) -> Polynomial:
    """Return the polynomial with which this is the largest `e`."""
    a0 = largest ** (0.5**SQUARINGS)
    return Polynomial(np.float32(a0), np.float32(a0 / 2), np.float32(a0 / 6))


def lowest(scale: ArrayLike, reach: ArrayLike = FARTHEST) -> jax.Array:
    """Return the whole number that a masked one becomes: so far below every code of 8 bits.

    Args:
      scale: of the codes, real units.
      reach: how far, real units; of a logarithm `reach_of_logarithm`.
    """
    return -jnp.ceil(true_divide(jnp.asarray(reach, jnp.float32), scale)) - 256.0


def reach_of_logarithm(y: Grid) -> jax.Array:
    """Return how far below the highest number a logarithm has the lowest code of a grid."""
    codes = np.float32(y.qmax - y.qmin + 1)
    return jnp.maximum(rounded_product(jnp.asarray(y.scale, jnp.float32), codes), FARTHEST)


def holds_lowest(scale: ArrayLike, reach: ArrayLike = FARTHEST) -> jax.Array:
    """Whether `lowest` is a whole number that float32 holds."""
    return jnp.asarray(scale) >= jnp.asarray(reach, jnp.float32) * np.float32(2.0**-22)


def terms(shape: Sequence[int], axes: Axes) -> int:
    """Return how many numbers are added up."""
    return math.prod(shape[a] for a in ((axes,) if isinstance(axes, int) else axes))


def exponentials(c: jax.Array, scale: jax.Array, axes: Axes) -> jax.Array:
    """Return `e` of centered codes.

    Args:
      c: whole numbers, float32.
      scale: real units of one.
      axes: along which the highest is `unit`.
    """
    return _exponentials(jnp.max(c, axes, keepdims=True) - c, scale, unit(terms(c.shape, axes)))


def _exponentials(below: jax.Array, scale: ArrayLike, largest: int) -> jax.Array:
    a0, a2, a3 = polynomial(largest)
    step = scale * np.float32(0.5**SQUARINGS)  # exact: a power of two
    x = jnp.minimum(rounded_product(below, step), np.float32(FARTHEST * 0.5**SQUARINGS))
    h = own_rounding(a2 - rounded_product(x, a3))
    h = own_rounding(a0 - rounded_product(x, h))
    p = own_rounding(a0 - rounded_product(x, h))
    for _ in range(SQUARINGS):
        p = rounded_product(p, p)
    return jnp.round(p)


def table(scale: ArrayLike, largest: int) -> np.ndarray:
    """Return `e` of numbers 0 to 255 below the highest, whose `e` is `largest`; float32."""
    return np.asarray(_exponentials(jnp.arange(256.0, dtype=jnp.float32), scale, largest))


def softmax(c: jax.Array, scale: jax.Array, axes: Axes, out_scale: jax.Array) -> jax.Array:
    """Return the codes of a softmax of centered codes, centered and not clipped."""
    e = exponentials(c, scale, axes)
    total = jnp.sum(e, axes, keepdims=True)
    part = true_divide(jnp.ones((), jnp.float32), out_scale)
    return jnp.round(rounded_product(e, true_divide(jnp.broadcast_to(part, total.shape), total)))


class Logarithm(NamedTuple):
    """`log(m) = (p + 1/2) log(2) + t (c1 + t^2 (c3 + t^2 (c5 + t^2 c7)))` of a number near 1.

    `t = (m - root) / (m + root)`, with the root of 2: below 0.172 for `m` from 1 to 2, where the
    terms beyond are below `3e-8`. `p`: how often `m` was halved.
    """

    root: np.float32
    log2: np.float32
    coefficients: tuple[np.float32, ...]


LOGARITHM = Logarithm(
    np.float32(math.sqrt(2)),
    np.float32(math.log(2)),
    tuple(np.float32(2 / k) for k in (7, 5, 3, 1)),
)


def log_softmax(c: jax.Array, scale: jax.Array, axes: Axes, out_scale: jax.Array) -> jax.Array:
    """Return the codes of the logarithm of a softmax of centered codes, centered, not clipped."""
    largest = fine_unit(terms(c.shape, axes))
    below = jnp.max(c, axes, keepdims=True) - c
    e = _exponentials(below, scale, largest).astype(jnp.int32)
    total = jnp.sum(e, axes, keepdims=True).astype(jnp.float32)
    shift = true_divide(_logarithm(total * np.float32(1 / largest)), out_scale)
    scores = rounded_product(below, -true_divide(scale, out_scale))
    return jnp.round(own_rounding(scores - shift))


def _logarithm(m: jax.Array) -> jax.Array:
    """Return the logarithm of numbers from 1 to `MOST_TERMS`."""
    halved = jnp.full_like(m, 0.5)
    for k in HALVINGS:
        part = np.float32(0.5**k)
        much = jnp.minimum(jnp.floor(m * part), np.float32(1))  # 0 or 1
        m = m * (np.float32(1) - much * (np.float32(1) - part))  # exact: a power of two
        halved = halved + much * np.float32(k)
    root, log2, (first, *others) = LOGARITHM
    t = true_divide(own_rounding(m - root), own_rounding(m + root))
    square = rounded_product(t, t)
    series = jnp.full_like(t, first)
    for coefficient in others:
        series = own_rounding(rounded_product(series, square) + coefficient)
    return own_rounding(rounded_product(halved, log2) + rounded_product(t, series))
