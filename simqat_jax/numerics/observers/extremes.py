"""Observers of each batch's extremes: what `ema`, `minmax` and `batch` have in common."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.numerics.observers.observer import AxisName, Observer, Range, restored
from simqat_jax.numerics.requantize import FREE, Bounds


class RangeState(NamedTuple):
    """What one observer remembers.

    Invariant: `lo > hi` (empty) until the first finite batch, finite with `lo <= hi` after it.
    """

    lo: jax.Array
    """Lowest value, real units, float32, shape () or (C,)."""
    hi: jax.Array
    """Highest value, same shape."""
    nonfinite: jax.Array
    """Number of batches that held NaN or Inf and were left out, int32, shape ()."""


def init_range(num_channels: int | None = None, *, nonnegative: bool = False) -> RangeState:
    """Return the empty range, see `checked.init_range`."""
    shape = () if num_channels is None else (num_channels,)
    return RangeState(
        lo=jnp.full(shape, 0.0 if nonnegative else jnp.inf, jnp.float32),
        hi=jnp.full(shape, -jnp.inf, jnp.float32),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def observed(state: RangeState) -> jax.Array:
    """Tell whether the range has seen a finite batch, see `checked.observed`."""
    return jnp.all(state.lo <= state.hi)


def extremes(x: jax.Array, channel_axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and highest value of `x` over all axes but `channel_axis`, float32.

    Both are NaN where NaN is among the values.
    """
    kept = None if channel_axis is None else channel_axis % x.ndim
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    lo, hi = (end(x, axis=axes).astype(jnp.float32) for end in (jnp.min, jnp.max))
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return lo, hi
    nan = has_nan(x, axes, jnp.maximum(-lo, hi))
    return jnp.where(nan, jnp.nan, lo), jnp.where(nan, jnp.nan, hi)


def has_nan(x: jax.Array, axes: tuple[int, ...], magnitude: jax.Array) -> jax.Array:
    """Tell where NaN is among the values of `x` over some axes.

    XLA drops NaN in large minima and maxima on CPU, and between devices, but in no sum; that of
    numbers is none unless it may overflow.

    Args:
      x: the values.
      axes: to look along.
      magnitude: the largest of each, NaN or not where NaN is among them.
    """
    most = np.finfo(np.float32).max / max(1, x.size // max(1, magnitude.size))
    return jnp.isnan(jnp.sum(x, axis=axes, dtype=jnp.float32)) & ~(magnitude > most)


def extremes_of_devices(
    lo: jax.Array, hi: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
    """Return the extremes over a mapped axis; NaN where one device has NaN.

    Between devices minimum and maximum drop NaN.
    """
    nan = lax.pmax((jnp.isnan(lo) | jnp.isnan(hi)).astype(jnp.float32), axis_name) > 0
    ends = lax.pmin(lo, axis_name), lax.pmax(hi, axis_name)
    lo, hi = (jnp.where(nan, jnp.nan, end) for end in ends)
    return lo, hi


class Extremes(NamedTuple):
    """Lowest and highest value of a batch, float32, shape () or (C,)."""

    lo: jax.Array
    hi: jax.Array


class OfExtremes(Observer[RangeState, Extremes]):
    """A range that follows each batch's extremes: one class differs from another in `follow`."""

    def init(self) -> RangeState:
        return init_range(self.num_channels, nonnegative=self.nonnegative)

    def restore(self, state: object) -> RangeState:
        return restored(RangeState, state)

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Extremes:
        # Taken from before the clamp, the extremes need no pass of their own over the clamped
        # values, which a compiled step never stores.
        ends = extremes(lax.stop_gradient(x), self.channel_axis)
        if bounds != FREE:
            ends = tuple(jnp.clip(end, *bounds) for end in ends)
        return Extremes(jnp.zeros_like(ends[1]) if self.nonnegative else ends[0], ends[1])

    def merge(self, one: Extremes, other: Extremes) -> Extremes:
        return Extremes(jnp.minimum(one.lo, other.lo), jnp.maximum(one.hi, other.hi))

    def reduce(self, measured: Extremes, axis_name: AxisName) -> Extremes:
        return Extremes(*extremes_of_devices(*measured, axis_name))

    def update(self, state: RangeState, measured: Extremes) -> RangeState:
        lo, hi = measured
        finite = jnp.isfinite(lo) & jnp.isfinite(hi)
        finite = finite if finite.ndim == 0 else jnp.all(finite)
        new_lo = state.lo if self.nonnegative else self.follow(state.lo, lo, lax.min)
        return RangeState(
            lo=jnp.where(finite, new_lo, state.lo),
            hi=jnp.where(finite, self.follow(state.hi, hi, lax.max), state.hi),
            nonfinite=state.nonfinite + 1 - finite.astype(jnp.int32),
        )

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        """Return one end of the range after a batch.

        Looks at this end alone, so that a compiled step can update it in place.
        """
        raise NotImplementedError

    def range(self, state: RangeState) -> Range:
        return state.lo, state.hi

    def present_range(self, x: jax.Array) -> Range:
        return self.measure(x)
