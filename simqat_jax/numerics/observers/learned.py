"""The observer `learned`: steps that are trained as parameters are (LSQ)."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import along_channel, quant_params, rounded_product
from simqat_jax.numerics.observers.batch import Batch
from simqat_jax.numerics.observers.extremes import Extremes, OfExtremes, RangeState
from simqat_jax.numerics.observers.minmax import MinMax
from simqat_jax.numerics.observers.observer import AxisName, Observer, Range, Role, restored
from simqat_jax.numerics.requantize import FREE, Bounds


class LearnedState(NamedTuple):
    """A step, and the range that it starts from.

    The collection `quant_stats` holds the range, a `RangeState`; `quant_params` the step.
    """

    step: jax.Array
    """Real units per code, float32, shape () or (C,); its magnitude counts; 0: none yet."""
    lo: jax.Array
    """Lowest value of the range, real units, float32, same shape."""
    hi: jax.Array
    """Highest value, same shape."""
    nonfinite: jax.Array
    """Number of batches that held NaN or Inf, int32, shape ()."""


class Learned(Observer[LearnedState, Extremes]):
    """A step that is learned; it starts from the extremes of all batches until then.

    Its magnitude counts: where the weights of a channel vanish, training may move its small step
    across zero. With a `quant_delay` it starts when that is over, from the batches that come then.

    The zero point stays that of these extremes: of what starts at zero the lowest code, on a
    symmetric grid 0, as in the paper.

    Source:
      Esser et al., Learned step size quantization, arXiv:1902.08153, section 2.
    """

    fits_grid = True
    starts_as: ClassVar[type[OfExtremes]] = MinMax
    """How the range that the step starts from follows batches."""

    @classmethod
    def of_role(cls, role: Role) -> type[Observer]:
        return LearnedOfWeights if role == "weight" else cls

    @property
    def start(self) -> OfExtremes:
        """What observes the range that the step starts from."""
        return self.starts_as(self.spec, self.num_channels, self.nonnegative)

    def init(self) -> LearnedState:
        range_ = self.start.init()
        return LearnedState(jnp.zeros_like(range_.hi), *range_)

    def restore(self, state: object) -> LearnedState:
        return restored(LearnedState, state)

    def joined(self, state: object, step: jax.Array | jax.ShapeDtypeStruct) -> LearnedState:
        """Return the state of what `quant_stats` and `quant_params` hold, or of their shapes."""
        known: Any = step if isinstance(step, jax.ShapeDtypeStruct) else jnp.asarray(step)
        return LearnedState(known, *restored(RangeState, state))

    def parted(self, state: LearnedState, trained: ArrayLike) -> tuple[RangeState, jax.Array]:
        """Return what `quant_stats` and `quant_params` hold of a state.

        Args:
          state: what is known by now.
          trained: how many training steps there were before; within the delay no step starts.
        """
        delayed = jnp.asarray(trained) < self.spec.quant_delay
        return self._start_of(state), jnp.where(delayed, state.step, self.step(state))

    def is_early(self, trained: jax.Array | int) -> jax.Array | bool:
        """Whether a delayed step need not have started after so many training steps."""
        return (trained <= self.spec.quant_delay) & (self.spec.quant_delay > 0)

    def forgetful(self, state: LearnedState, trained: jax.Array | int) -> LearnedState:
        """Return what is remembered when a batch comes, after so many training steps.

        Until a delayed step starts, its range is that of the last batch alone: the first batches
        tell what random parameters make of them.
        """
        if not self.spec.quant_delay:
            return state
        anew = self.is_early(trained) & (state.step == 0)
        empty = self.start.init()
        return state._replace(
            lo=jnp.where(anew, empty.lo, state.lo), hi=jnp.where(anew, empty.hi, state.hi)
        )

    def for_evaluation(self, state: LearnedState, trained: jax.Array | int) -> LearnedState:
        """Return a state with the step that would start now, where one need not have started."""
        if not self.spec.quant_delay:
            return state
        early = self.is_early(trained) & (state.step == 0)
        return state._replace(step=jnp.where(early, self.step(state), state.step))

    def _start_of(self, state: LearnedState) -> RangeState:
        return RangeState(state.lo, state.hi, state.nonfinite)

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Extremes:
        return self.start.measure(x, bounds)

    def merge(self, one: Extremes, other: Extremes) -> Extremes:
        return self.start.merge(one, other)

    def reduce(self, measured: Extremes, axis_name: AxisName) -> Extremes:
        return self.start.reduce(measured, axis_name)

    def update(self, state: LearnedState, measured: Extremes) -> LearnedState:
        before = self._start_of(state)
        after, there = self.start.update(before, measured), state.step != 0
        return LearnedState(
            step=state.step,
            lo=jnp.where(there, before.lo, after.lo),
            hi=jnp.where(there, before.hi, after.hi),
            nonfinite=after.nonfinite,
        )

    def step(self, state: LearnedState) -> jax.Array:
        """Return the step, or what it starts from, without gradient; 0: neither is known."""
        first = quant_params(state.lo, state.hi, self.spec).scale
        first = jnp.where(state.lo <= state.hi, first, 0)
        return lax.stop_gradient(jnp.where(state.step != 0, jnp.abs(state.step), first))

    def codes(self, state: LearnedState) -> tuple[jax.Array, jax.Array]:
        """Return the lowest and the highest code, less the zero point: -Q_N and Q_P."""
        zero_point = quant_params(state.lo, state.hi, self.spec).zero_point
        ends = zero_point.astype(jnp.float32)
        return self.spec.qmin - ends, self.spec.qmax - ends

    def ends(self, state: LearnedState, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the range of a grid with this step."""
        lowest, highest = self.codes(state)
        lo = rounded_product(-highest if self.spec.symmetric else lowest, step)
        return lo, rounded_product(highest, step)

    def range(self, state: LearnedState) -> Range:
        lo, hi = self.ends(state, jnp.abs(lax.stop_gradient(state.step)))
        there = state.step != 0
        return jnp.where(there, lo, jnp.inf), jnp.where(there, hi, -jnp.inf)

    def training_range(self, state: LearnedState, before: LearnedState | None = None) -> Range:
        del before
        lo, hi = self.ends(state, self.step(state))
        return (np.zeros(np.shape(hi), np.float32) if self.nonnegative else lo), hi

    def present_range(self, x: jax.Array) -> Range:
        return self.start.present_range(x)

    def sharing(self, x: jax.Array) -> int:
        """Return how many values of one example share a step."""
        return math.prod(x.shape[1:]) // (self.num_channels or 1)

    def with_step_gradient(self, y: jax.Array, x: jax.Array, state: LearnedState) -> jax.Array:
        """Return `y`, `x` on the grid of a state, with a gradient for the step.

        It is that of the paper, section 2.1, times `1 / sqrt(N * Q_P)`, section 2.2, where N values
        of a layer (not of a batch) share the step.
        """
        lowest, highest = self.codes(state)
        share = lax.rsqrt(self.sharing(x) * jnp.maximum(highest, 1))
        step, lowest, highest, share = (
            along_channel(v, x.ndim, self.channel_axis)
            for v in (state.step, lowest, highest, share)
        )
        return _with_step_gradient(y, x, step, lowest, highest, share)


class LearnedOfWeights(Learned):
    """The step of a weight, which starts from `2 * mean(|w|) / sqrt(Q_P)`, section 2.1."""

    starts_as = Batch

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> Extremes:
        del bounds
        axes = None if self.num_channels is None else tuple(range(x.ndim - 1))
        mean = jnp.mean(jnp.abs(lax.stop_gradient(x)), axis=axes, dtype=jnp.float32)
        end = 2 * mean * np.sqrt(self.spec.qmax, dtype=np.float32)  # this step, Q_P times
        return Extremes(-end, end)

    def sharing(self, x: jax.Array) -> int:
        return x.size // (self.num_channels or 1)


@jax.custom_vjp
def _with_step_gradient(
    y: jax.Array,
    x: jax.Array,
    step: jax.Array,
    lowest: jax.Array,
    highest: jax.Array,
    share: jax.Array,
) -> jax.Array:
    del x, step, lowest, highest, share
    return y


def _forward(y, x, step, lowest, highest, share):
    return y, (x, step, lowest, highest, share)


def _backward(kept, g):
    x, step, lowest, highest, share = kept
    v = x.astype(jnp.float32) / jnp.where(step == 0, 1, jnp.abs(step))
    slope = jnp.where(v <= lowest, lowest, jnp.where(v >= highest, highest, jnp.rint(v) - v))
    axes = tuple(range(x.ndim - 1 if step.ndim else x.ndim))  # channels are the last one
    total = jnp.sum(g.astype(jnp.float32) * slope, axis=axes).reshape(jnp.shape(step))
    return g, jnp.zeros_like(x), total * share * jnp.sign(step), None, None, None


_with_step_gradient.defvjp(_forward, _backward)
