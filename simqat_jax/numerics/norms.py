"""Norms of whole numbers, of operations that have one result in every runtime.

`rint((c - mean) / sqrt(var + epsilon) * scale + shift)`, of centered codes `c`: their scale
cancels, but in `epsilon`, which counts in squared codes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import own_rounding, rounded_product, true_divide

MOST_ELEMENTS = 2**24 // 256
"""Of so many codes of 8 bits float32 holds the sum, and int32 that of squared distances to it."""
STEPS = 13
"""Of Heron's iteration: enough from its start, for variances of up to 2^16 codes."""


class Statistics(NamedTuple):
    """How a norm takes its statistics.

    Attributes:
      axes: over which axes.
      centered: it subtracts the mean.
    """

    axes: tuple[int, ...]
    centered: bool


def reciprocal_count(count: int) -> np.float32:
    """Return `f32(1 / count)`, which sums are multiplied by to be means."""
    return np.float32(1) / np.float32(count)


def heron_start(epsilon: ArrayLike) -> jax.Array:
    """Return where Heron's iteration starts: near the root of a large `epsilon`, else at 2 or 3."""
    _, exponent = jnp.frexp(jnp.float32(epsilon))
    return jnp.ldexp(jnp.float32(1), (exponent + 1) // 2) + np.float32(2)


def heron(v: jax.Array, epsilon: jax.Array) -> jax.Array:
    """Return the square root of `v`, as a fixed number of exact operations leave it.

    Args:
      v: float32, at least `epsilon`.
      epsilon: sets the start.

    Source:
      Heron of Alexandria's iteration, `s = (s + v / s) / 2`.
    """
    root = jnp.broadcast_to(heron_start(epsilon), v.shape)
    for _ in range(STEPS):
        root = own_rounding(own_rounding(root + true_divide(v, root)) * np.float32(0.5))
    return root


Root = Callable[[jax.Array, jax.Array], jax.Array]
"""Returns the square root of its first argument, which is at least the second."""


class Guard(NamedTuple):
    """What keeps a deviation from zero: it is `max(sqrt(var + epsilon), least) + offset`.

    Attributes:
      epsilon: float32, squared codes.
      least: codes; None: nothing but the root.
      offset: codes; None: nothing is added.
    """

    epsilon: jax.Array
    least: jax.Array | None = None
    offset: jax.Array | None = None


def normalized(c: jax.Array, statistics: Statistics, guard: Guard, root: Root) -> jax.Array:
    """Normalize whole numbers; float32, mean 0 (where it is subtracted) and variance near 1.

    Args:
      c: centered codes of 8 bits, float32; no more than `MOST_ELEMENTS` a sum.
      statistics: over which axes, and whether the mean counts.
      guard: what the deviation is besides the root of the variance.
      root: the square root of a runtime.
    """
    x, v = _centered(c, statistics)
    y = deviation(v, guard, root)
    return rounded_product(x, true_divide(jnp.ones_like(y), y))


def variance(c: jax.Array, statistics: Statistics) -> jax.Array:
    """Return the variance of whole numbers, or their mean square, as `normalized` has it."""
    return _centered(c, statistics)[1]


def deviation(variance: jax.Array, guard: Guard, root: Root) -> jax.Array:
    """Return the root of a variance, guarded."""
    y = root(variance + guard.epsilon, guard.epsilon)
    y = y if guard.least is None else jnp.maximum(y, guard.least)
    return y if guard.offset is None else own_rounding(y + guard.offset)


def _centered(c: jax.Array, statistics: Statistics) -> tuple[jax.Array, jax.Array]:
    """Return whole numbers less their mean, where it is subtracted, and their variance."""
    axes = statistics.axes
    part = reciprocal_count(_count(c.shape, axes))
    rest = jnp.zeros((), jnp.float32)
    if statistics.centered:
        # A whole number near the mean leaves small whole numbers; what is left of it comes later.
        near = jnp.round(rounded_product(_sum(c, axes), part))
        c = c - near
        rest = rounded_product(_sum(c, axes), part)
    mean_square = rounded_product(_sum(c * c, axes), part)
    if not statistics.centered:
        return c, own_rounding(mean_square)
    variance = own_rounding(mean_square - rounded_product(rest, rest))
    return own_rounding(c - rest), variance


def scaled_and_shifted(x: jax.Array, scale: jax.Array | None, shift: jax.Array | None) -> jax.Array:
    """Return `rint(x * scale + shift)`, each operation rounded by itself."""
    if scale is not None:
        x = rounded_product(x, scale)
    return jnp.round(x if shift is None else own_rounding(x + shift))


def _count(shape: Sequence[int], axes: Sequence[int]) -> int:
    return int(np.prod([shape[a] for a in axes]))


def _sum(c: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Add whole numbers exactly, and round once to float32."""
    return jnp.sum(c.astype(jnp.int32), axes, keepdims=True).astype(jnp.float32)
