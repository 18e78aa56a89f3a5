"""Range observers: pure `init`, `measure`, `update` and `range` on a small state."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import rounded_product
from simqat_jax.numerics.requantize import FREE, Bounds
from simqat_jax.numerics.spec import QuantSpec

Range = tuple[ArrayLike, ArrayLike]
"""Lowest and highest value, real units, shape () or (C,)."""
AxisName = Hashable
"""One or several axes of `pmap`, `shard_map` or `vmap`."""
Role = Literal["activation", "weight", "constant"]
"""What a quantizer quantizes."""


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


def as_range_state(state: object) -> RangeState:
    """Restore the type of a state that a checkpoint library returned as a dictionary or list.

    Raises:
      TypeError: it is none.
    """
    if isinstance(state, Mapping) and set(state) == set(RangeState._fields):
        return RangeState(**state)
    if isinstance(state, Sequence) and len(state) == len(RangeState._fields):
        return RangeState(*state)
    raise TypeError(f"{state!r} is no RangeState: it must hold {', '.join(RangeState._fields)}.")


def observed(state: RangeState) -> jax.Array:
    """Tell whether the range has seen a finite batch, see `checked.observed`."""
    return jnp.all(state.lo <= state.hi)


def extremes(x: jax.Array, channel_axis: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the lowest and highest value of `x` over all axes but `channel_axis`, float32."""
    kept = None if channel_axis is None else channel_axis % x.ndim
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    return jnp.min(x, axis=axes).astype(jnp.float32), jnp.max(x, axis=axes).astype(jnp.float32)


def update_range(state: RangeState, lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> RangeState:
    """Take one batch's extremes into the state, see `checked.update_range`."""
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    if lo.shape != state.lo.shape or hi.shape != state.hi.shape:
        raise ValueError(
            f"lo of shape {lo.shape} and hi of shape {hi.shape} do not fit a range of shape "
            f"{state.lo.shape}."
        )
    return OBSERVERS[spec.observer](spec).update(state, Extremes(lo, hi))


def observe(
    state: RangeState, x: ArrayLike, spec: QuantSpec, channel_axis: int | None = -1
) -> RangeState:
    """Take the extremes of `x` into the state, see `checked.observe`."""
    x = jnp.asarray(x)
    if x.size == 0:
        raise ValueError(f"x is an empty array of shape {x.shape}: it has no range.")
    if not spec.per_channel:
        channel_axis = None
    elif channel_axis is None or not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"a per-channel range needs a channel axis: channel_axis is {channel_axis} and x has "
            f"shape {x.shape}."
        )
    return update_range(state, *extremes(x, channel_axis), spec)


class Extremes(NamedTuple):
    """Lowest and highest value of a batch, float32, shape () or (C,)."""

    lo: jax.Array
    hi: jax.Array


@dataclasses.dataclass(frozen=True)
class Observer:
    """How the range of one quantizer follows its data; here: by each batch's extremes.

    One that needs more than the extremes measures something else, and keeps another state: a
    NamedTuple with a field `nonfinite`. Nobody outside of an observer looks into either.

    Attributes:
      spec: names the observer and holds its settings.
      num_channels: entries of the range, None for one per tensor.
      nonnegative: the tensor holds nothing below zero, so that its range starts at zero.
    """

    spec: QuantSpec
    num_channels: int | None = None
    nonnegative: bool = False

    @classmethod
    def keeps_state(cls, role: Role) -> bool:
        """Whether the range of such a quantizer is remembered; else it is `present_range`."""
        return role != "constant"

    @property
    def channel_axis(self) -> int | None:
        """The axis with one range per channel."""
        return None if self.num_channels is None else -1

    def init(self) -> RangeState:
        """Return the empty state."""
        return init_range(self.num_channels, nonnegative=self.nonnegative)

    def restore(self, state: object) -> RangeState:
        """Restore the type of a state that a checkpoint library returned as a dictionary or list.

        Raises:
          TypeError: it is none.
        """
        return as_range_state(state)

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Extremes:
        """Take what the state needs to know of one batch, without gradient.

        Args:
          x: the values.
          bounds: what they are clamped to afterwards: taken from before the clamp, the extremes
            need no pass of their own over the clamped values, which a compiled step never stores.
        """
        ends = extremes(lax.stop_gradient(x), self.channel_axis)
        if bounds != FREE:
            ends = tuple(jnp.clip(end, *bounds) for end in ends)
        return Extremes(jnp.zeros_like(ends[1]) if self.nonnegative else ends[0], ends[1])

    def merge(self, one: Extremes, other: Extremes) -> Extremes:
        """Return what two tensors with one range have been together."""
        return Extremes(jnp.minimum(one.lo, other.lo), jnp.maximum(one.hi, other.hi))

    def reduce(self, measured: Extremes, axis_name: AxisName) -> Extremes:
        """Return what all devices of a mapped axis have measured together."""
        return Extremes(lax.pmin(measured.lo, axis_name), lax.pmax(measured.hi, axis_name))

    def update(self, state: RangeState, measured: Extremes) -> RangeState:
        """Return the state after a batch; unchanged but for its count if NaN or Inf is in it."""
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
        """Return the range that a state stands for; lowest above highest: none yet."""
        return state.lo, state.hi

    def training_range(self, state: RangeState, before: RangeState | None = None) -> Range:
        """Return the range that a training step quantizes with.

        Args:
          state: after the step's batch.
          before: where several tensors share the range, the state before the step: the first of
            them come before the range is known.
        """
        del before
        return (np.zeros(state.hi.shape, np.float32) if self.nonnegative else state.lo), state.hi

    def present_range(self, x: jax.Array) -> Range:
        """Return the range of the values at hand, where no state is kept."""
        return self.measure(x)


class Ema(Observer):
    """An exponential moving average of each batch's extremes."""

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        decay = self.spec.ema_decay
        mean = rounded_product(old, decay) + rounded_product(batch, 1 - decay)
        return jnp.where(jnp.isfinite(old), mean, batch)


class MinMax(Observer):
    """The extremes of all batches so far."""

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        return widen(old, batch)


class Batch(Observer):
    """The extremes of the last batch; of a weight, those of its present values."""

    @classmethod
    def keeps_state(cls, role: Role) -> bool:
        return role == "activation"

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        return batch

    def training_range(self, state: RangeState, before: RangeState | None = None) -> Range:
        lo, hi = state.lo, state.hi
        if before is not None:  # the range starts anew with each batch
            lo, hi = jnp.minimum(lo, before.lo), jnp.maximum(hi, before.hi)
        return (np.zeros(hi.shape, np.float32) if self.nonnegative else lo), hi

    def present_range(self, x: jax.Array) -> Range:
        if not self.spec.symmetric:
            return self.measure(x)
        # A symmetric grid needs the magnitude alone.
        axis = None if self.num_channels is None else tuple(range(x.ndim - 1))
        magnitude = jnp.max(jnp.abs(lax.stop_gradient(x)), axis=axis)
        return -magnitude, magnitude


OBSERVERS: dict[str, type[Observer]] = {"ema": Ema, "minmax": MinMax, "batch": Batch}
"""By the name that `QuantSpec.observer` has for them."""
