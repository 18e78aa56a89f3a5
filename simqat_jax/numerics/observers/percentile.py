"""The observer `percentile`: ends of the range that leave out a share of values."""

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.numerics.observers.histogram import (
    HALF,
    Histogram,
    OfHistogram,
    OfPresentValues,
    width,
)
from simqat_jax.numerics.observers.observer import Range
from simqat_jax.numerics.spec import QuantSpec

_ROUNDING = 1e-6
"""By how much a share of values in float32 may be off."""


def _outside(spec: QuantSpec) -> float:
    """Return the share of values that may lie beyond an end; 100 - 99.9 is not quite 0.1."""
    return round((100.0 - spec.percentile) / 100.0, 12) * (1 + _ROUNDING)


def _end(counts: jax.Array, most: jax.Array) -> jax.Array:
    """Return the first edge with at most so many values in the bins above it."""
    above = lax.cumsum(counts, reverse=True)
    return jnp.sum(above > most).astype(jnp.float32)


class PercentileOfWeights(OfPresentValues):
    """The percentile of the present values, exactly."""

    @property
    def label(self) -> str:
        return f"percentile {self.spec.percentile:g}"

    def best_range(self, x: jax.Array) -> Range:
        left_out = int(x.shape[1] * _outside(self.spec))

        def end(values: jax.Array) -> jax.Array:
            return lax.top_k(values, left_out + 1)[0][:, -1]

        if not self.spec.symmetric:
            return -end(-x), end(x)
        largest = end(jnp.abs(x))
        return jnp.maximum(jnp.min(x, axis=1), -largest), jnp.minimum(jnp.max(x, axis=1), largest)


class Percentile(OfHistogram):
    """The smallest range, in whole bins, that leaves out at most a share of values at each end."""

    of_weights = PercentileOfWeights

    @property
    def label(self) -> str:
        return f"percentile {self.spec.percentile:g}"

    def best_range(self, histogram: Histogram) -> tuple[jax.Array, jax.Array]:
        low, high, counts, _ = histogram
        most, unit = jnp.sum(counts) * _outside(self.spec), width(histogram)
        if self.spec.symmetric:
            # Of magnitudes: a bin below zero joins the one that is as far above it.
            end = _end(counts[HALF:] + counts[:HALF][::-1], most) * unit
            return jnp.maximum(low, -end), jnp.minimum(high, end)
        lo, hi = HALF - _end(counts[::-1], most), _end(counts, most) - HALF
        return jnp.maximum(low, lo * unit), jnp.minimum(high, hi * unit)
