"""Measure a model between float and quantized, on batches that are held in memory."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict

from simqat_jax.analysis import kernels
from simqat_jax.analysis.measures import Error, Summaries, joined
from simqat_jax.analysis.stages import Stages, Tensors
from simqat_jax.analysis.switched import Version
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.variables import FloatVariables
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.plan import Quantizer
from simqat_jax.numerics.packing import bytes_of
from simqat_jax.training.ranges import check, ranges_and_steps


class Kernel(NamedTuple):
    """A quantized kernel.

    Attributes:
      quantizer: its own.
      steps: the places of the steps that multiply by it; the first one names it.
    """

    quantizer: Quantizer
    steps: tuple[int, ...]


class Alone(NamedTuple):
    """What a layer does to the model's outputs.

    Attributes:
      quantized: the error where the layer alone is quantized.
      real: the error where the layer alone is float.
    """

    quantized: Error = Error()
    real: Error = Error()

    def plus(self, other: "Alone") -> "Alone":
        """Return what it does over both data."""
        return Alone(self.quantized.plus(other.quantized), self.real.plus(other.real))


class Compared(NamedTuple):
    """What a comparison of the quantized model with the float one finds.

    Attributes:
      tensors: what is measured of each quantized tensor and kernel, by name.
      layers: of each layer, in the order of `Layers.names`.
      error: of the outputs of the quantized model.
    """

    tensors: Summaries
    layers: list[Alone]
    error: Error


class _Known(NamedTuple):
    """One batch on its way through both models.

    Attributes:
      real: what each stage of the float model reads.
      exact: what each stage of the quantized model reads.
      aims: what the float model returns.
      got: what the quantized model returns.
    """

    real: list[Tensors]
    exact: list[Tensors]
    aims: list[jax.Array]
    got: list[jax.Array]


class _Batch(NamedTuple):
    stages: Stages
    arrays: list[jax.Array]


class Study:
    """A call with its data, ready to be run in any version of the model.

    Args:
      call: how the model is called.
      variables: calibrated ones.
      float_variables: the float model's; None: the same ones.
      batches: the arguments of each call.

    Attributes:
      stages: of the first call.
      batches: how many there are.
      examples: how many there are in all of them.
      kernels: those that are quantized, in order of evaluation.
      alone: errors of the outputs where one kernel alone is quantized, as far as measured.

    Raises:
      ValueError: other variables, ranges never observed, no floating output.
    """

    def __init__(
        self,
        call: EvaluationCall,
        variables: VariableDict,
        float_variables: VariableDict | None,
        batches: Sequence[tuple],
    ):
        self._call, self._variables = call, variables
        own = FloatVariables(variables)
        leaves = tuple(jnp.asarray(x) for x in own.leaves)
        aims = leaves
        if float_variables is not None:
            aims = tuple(map(jnp.asarray, own.like(float_variables, "float_variables")))
        self._plans: dict[Hashable, Stages] = {}
        self._widths: dict[int | None, Mapping[int, jax.Array]] = {}
        self._data = [self._planned(args, len(leaves)) for args in batches]
        self.stages, placement = self._data[0].stages, self._data[0].stages.placement
        self.batches = len(self._data)
        self.examples = sum(
            max((len(x) for x in batch.arrays if x.ndim), default=1) for batch in self._data
        )
        self._check()
        self.kernels = self._found_kernels()
        self.alone: dict[tuple[Kernel, int], Error] = {}
        self._stats = check(placement, *ranges_and_steps(variables))
        self._own_kernels = self.stages.real_kernels(leaves)
        off = jnp.zeros(len(self.stages.layers.names), bool)
        self._real = Version(aims, self.stages.real_kernels(aims), off)
        self._exact = Version(leaves, self._rounded(None), ~off)

    def compare(self, done: Callable[[], None]) -> Compared:
        """Compare the quantized model with the float one: every tensor, and each layer alone.

        Args:
          done: is called behind each batch and each layer of it.

        Raises:
          ValueError: one of them computes NaN or Inf.
        """
        layers = self.stages.layers
        tensors = kernels.measured(
            self.stages.placement, self._stats, self._real.kernels, self._own_kernels
        )
        alone, error = [Alone() for _ in layers.names], Error()
        for number, batch in enumerate(self._data):
            known, found = self._walked(batch)
            present = Error.between(known.got, known.aims)
            _check_finite(number, found, present)
            tensors, error = joined(tensors, found), error.plus(present)
            done()
            for layer in range(len(layers.names)):
                alone[layer] = alone[layer].plus(self._alone(batch, known, layer))
                done()
        return Compared(tensors, alone, error)

    def measure_alone(self, wanted: Sequence[tuple[Kernel, int]], done: Callable[[], None]) -> None:
        """Put into `alone` the errors of the outputs where one kernel alone is quantized.

        Args:
          wanted: kernels, each with the width of its codes.
          done: is called behind each of them in each batch.
        """
        errors = [Error() for _ in wanted]
        for stages, arrays in self._data:
            tensors = [stages.start(arrays)]
            for stage in range(len(stages)):
                tensors.append(stages.advance(stage, self._real, tensors[-1]))
            aims = [tensors[-1][v] for v in stages.outputs]
            for place, (kernel, bits) in enumerate(wanted):
                version = self._with_kernels(self._real, {kernel: bits})
                first = min(stages.stage_of[number] for number in kernel.steps)
                got = stages.finish(first, version, tensors[first])
                errors[place] = errors[place].plus(Error.between(got, aims))
                done()
        self.alone |= zip(wanted, errors, strict=True)

    def kernel_bytes(self, kernel: Kernel, num_bits: int) -> int:
        """Return the bytes of a kernel in files, once for each step that has it."""
        size = self._own_kernels[kernel.steps[0]].size
        return len(kernel.steps) * bytes_of(size, num_bits)

    def error(self, widths: Mapping[Kernel, int]) -> Error:
        """Return the error of the outputs of the quantized model, with kernels of other widths."""
        total = Error()
        for got, aims in zip(self.outputs(widths), self.outputs(None), strict=True):
            total = total.plus(Error.between(got, aims))
        return total

    def outputs(self, widths: Mapping[Kernel, int] | None) -> Iterator[list[jax.Array]]:
        """Yield the outputs of each batch, with kernels of other widths; None: in float."""
        version = self._real if widths is None else self._with_kernels(self._exact, widths)
        for stages, arrays in self._data:
            yield stages.finish(0, version, stages.start(arrays))

    def _with_kernels(self, version: Version, widths: Mapping[Kernel, int]) -> Version:
        """Return a version with kernels on grids of other widths."""
        taken = {n: self._rounded(bits)[n] for kernel, bits in widths.items() for n in kernel.steps}
        return version._replace(kernels={**version.kernels, **taken})

    @property
    def config(self) -> SimQATConfig:
        """The quantized model's configuration."""
        return self._call.qmodule.config

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Every quantizer of a tensor or kernel that is measured, in order of evaluation."""
        placement, names = self.stages.placement, self.stages.tensors
        result = {names[v]: placement.at[v] for v in self.stages.layers.inputs}
        for step in placement.steps:
            if step.node in placement.weights:
                quantizer = placement.weights[step.node]
                result.setdefault(quantizer.name, quantizer)
            for v in (v for node in step.nodes for v in node.outputs if v in names):
                result.setdefault(names[v], placement.at[v])
        return result

    def _found_kernels(self) -> tuple[Kernel, ...]:
        placement, steps = self.stages.placement, dict[Quantizer, list[int]]()
        for number, step in enumerate(placement.steps):
            if step.node in placement.weights:
                steps.setdefault(placement.weights[step.node], []).append(number)
        return tuple(Kernel(quantizer, tuple(numbers)) for quantizer, numbers in steps.items())

    def _alone(self, batch: _Batch, known: _Known, layer: int) -> Alone:
        stages, layers = batch.stages, batch.stages.layers
        first = stages.first[layer]
        quantized = self._real.with_layer_of(self._exact, layer, layers)
        real = self._exact.with_layer_of(self._real, layer, layers)
        return Alone(
            Error.between(stages.finish(first, quantized, known.real[first]), known.aims),
            Error.between(stages.finish(first, real, known.exact[first]), known.aims),
        )

    def _walked(self, batch: _Batch) -> tuple[_Known, Summaries]:
        """Run both models stage by stage."""
        stages, found = batch.stages, Summaries()
        real, exact = [stages.start(batch.arrays)], [stages.start(batch.arrays)]
        for stage in range(len(stages)):
            after, measures = stages.compare(
                stage, (self._real, self._exact), (real[-1], exact[-1])
            )
            real.append(after[0])
            exact.append(after[1])
            found = joined(found, measures)
        aims, got = ([tensors[v] for v in stages.outputs] for tensors in (real[-1], exact[-1]))
        return _Known(real, exact, aims, got), found

    def _rounded(self, num_bits: int | None) -> Mapping[int, jax.Array]:
        """Return the kernels on grids of a width; None: of each one's own."""
        if num_bits not in self._widths:
            arguments = self.stages.placement, self._stats, self._own_kernels
            self._widths[num_bits] = kernels.rounded(*arguments, num_bits)
        return self._widths[num_bits]

    def _planned(self, args: tuple, leaves: int) -> _Batch:
        """Plan the call of a batch; batches of one shape share its stages."""
        arrays, key = self._call.arrays(args)
        if key not in self._plans:
            self._plans[key] = Stages(*self._call.observed(self._variables, args), leaves)
        return _Batch(self._plans[key], arrays)

    def _check(self) -> None:
        """Raise ValueError for calls that have not the same layers, or nothing to judge by."""
        if not self.stages.outputs:
            raise ValueError(
                "analyze: this call returns no floating-point array for each example, by which a "
                "model could be judged. Pass method= one that returns logits or features."
            )
        names = {(batch.stages.layers.names, batch.stages.layers.steps) for batch in self._data}
        if len(names) > 1:
            raise ValueError(
                "analyze: the model computes otherwise for batches of another shape. Give all "
                "batches one shape: leave out a smaller last one."
            )


def _check_finite(number: int, found: Summaries, error: Error) -> None:
    """Raise ValueError if one of the models made NaN or Inf of a batch."""
    broken = next((name for name, value in found.items() if value.nonfinite), None)
    if broken is None and not np.isfinite(error.signal):
        broken = "an output of the float model"
    if broken is not None:
        raise ValueError(
            f"analyze: {broken} holds NaN or Inf in batch {number} (batches are numbered from 0). "
            "Look at the data, and at the parameters if it is finite."
        )
    if not np.isfinite(error.noise):
        raise ValueError(
            f"analyze: the quantized model makes NaN or Inf of batch {number} (batches are "
            "numbered from 0), and the float model does not. Look at the parameters in variables."
        )
