"""The observer `entropy`: the range whose grid tells most about the distribution of values."""

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.numerics.affine import quant_params, quantize
from simqat_jax.numerics.observers.batch import Batch
from simqat_jax.numerics.observers.histogram import (
    BINS,
    EDGES,
    HALF,
    Histogram,
    OfHistogram,
    width,
)
from simqat_jax.numerics.spec import QuantSpec

_RANGES = 128
"""Ranges that are tried."""
_LEAST = 1e-9
"""The least probability that a distribution on the grid has where values are."""


def without_spike(counts: jax.Array) -> jax.Array:
    """Return the counts without the zeros of a ReLU, which every grid holds exactly."""
    beside = jnp.maximum(counts[HALF - 1], counts[HALF + 1])
    return counts.at[HALF].min(beside)


def divergence(counts: jax.Array, lo: jax.Array, hi: jax.Array, spec: QuantSpec) -> jax.Array:
    """Return the Kullback-Leibler divergence of what a grid keeps of a distribution from it.

    Args:
      counts: values in each bin.
      lo: the first bin's edge in the range, in widths of a bin, a whole number.
      hi: the last one's.
      spec: of the grid.
    """
    middles = EDGES[:-1] + 0.5
    inside = (middles > lo) & (middles < hi)
    held = jnp.where(inside, counts, 0)
    # What lies outside is clipped: it counts at the ends.
    clipped = held + jnp.where(middles == lo + 0.5, jnp.sum(jnp.where(middles < lo, counts, 0)), 0)
    clipped += jnp.where(middles == hi - 0.5, jnp.sum(jnp.where(middles > hi, counts, 0)), 0)
    # The bins of one code share its values alike, but for those that hold none.
    codes = quantize(middles, *quant_params(lo, hi, spec), spec, None) - spec.qmin
    codes = jnp.minimum(codes, BINS - 1)
    sums = jnp.zeros((BINS, 2), jnp.float32).at[codes].add(jnp.stack([held, held > 0], -1))
    share = sums[:, 0] / jnp.maximum(sums[:, 1], 1)
    spread = jnp.where(held > 0, share[codes], 0)
    p = clipped / jnp.sum(clipped)
    q = jnp.maximum(spread / jnp.maximum(jnp.sum(spread), 1), _LEAST)
    return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1) / q), 0))


class Entropy(OfHistogram):
    """The range of least Kullback-Leibler divergence, as TensorRT calibrates activations.

    Source:
      Migacz, 8-bit Inference with TensorRT, GTC 2017. There grids are symmetric; here the codes of
      any grid tell which bins are one value.
    """

    of_weights = Batch

    def best_range(self, histogram: Histogram) -> tuple[jax.Array, jax.Array]:
        counts, unit = without_spike(histogram.counts), width(histogram)
        first = jnp.floor(histogram.low / unit)
        last = jnp.floor(histogram.high / unit) + 1
        magnitude = jnp.maximum(-first, last)
        ends = jnp.ceil(magnitude * (jnp.arange(_RANGES, 0, -1, dtype=jnp.float32) / _RANGES))
        los, his = jnp.maximum(first, -ends), jnp.minimum(last, ends)
        errors = lax.map(lambda ends: divergence(counts, ends[0], ends[1], self.spec), (los, his))
        i = jnp.argmin(errors)
        return (
            jnp.maximum(histogram.low, los[i] * unit),
            jnp.minimum(histogram.high, his[i] * unit),
        )
