"""What is measured of a tensor, summed up over batches."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.numerics.affine import QuantParams, along_channel, true_divide
from simqat_jax.numerics.spec import QuantSpec

BINS = 64
"""Bins of a histogram, from the lowest code of a grid to the highest."""


class Error(NamedTuple):
    """How far values are from those of the float model.

    Attributes:
      noise: the sum of squared differences.
      signal: the sum of the float model's squares.
    """

    noise: float = 0.0
    signal: float = 0.0

    @classmethod
    def between(cls, got: Iterable[jax.Array], aims: Iterable[jax.Array]) -> "Error":
        """Return the error of some tensors, summed in float64."""
        pairs = [
            (np.asarray(y, np.float64), np.asarray(aim, np.float64))
            for y, aim in zip(got, aims, strict=True)
        ]
        noise = sum(float(np.sum((y - aim) ** 2)) for y, aim in pairs)
        return cls(noise, sum(float(np.sum(aim**2)) for _, aim in pairs))

    def plus(self, other: "Error") -> "Error":
        """Return the error over both data."""
        return Error(self.noise + other.noise, self.signal + other.signal)

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise ratio, dB: `10 log10(signal / noise)`.

        Infinite without noise.
        """
        if not self.noise:
            return float("inf")
        return 10 * float(np.log10(self.signal / self.noise)) if self.signal else -float("inf")


class Measured(NamedTuple):
    """Sums over the values of a tensor, as arrays while they are computed.

    Attributes:
      lo: lowest value before rounding, real units.
      hi: highest value.
      grid_lo: lowest value of the grid; with one for each channel, of all of them.
      grid_hi: highest value.
      counts: values below the grid, in each of `BINS` bins of its codes, above it.
      noise: as in `Error`.
      signal: as in `Error`.
      nonfinite: how many of the float model's values are NaN or Inf.
    """

    lo: jax.Array
    hi: jax.Array
    grid_lo: jax.Array
    grid_hi: jax.Array
    counts: jax.Array
    noise: jax.Array
    signal: jax.Array
    nonfinite: jax.Array

    @classmethod
    def of(
        cls, real: jax.Array, unrounded: jax.Array, params: QuantParams, spec: QuantSpec
    ) -> "Measured":
        """Measure one tensor.

        Args:
          real: of the float model.
          unrounded: of the quantized model, before it is rounded.
          params: its grid, with one entry for each of the last axis' channels, or one.
          spec: the grid's codes.
        """
        real, x = real.astype(jnp.float32), unrounded.astype(jnp.float32)
        scale, zero = (along_channel(v.astype(jnp.float32), x.ndim, -1) for v in params)
        places = true_divide(x, scale)
        codes = jnp.round(places) + zero
        clipped = jnp.clip(codes, spec.qmin, spec.qmax)
        width = (spec.qmax - spec.qmin + 1) / BINS
        where = jnp.clip(jnp.floor((places + zero - spec.qmin + 0.5) / width), 0, BINS - 1) + 1
        where = jnp.where(codes < spec.qmin, 0, jnp.where(codes > spec.qmax, BINS + 1, where))
        noise = jnp.square((clipped - zero) * scale - real)
        return cls(
            lo=jnp.min(x),
            hi=jnp.max(x),
            grid_lo=jnp.min((spec.qmin - zero) * scale),
            grid_hi=jnp.max((spec.qmax - zero) * scale),
            counts=jnp.zeros(BINS + 2, jnp.int32).at[where.astype(jnp.int32).reshape(-1)].add(1),
            noise=jnp.sum(noise),
            signal=jnp.sum(jnp.square(real)),
            nonfinite=jnp.sum(~jnp.isfinite(real)),
        )

    def summed(self) -> "Summary":
        """Return these sums as numbers, to which those of other batches can be added."""
        got = jax.device_get(self)
        return Summary(
            values=(float(got.lo), float(got.hi)),
            grid=(float(got.grid_lo), float(got.grid_hi)),
            counts=got.counts.astype(np.int64),
            error=Error(float(got.noise), float(got.signal)),
            nonfinite=int(got.nonfinite),
        )


class Summary(NamedTuple):
    """What is measured of a tensor on some data.

    Attributes:
      values: lowest and highest value before rounding, real units.
      grid: lowest and highest value of the grid.
      counts: as in `Measured`, int64.
      error: against the float model.
      nonfinite: how many of the float model's values are NaN or Inf.
    """

    values: tuple[float, float]
    grid: tuple[float, float]
    counts: np.ndarray
    error: Error
    nonfinite: int

    def plus(self, other: "Summary") -> "Summary":
        """Return what is measured over both data."""
        return Summary(
            values=_spanned(self.values, other.values),
            grid=_spanned(self.grid, other.grid),
            counts=self.counts + other.counts,
            error=self.error.plus(other.error),
            nonfinite=self.nonfinite + other.nonfinite,
        )


Summaries = dict[str, Summary]
"""By the names of tensors."""


def joined(one: Summaries, other: Summaries) -> Summaries:
    """Return what is measured over both data; what is in one of them alone stays."""
    both = {name: one[name].plus(other[name]) for name in one.keys() & other.keys()}
    return {**one, **other, **both}


def _spanned(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return min(one[0], other[0]), max(one[1], other[1])


def decibels(value: float, sign: str = "") -> str:
    """Write a ratio; an infinite one is that of values without an error."""
    if math.isinf(value) and value > 0:
        return "exact"
    return f"{round(value, 1) + 0.0:{sign}.1f} dB"  # no "-0.0"
