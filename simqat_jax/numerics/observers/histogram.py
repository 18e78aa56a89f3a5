"""Observers of the distribution of values: what `percentile`, `mse` and `entropy` share."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.numerics.observers.extremes import (
    Extremes,
    OfExtremes,
    extremes,
    extremes_of_devices,
    init_range,
)
from simqat_jax.numerics.observers.observer import AxisName, Observer, Range, Role, restored
from simqat_jax.numerics.requantize import FREE, Bounds

BINS = 4096
"""Bins of a histogram: half of them on each side of zero."""
HALF = BINS // 2
_NARROWEST, _WIDEST = -110, 117
"""Exponents of bin widths: with the widest, the bins hold every float32."""


class Histogram(NamedTuple):
    """How often values lie where: bins of one width, a power of two, around zero.

    The width follows from the extremes: the smallest with which the bins hold them. Where they move
    apart, bins are merged in pairs, which loses nothing but their resolution. One histogram here;
    with one for each channel, every array has an axis more in front.
    """

    low: jax.Array
    """Lowest value so far, real units, float32; above `high`: none yet."""
    high: jax.Array
    """Highest value so far."""
    counts: jax.Array
    """Values in each bin, float32, shape (BINS,)."""
    offsets: jax.Array
    """Sum of what values lie above the middle of their bin, in widths of a bin, same shape."""


class HistogramState(NamedTuple):
    """A range, and the histogram of all batches that it was taken from."""

    lo: jax.Array
    """Lowest value of the range, real units, float32, shape () or (C,)."""
    hi: jax.Array
    """Highest value, same shape."""
    low: jax.Array
    """Lowest value of all batches, same shape."""
    high: jax.Array
    """Highest value of all batches, same shape."""
    counts: jax.Array
    """As in `Histogram`, shape (BINS,) or (C, BINS)."""
    offsets: jax.Array
    """As in `Histogram`, same shape."""
    nonfinite: jax.Array
    """Number of batches that held NaN or Inf and were left out, int32, shape ()."""


EDGES = np.arange(-HALF, HALF + 1, dtype=np.float32)
"""The edges of bins, in widths of a bin."""


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return `2^exponent`, exactly; exponents -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def exponent_of(low: jax.Array, high: jax.Array) -> jax.Array:
    """Return the exponent of the width of bins which hold all from `low` to `high`."""
    magnitude = jnp.where(low <= high, jnp.maximum(jnp.abs(low), jnp.abs(high)), 0)
    above = (lax.bitcast_convert_type(magnitude, jnp.int32) >> 23) - 126  # magnitude < 2^above
    return jnp.clip(above - (HALF.bit_length() - 1), _NARROWEST, _WIDEST)


def width(histogram: Histogram) -> jax.Array:
    """Return the width of a bin, real units: a power of two."""
    return power_of_two(exponent_of(histogram.low, histogram.high))


def means(histogram: Histogram) -> jax.Array:
    """Return the mean of the values in each bin, in widths of a bin; where there is none, a 0."""
    counts = histogram.counts
    return jnp.where(counts > 0, EDGES[:-1] + 0.5 + histogram.offsets / jnp.maximum(counts, 1), 0)


def _added(where: jax.Array, counts: jax.Array, offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Add up what falls into each bin; `where`: which, counted from zero's."""
    sums = jnp.zeros((BINS, 2), jnp.float32)
    sums = sums.at[where + HALF].add(jnp.stack([counts, offsets], -1), mode="drop")
    return sums[:, 0], sums[:, 1]


def histogram_of(x: jax.Array) -> Histogram:
    """Return the histogram of float32 values, shape (N,); of any that are not finite, garbage."""
    low, high = extremes(x)
    positions = x * power_of_two(-exponent_of(low, high))
    where = jnp.clip(jnp.floor(positions), -HALF, HALF - 1)
    offsets = positions - where - 0.5
    return Histogram(low, high, *_added(where.astype(jnp.int32), jnp.ones_like(x), offsets))


def widened(histogram: Histogram, low: jax.Array, high: jax.Array) -> Histogram:
    """Return the histogram with bins that hold all from `low` to `high`, too."""
    shift = exponent_of(low, high) - exponent_of(histogram.low, histogram.high)
    bins = jnp.arange(-HALF, HALF)
    merged = bins >> jnp.minimum(shift, HALF.bit_length())
    smaller = power_of_two(-jnp.minimum(shift, 126))
    moved = (bins + 0.5) * smaller - (merged + 0.5)  # the middle of a bin, in the one it enters
    offsets = histogram.offsets * smaller + histogram.counts * moved
    return Histogram(low, high, *_added(merged, histogram.counts, offsets))


def together(one: Histogram, other: Histogram) -> Histogram:
    """Return the histogram of all values of two."""
    low, high = jnp.minimum(one.low, other.low), jnp.maximum(one.high, other.high)
    one, other = widened(one, low, high), widened(other, low, high)
    return Histogram(low, high, one.counts + other.counts, one.offsets + other.offsets)


class OfHistogram(Observer[HistogramState, Histogram]):
    """A range taken from the histogram of all batches so far.

    The state holds the range, too: evaluation and the integer model read the same one, and search
    for none in sums that compilers order differently.
    """

    of_weights: ClassVar[type[Observer]]
    """What a weight has under this name: its present values tell all."""

    @classmethod
    def of_role(cls, role: Role) -> type[Observer]:
        return cls.of_weights if role == "weight" else cls

    def best_range(self, histogram: Histogram) -> tuple[jax.Array, jax.Array]:
        """Return the range of one histogram, which holds values."""
        raise NotImplementedError

    def each(self, function: Callable) -> Callable:
        """Return what does with every channel what `function` does with one histogram."""
        return function if self.num_channels is None else jax.vmap(function)

    def init(self) -> HistogramState:
        lo, hi, nonfinite = init_range(self.num_channels, nonnegative=self.nonnegative)
        none = jnp.zeros((*hi.shape, BINS), jnp.float32)
        return HistogramState(lo, hi, jnp.full_like(hi, jnp.inf), hi, none, none, nonfinite)

    def restore(self, state: object) -> HistogramState:
        return restored(HistogramState, state)

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Histogram:
        x = lax.stop_gradient(x).astype(jnp.float32)
        x = x if bounds == FREE else jnp.clip(x, *bounds)
        flat = x.reshape(-1) if self.num_channels is None else x.reshape(-1, x.shape[-1]).T
        return self.each(histogram_of)(flat)

    def merge(self, one: Histogram, other: Histogram) -> Histogram:
        return self.each(together)(one, other)

    def reduce(self, measured: Histogram, axis_name: AxisName) -> Histogram:
        low, high = extremes_of_devices(measured.low, measured.high, axis_name)
        own = self.each(widened)(measured, low, high)
        return Histogram(low, high, *lax.psum((own.counts, own.offsets), axis_name))

    def update(self, state: HistogramState, measured: Histogram) -> HistogramState:
        finite = jnp.all(jnp.isfinite(measured.low) & jnp.isfinite(measured.high))
        before = Histogram(state.low, state.high, state.counts, state.offsets)
        after = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), self.merge(before, measured), before
        )
        lo, hi = self.each(self.best_range)(after)
        return HistogramState(
            state.lo if self.nonnegative else jnp.where(finite, lo, state.lo),
            jnp.where(finite, hi, state.hi),
            *after,
            nonfinite=state.nonfinite + 1 - finite.astype(jnp.int32),
        )

    def range(self, state: HistogramState) -> Range:
        return state.lo, state.hi


class OfPresentValues(OfExtremes):
    """A weight's range: the best for the values of the last step, found once and remembered.

    Evaluation and the integer model read it, and search for none in sums that compilers order
    differently. What rounds a weight to its grid leaves the grid where it is.
    """

    def best_range(self, x: jax.Array) -> Range:
        """Return the range of values, float32, shape (N,) or (C, N)."""
        raise NotImplementedError

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Extremes:
        del bounds
        x = lax.stop_gradient(x).astype(jnp.float32)
        flat = x.reshape(1, -1) if self.num_channels is None else x.reshape(-1, x.shape[-1]).T
        lo, hi = self.best_range(flat)
        finite = jnp.all(jnp.isfinite(flat), axis=1)
        lo, hi = (jnp.where(finite, end, jnp.nan) for end in (lo, hi))
        return Extremes(lo.reshape(-1), hi) if self.num_channels else Extremes(lo[0], hi[0])

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        return batch
