"""Walk through a model, step by step with all data at once: quantized, and in float beside it."""

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from simqat_jax.calibration.batches import Batches, Progress, arguments
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.steps import Steps
from simqat_jax.calibration.variables import FloatVariables, FreeVariables
from simqat_jax.ir.graph import Operand
from simqat_jax.ir.plan import Placement, Quantizer, Step
from simqat_jax.numerics.observers import Range
from simqat_jax.training.ranges import check, ranges_and_steps
from simqat_jax.training.values import Values, read


class Moments(NamedTuple):
    """What each channel of a step's result is before its clamp, on all data, float64, (C,)."""

    mean: np.ndarray
    var: np.ndarray


@dataclasses.dataclass(eq=False)
class _Side:
    """One batch on its way through one model.

    Attributes:
      steps: of the model.
      env: the tensors that later steps read, and all variables.
      ahead: the tensors that leave the present step, if they are known.
    """

    steps: Steps
    env: Values
    ahead: Values | None = None

    def moments(self, number: int) -> tuple[jax.Array, jax.Array]:
        """Return the moments of the present step's result."""
        mean, var, self.ahead = self.steps.moments(number, self.env)
        return mean, var

    def advance(self, number: int) -> None:
        """Run the present step."""
        ahead = self.steps.results(number, self.env) if self.ahead is None else self.ahead
        self.env.update(ahead)
        self.ahead = None


class _Lane(NamedTuple):
    """One batch on its way through the quantized model and the float one."""

    exact: _Side
    real: _Side
    examples: int


class Stop:
    """A step that the walk has come to: all that it reads is known.

    Args:
      walk: on its way.
      number: of the step.

    Attributes:
      step: the step.
    """

    def __init__(self, walk: "Walk", number: int):
        self.step: Step = walk.placement.steps[number]
        self._walk = walk
        self._number = number

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of the step's kernel."""
        return self._walk.placement.weights.get(self.step.node)

    def range(self, quantizer: Quantizer) -> Range | None:
        """Return the range that `quant_stats` holds; None: it is that of the present values."""
        if not quantizer.has_state:
            return None
        return quantizer.observer.range(self._walk.stats[quantizer.name])

    def value(self, v: Operand) -> jax.Array:
        """Return what does not depend on the data, as it is in the quantized model."""
        return jnp.asarray(read(v, self._walk.lanes[0].exact.env).real)

    def is_free(self, v: Operand | None) -> bool:
        """Whether this is a variable, maybe cast, that nothing but this step reads."""
        return bool(self._walk.free.sources(v))

    def set(self, v: Operand, value: jax.Array | np.ndarray) -> None:
        """Change such a variable of the quantized model before the walk goes on."""
        for source in self._walk.free.sources(v):
            self._walk.changed.add(source)
            for lane in self._walk.lanes:
                old = lane.exact.env[source]
                new = jnp.asarray(value, old.real.dtype).reshape(old.real.shape)
                lane.exact.env[source] = old._replace(real=new)
                lane.exact.ahead = None

    def moments(self, *, real: bool = False) -> Moments:
        """Return the moments of the step's result, in the quantized model or in the float one."""
        sides = [lane.real if real else lane.exact for lane in self._walk.lanes]
        parts = [side.moments(self._number) for side in sides]
        means, variances = (np.array([p[i] for p in parts], np.float64) for i in range(2))
        weights = [lane.examples for lane in self._walk.lanes]
        mean = np.average(means, axis=0, weights=weights)
        return Moments(mean, np.average(variances + (means - mean) ** 2, axis=0, weights=weights))

    def inputs(self) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yield of each batch the step's first input: in the quantized model, in the float one."""
        v = self.step.node.inputs[0]
        for exact, real, _ in self._walk.lanes:
            yield read(v, exact.env).real, read(v, real.env).real


class Walk:
    """All data on their way through a model; iterating stops at each step, in order.

    The whole data are in memory, as the tensors that later steps read.

    Args:
      call: how the model is called.
      variables: calibrated ones.
      batches: yields the call's arguments.
      reference: the float model's variables; None: the same ones.
      what: the name of the work, for progress.
      progress: show it.

    Attributes:
      placement: the plan of the quantized model.
      stats: the ranges.
      lanes: the batches.
      free: the variables that may be changed.
      changed: those that have been.
    """

    def __init__(
        self,
        call: EvaluationCall,
        variables: VariableDict,
        batches: Batches,
        reference: VariableDict | None = None,
        *,
        what: str,
        progress: bool,
    ):
        self._given = variables
        self._call = call
        self._floats = FloatVariables(variables)
        self._plans: dict[Hashable, tuple[Steps, Steps]] = {}
        own = [jnp.asarray(x) for x in self._floats.leaves]
        aims = own
        if reference is not None:
            aims = [jnp.asarray(x) for x in self._floats.like(reference)]
        self.lanes = [self._lane(own, aims, args) for _, args in arguments(batches, what, False)]
        self.placement: Placement = self.lanes[0].exact.steps.placement
        self.stats = check(self.placement, *ranges_and_steps(variables))
        self._line = Progress(what, "step", len(self.placement.steps), progress)
        self._graph = self.placement.graph
        self.free = FreeVariables(self._graph, self._floats.tensors(self._graph))
        self.changed: set[int] = set()
        self._check_alike()
        self._last_read = self._last_reads()

    def __iter__(self) -> Iterator[Stop]:
        for number in range(len(self.placement.steps)):
            yield Stop(self, number)
            for lane in self.lanes:
                self._advance(lane.exact, number)
                self._advance(lane.real, number)
            self._line.show(number + 1)
        self._line.end(len(self.placement.steps))

    def variables(self) -> dict[str, Any]:
        """Return the variables as they are by now."""
        changed = {v: self.lanes[0].exact.env[v].real for v in self.changed}
        return {**self._given, **self._floats.tree(self._graph, changed)}

    def _lane(self, own: list[jax.Array], aims: list[jax.Array], args: tuple) -> _Lane:
        """Put a batch at the start of both models.

        Args:
          own: the variables of the quantized model.
          aims: those of the float one.
          args: the batch.
        """
        arrays, key = self._call.arrays(args)
        if key not in self._plans:
            placement, stats = self._call.observed(self._given, args)
            self._plans[key] = Steps(placement, stats), Steps(placement, None)
        exact, real = self._plans[key]
        return _Lane(
            exact=_Side(exact, exact.start([*own, *arrays])),
            real=_Side(real, real.start([*aims, *arrays])),
            examples=max((len(x) for x in arrays if x.ndim), default=1),
        )

    def _advance(self, side: _Side, number: int) -> None:
        side.advance(number)
        for v in self._last_read[number]:
            side.env.pop(v, None)

    def _check_alike(self) -> None:
        """Raise ValueError if the model makes other steps for batches of another shape."""
        shapes = [
            [(type(step.node), step.output) for step in lane.exact.steps.placement.steps]
            for lane in self.lanes
        ]
        if any(steps != shapes[0] for steps in shapes):
            raise ValueError(
                "the model computes otherwise for batches of another shape, so that they have no "
                "steps in common. Give all batches one shape: leave out a smaller last one."
            )

    def _last_reads(self) -> list[list[int]]:
        """Return for each step the tensors that no later one reads, but for variables."""
        last: dict[int, int] = {}
        for number, step in enumerate(self.placement.steps):
            for node in step.nodes:
                last.update({v: number for v in node.inputs if isinstance(v, int)})
        for v in self._floats.tensors(self._graph):
            last.pop(v, None)
        numbers = range(len(self.placement.steps))
        return [[v for v, n in last.items() if n == number] for number in numbers]
