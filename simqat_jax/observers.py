"""Range observers: pure `init` and `update` on a small state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.config import QuantSpec
from simqat_jax.numerics import rounded_product


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
    """Return the empty range.

    Args:
      num_channels: one range for each of so many channels; None: one per tensor.
      nonnegative: the tensor holds nothing below zero: its range starts at zero and stays there.
    Example:
      >>> observed(init_range())
      Array(False, dtype=bool)
    """
    shape = () if num_channels is None else (num_channels,)
    return RangeState(
        lo=jnp.full(shape, 0.0 if nonnegative else jnp.inf, jnp.float32),
        hi=jnp.full(shape, -jnp.inf, jnp.float32),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def as_range_state(state: Any) -> RangeState:
    """Restore the type of a state that a checkpoint library returned as a dictionary or list.

    Raises: TypeError: it is none.
    """
    if isinstance(state, Mapping) and set(state) == set(RangeState._fields):
        return RangeState(**state)
    if isinstance(state, Sequence) and len(state) == len(RangeState._fields):
        return RangeState(*state)
    raise TypeError(f"{state!r} is no RangeState: it must hold {', '.join(RangeState._fields)}.")


def observed(state: RangeState) -> jax.Array:
    """Tell whether the range has seen a finite batch: bool, shape ()."""
    return jnp.all(state.lo <= state.hi)


def extremes(x: jax.Array, channel_axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and highest value of `x` over all axes but `channel_axis`, float32."""
    kept = None if channel_axis is None else channel_axis % x.ndim
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    return jnp.min(x, axis=axes).astype(jnp.float32), jnp.max(x, axis=axes).astype(jnp.float32)


def update_range(state: RangeState, lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> RangeState:
    """Take one batch's extremes into the state.

    `ema`: `new = decay * old + (1 - decay) * batch`, the first batch initialises; `minmax`:
    running extremes; `batch`: the batch's own.

    Args:
      state: the state before.
      lo: lowest value of the batch, real units, shape of `state.lo`.
      hi: highest value, same shape.
      spec: names the observer and its decay.
    Returns: the state after; unchanged but for `nonfinite + 1` if any extreme is NaN or Inf.
    Raises: ValueError: a shape other than the state's.
    Example:
      >>> update_range(init_range(), -1.0, 2.0, QuantSpec()).hi
      Array(2., dtype=float32)

    Source: Krishnamoorthi, arXiv:1806.08342, section 3. The source system weighs old and new the
      other way round.
    """
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    if lo.shape != state.lo.shape or hi.shape != state.hi.shape:
        raise ValueError(
            f"extremes of shape {lo.shape} and {hi.shape} do not fit a range of shape "
            f"{state.lo.shape}."
        )
    finite = jnp.isfinite(lo) & jnp.isfinite(hi)
    finite = finite if finite.ndim == 0 else jnp.all(finite)
    new_lo = _follow(state.lo, lo, lax.min, spec)
    new_hi = _follow(state.hi, hi, lax.max, spec)
    return RangeState(
        lo=jnp.where(finite, new_lo, state.lo),
        hi=jnp.where(finite, new_hi, state.hi),
        nonfinite=state.nonfinite + 1 - finite.astype(jnp.int32),
    )


def _follow(
    old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array], spec: QuantSpec
) -> jax.Array:
    """Return one end of the range after a batch. Looks at this end alone, so that a compiled step
    can update it in place."""
    if spec.observer == "batch":
        return batch
    if spec.observer == "minmax":
        return widen(old, batch)
    mean = rounded_product(old, spec.ema_decay) + rounded_product(batch, 1 - spec.ema_decay)
    return jnp.where(jnp.isfinite(old), mean, batch)


def observe(
    state: RangeState, x: ArrayLike, spec: QuantSpec, channel_axis: int | None = -1
) -> RangeState:
    """Take the extremes of `x` into the state: `update_range(state, min(x), max(x), spec)`.

    Args:
      state: the state before, from `init_range` or an earlier `observe`.
      x: values, real units, any shape and float dtype.
      spec: names the observer; `per_channel` keeps `channel_axis`.
      channel_axis: the channel axis of `x` where `spec.per_channel`.
    Returns: the state after.
    Raises: ValueError: `x` is empty, or `spec.per_channel` and `x` has no such axis.
    Example:
      >>> observe(init_range(), jnp.array([0.5, 2.0]), QuantSpec()).lo
      Array(0.5, dtype=float32)
    """
    x = jnp.asarray(x)
    if x.size == 0:
        raise ValueError(f"cannot observe the range of an empty array of shape {x.shape}.")
    if not spec.per_channel:
        channel_axis = None
    elif channel_axis is None or not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"a per-channel range needs a channel axis: channel_axis is {channel_axis} and x has "
            f"shape {x.shape}."
        )
    return update_range(state, *extremes(x, channel_axis), spec)
