"""The observer `mse`: the range whose grid has the least squared error."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import fake_quant, quant_params
from simqat_jax.numerics.observers.histogram import (
    EDGES,
    Histogram,
    OfHistogram,
    OfPresentValues,
    exponent_of,
    means,
    power_of_two,
    width,
)
from simqat_jax.numerics.observers.observer import Range
from simqat_jax.numerics.spec import QuantSpec

_ROUNDING = 1e-4
"""By how much a sum of squares in float32 may be off: what gains less is no better."""

_MAGNITUDES = (0.965 ** np.arange(1, 128)).astype(np.float32)
"""The magnitudes that are tried, as shares of the largest."""
_FACTORS = np.array([1.2, 1.1, 1.05, 1, 0.9, 0.8, 0.65, 0.5, 0.3], np.float32)
_SHARES = np.stack(np.meshgrid(_FACTORS, _FACTORS)).reshape(2, -1)
"""By what the ends of the best one are multiplied then, each with each."""

Ends = tuple[jax.Array, jax.Array]
"""Lowest and highest value."""
SquaredError = Callable[[jax.Array, jax.Array], jax.Array]
"""The squared error of the grid on a range."""


class _Best(NamedTuple):
    """The best range so far, and its squared error."""

    lo: jax.Array
    hi: jax.Array
    error: jax.Array

    def or_one_of(self, los: jax.Array, his: jax.Array, error: SquaredError) -> "_Best":
        """Return the best of this and of more ranges, given by their ends, each of shape (N,)."""
        errors = lax.map(lambda ends: error(*ends), (los, his))
        i = jnp.argmin(errors)
        better = errors[i] < self.error
        return jax.tree.map(
            lambda new, old: jnp.where(better, new, old), _Best(los[i], his[i], errors[i]), self
        )


def least_error(
    low: jax.Array, high: jax.Array, spec: QuantSpec, known: jax.Array, error: SquaredError
) -> Ends:
    """Search for the range of least squared error.

    First with both ends up to one magnitude, then, unless the grid is symmetric, with each end at
    another share of what was found.

    Args:
      low: lowest value.
      high: highest value.
      spec: of the grid.
      known: the squared error with the range of these extremes, at the least.
      error: that of other ranges, at the most: another one is returned if it is better for sure.
    """
    least, most = jnp.minimum(low, 0), jnp.maximum(high, 0)
    ends = jnp.maximum(-least, most) * _MAGNITUDES
    extremes = _Best(low, high, known * (1 - _ROUNDING))
    best = extremes.or_one_of(jnp.maximum(least, -ends), jnp.minimum(most, ends), error)
    if not spec.symmetric:
        los = jnp.maximum(least, best.lo * _SHARES[0])
        his = jnp.minimum(most, best.hi * _SHARES[1])
        best = best.or_one_of(los, his, error)
    return best.lo, best.hi


def _squared_error(x: jax.Array, spec: QuantSpec, counts: ArrayLike = 1.0) -> SquaredError:
    """Return the error of `counts` values at each of `x`."""
    return lambda lo, hi: jnp.sum(counts * jnp.square(fake_quant(x, lo, hi, spec, None) - x))


class MseOfWeights(OfPresentValues):
    """The range of least squared error of the present values themselves."""

    fits_grid = True

    def best_range(self, x: jax.Array) -> Range:
        return jax.vmap(self.of_channel)(x)

    def of_channel(self, x: jax.Array) -> Ends:
        """Return the range of one channel, or of all values, shape (N,)."""
        low, high = jnp.min(x), jnp.max(x)
        exponent = exponent_of(low, high)
        x = x * power_of_two(-exponent)  # so that no square overflows
        error = _squared_error(x, self.spec)
        ends = jnp.min(x), jnp.max(x)
        lo, hi = least_error(*ends, self.spec, error(*ends), error)
        unit = power_of_two(exponent)
        return lo * unit, hi * unit


class Mse(OfHistogram):
    """The range of least squared error, of values known by their bins.

    A bin tells how many values it holds and what their mean is. As if all of them were rounded as
    their mean is, their error is known up to what they are apart, which is the same for every
    range: at most that, as some are rounded to a nearer code where a bin holds the border between
    two. For the extremes the least that it may be is counted, so that the range which is found is
    better than theirs in truth, too. (Where bins are wider than codes are apart, with 16 bits, the
    extremes stay.)
    """

    of_weights = MseOfWeights
    fits_grid = True

    def best_range(self, histogram: Histogram) -> Ends:
        unit = width(histogram)
        low, high = histogram.low / unit, histogram.high / unit
        error = _squared_error(means(histogram), self.spec, histogram.counts)
        known = jnp.maximum(error(low, high) - self.doubt(histogram.counts, low, high), 0)
        lo, hi = least_error(low, high, self.spec, known, error)
        return lo * unit, hi * unit

    def doubt(self, counts: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        """Return by how much less the squared error may be, in squared widths of a bin.

        Of n values in a bin with a border, which are rounded the other way than their mean, each is
        nearer to its code by `2 * step * (distance to the border)` in squares: at most
        `n * step / 2` in all, with that mean.
        """
        codes = fake_quant(jnp.asarray(EDGES), low, high, self.spec, None)
        border = codes[1:] != codes[:-1]
        step = quant_params(low, high, self.spec).scale
        return jnp.where(step >= 1, jnp.sum(counts * border) * step / 2, jnp.inf)
