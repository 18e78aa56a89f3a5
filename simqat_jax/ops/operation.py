"""The interface of an operation: all that must agree about it, in one object."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir.graph import BatchNorm, Graph, Node
from simqat_jax.ir.plan import Placement, Quantizer, Slot, Step
from simqat_jax.ir.program import Context, Need, Op, Shape
from simqat_jax.ir.program_builder import ProgramBuilder
from simqat_jax.numerics.affine import along_channel, quant_params, quantize
from simqat_jax.numerics.grid import Codes, Grid, QuantizeKernel, grid_of_range
from simqat_jax.numerics.observers import Range
from simqat_jax.numerics.requantize import FREE, Bounds, clamped, code_bounds, scaled
from simqat_jax.numerics.rounding import Rounding
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.ops.shared import SharedLayers

Clamp = tuple[int, int]
"""The lowest and highest code of an operation's output."""


class Demand(NamedTuple):
    """Which inputs of an operation should lie on grids.

    Attributes:
      needed: must, because it or what reads it computes with their codes.
      wanted: would help, because they lead to an output of the model.
    """

    needed: Sequence[int] = ()
    wanted: Sequence[int] = ()


class Situation(NamedTuple):
    """Where an operation stands when quantizers are placed.

    Attributes:
      inputs: how many of its inputs depend on the data.
      on_grid: all of these lie on grids.
      needed: something computes with the codes of its output.
      wanted: its output leads to an output of the model.
      per_channel: activations have a grid for each channel.
    """

    inputs: int
    on_grid: bool
    needed: bool
    wanted: bool
    per_channel: bool


class Operation:
    """What a kind of node is on integers; by itself: nothing, it stays float."""

    fuses_clamp = False
    """Whether a relu or clip behind it is computed with it."""
    shares_grid = False
    """Whether its inputs and its output have one grid."""
    quantizes_constants = False
    """Whether operands that do not depend on the data get quantizers."""

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        """Tell which of the inputs that depend on the data should lie on grids."""
        del data, needed, wanted
        return Demand()

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        """Whether the node runs on integers once converted."""
        del node, situation
        return False

    def refusal(self, node: Node) -> str | None:
        """Say why a node that asks for integers cannot have them; None: nothing is wrong."""
        del node
        return None

    def carries_grid(self, node: Node, graph: Graph, *, per_channel: bool) -> bool:
        """Whether values leave the node as they came, so that the first input's grid stays."""
        del node, graph, per_channel
        return False

    def counts(self, step: Step, placement: Placement) -> bool:
        """Whether a step makes integers of codes: no grid holds them, but nothing is float."""
        del step, placement
        return False

    def form(self, step: Step) -> str:
        """Say what a step on integers becomes, where its name does not."""
        del step
        return ""

    def codes(self, at: "ExactStep") -> "jax.Array | Everywhere | None":
        """Compute the codes of a quantized step from those of its inputs.

        Returns:
          Centered codes, float32, NaN where the step has no exact integer form, as where int32 does
          not hold a sum; None where it has none anywhere.
        """
        del at
        return None

    def lower(self, at: "LoweredStep") -> bool:
        """Add what computes a step on integers to the program.

        Returns:
          False where the step has no exact integer form: nothing was added, it stays float.
        """
        del at
        return False

    def move(self, at: "LoweredStep") -> None:
        """Add what computes a step that carries its input's grid to the program."""
        raise NotImplementedError(type(self).__name__)


class IntegerOperation(Operation):
    """An operation that runs on integers where its inputs are codes or something needs its own."""

    def joins(self, inputs: int) -> bool:
        """Whether it puts all of its inputs on grids once something needs its output."""
        del inputs
        return False

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        if needed and self.joins(len(data)):
            return Demand(needed=data)
        return Demand(wanted=data if wanted else ())

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        if self.joins(situation.inputs) and situation.needed:
            return True
        return situation.on_grid and (situation.needed or situation.wanted)


class SharedGridOperation(IntegerOperation):
    """An operation whose tensors all lie on one grid: there is nothing to rescale."""

    shares_grid = True

    def joins(self, inputs: int) -> bool:
        return True

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        return not situation.per_channel and super().is_quantized(node, situation)


class Everywhere(NamedTuple):
    """Codes that are nowhere NaN, so that evaluation need not compute the step in float as well."""

    codes: jax.Array
    """Centered, float32."""


@dataclasses.dataclass(frozen=True)
class ExactStep:
    """A quantized step in evaluation, with one grid for each of its tensors.

    Attributes:
      step: the step.
      inputs: the codes of each of its inputs; None for one that is no tensor on a grid.
      reals: each of its inputs in real units.
      layers: for each layer of the step its parameters and statistics, by name, real units.
      grid: the output's.
      rounding: whose rounding to mirror.
      quantize_kernel: quantizes a kernel.
    """

    step: Step
    inputs: Sequence[Codes | None]
    reals: Sequence[jax.Array]
    layers: Sequence[Mapping[str, jax.Array]]
    grid: Grid
    rounding: Rounding
    quantize_kernel: QuantizeKernel

    def operands(self) -> Sequence[Codes] | None:
        """Return the codes of all inputs, None where one has none."""
        known = [v for v in self.inputs if v is not None]
        return known if len(known) == len(self.inputs) else None

    def clamped(self, centered: jax.Array) -> jax.Array:
        """Clip whole numbers, `code - zero_point`, to the output's grid and the fused clamp."""
        return clamped(centered, self.grid, bounds_of(self.step))

    def requantized(self, sums: jax.Array, multiplier: jax.Array) -> jax.Array:
        """Scale integer sums to the output's grid."""
        return self.clamped(scaled(sums, multiplier))


def bounds_of(step: Step) -> Bounds:
    """Return what the clamp behind a step clamps to."""
    return step.clamp.bounds if step.clamp else FREE


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step on its way into the program.

    Attributes:
      step: the step.
      placement: the planned model.
      builder: the program.
      ranges: the range of each quantizer with a state, by name.
      shared: computes the arrays of layers.
    """

    step: Step
    placement: Placement
    builder: ProgramBuilder
    ranges: Mapping[str, Range]
    shared: SharedLayers

    @property
    def node(self) -> Node:
        """The operation."""
        return self.step.node

    @property
    def path(self) -> str:
        """What the program's operations call it."""
        layer = self.node.layer
        return "/".join(layer.path) if layer and layer.path else self.node.where

    # Grids -----------------------------------------------------------------------------------

    def grid_of(self, quantizer: Quantizer) -> Grid:
        """Return the grid of a quantizer with a state, in numbers."""
        lo, hi = (float(np.asarray(end)) for end in self.ranges[quantizer.name])
        return _concrete_grid(lo, hi, quantizer.spec)

    def in_grid(self, position: int = 0) -> Grid:
        """Return the grid of an input that depends on the data."""
        v = self.node.inputs[position]
        assert isinstance(v, int)
        return self.grid_of(self.placement.grids[v])

    @property
    def out_grid(self) -> Grid:
        """The output's grid."""
        return self.grid_of(self.placement.grids[self.step.output])

    @property
    def clamp(self) -> Clamp:
        """The output's lowest and highest code."""
        lo, hi = code_bounds(bounds_of(self.step), self.out_grid)
        return int(jnp.asarray(lo)), int(jnp.asarray(hi))

    # Operands --------------------------------------------------------------------------------

    def input(self, position: int = 0) -> int:
        """Return the tensor of an input that depends on the data."""
        return self.builder.number(self.node.inputs[position])

    def operand(self, position: int) -> int:
        """Return the tensor of an input; put a constant on its grid."""
        v = self.node.inputs[position]
        quantizer = self.placement.constants.get(Slot(self.step, position))
        if quantizer is None or self.builder.is_data(v):
            return self.builder.number(v)
        value = jnp.asarray(self.builder.value(v), jnp.float32)
        if quantizer.has_state:
            grid = self.grid_of(quantizer)
        else:
            ends = quantizer.observer.present_range(value)
            grid = concrete(grid_of_range(*ends, quantizer.spec))
        codes = quantize(value, *grid.params, grid, None)
        array = np.asarray(codes).astype(grid.dtype)
        return self.builder.constant(quantizer.name, self.builder.shape(v), array, "float32", grid)

    def mask(self, position: int) -> int:
        """Return the tensor of an input that is no number; a constant is as short as it may be."""
        v = self.node.inputs[position]
        if self.builder.is_data(v):
            return self.builder.number(v)
        value = thinnest(self.builder.held(v))
        name, dtype = f"{self.path}/mask", str(value.dtype)
        return self.builder.add(name, value.shape, dtype, None, value)

    def layer_values(self) -> list[dict[str, jax.Array]]:
        """Return the parameters and statistics of each layer of the step, by name.

        Raises:
          ValueError: NaN or Inf among them.
        """
        return [self._layer_values(node) for node in self.step.nodes if node.layer is not None]

    def layer_operands(self) -> list[dict[str, ArrayLike]]:
        """Return what `layer_values` checks, as the model holds it."""
        value = self.builder.value
        nodes = [(node, node.layer) for node in self.step.nodes if node.layer is not None]
        return [layer.named(list(map(value, node.inputs[1:]))) for node, layer in nodes]

    def _layer_values(self, node: Node) -> dict[str, jax.Array]:
        assert node.layer is not None
        values = node.layer.named([jnp.asarray(self.builder.value(v)) for v in node.inputs[1:]])
        for name, value in values.items():
            below = " or values below zero" if name == "var" else ""
            numbers = np.asarray(value)
            if below and isinstance(node, BatchNorm):
                numbers = np.where(node.is_variance(numbers), numbers, np.nan)
            if not np.all(np.isfinite(np.asarray(numbers, np.float32))):
                raise ValueError(
                    f"{'/'.join(node.path)}: its {name} holds NaN or Inf{below}. Train again from "
                    "a checkpoint without."
                )
        return values

    def check_unit(self, x_scale: float | jax.Array, scale: np.ndarray | jax.Array) -> None:
        """Raise ValueError where float32 does not hold every digit of a product of scales.

        Runtimes take such a product for zero, or compute with fewer digits.
        """
        x, least = np.float32(x_scale), np.min(np.asarray(scale, np.float32))
        if x * least < np.finfo(np.float32).tiny:
            raise ValueError(
                f"{self.path}: its input counts in units of {x:.3g} and what it is multiplied by "
                f"in units of {least:.3g}, and float32 does not hold their product. Scale the "
                "values in front of the model, so that they are near 1."
            )

    # Operations of the program ---------------------------------------------------------------

    def output(self, v: int, kind: str, grid: Grid | None) -> int:
        """Add the tensor that leaves the step, under its quantizer's name if it has one."""
        quantizer = self.placement.at.get(v)
        name = quantizer.name if quantizer else f"{self.path}/{kind}"
        return self.builder.tensor(name, v, grid)

    def emit(
        self, op: type[Op], inputs: Sequence[int], v: int | None = None, /, **fields: Any
    ) -> None:
        """Add an operation whose output is a tensor of the graph, by default the step's.

        Args:
          op: its class.
          inputs: numbers of the tensors that it reads.
          v: the tensor of the graph.
          fields: the other fields of its class.
        """
        v = self.step.output if v is None else v
        grid = self.grid_of(self.placement.grids[v])
        name = fields.get("kind") or op.kinds[0]
        outputs = (self.output(v, name, grid),)
        held = {k: np.asarray(a) for k, a in fields.pop("arrays", {}).items()}
        common = {"path": self.path, "inputs": tuple(inputs), "outputs": outputs, "arrays": held}
        self.builder.ops.append(op(**common, **fields))

    def between(
        self,
        op: type[Op],
        source: int | tuple[int, ...],
        shape: Shape,
        grid: Grid,
        /,
        **fields: Any,
    ) -> int:
        """Add an operation whose output is none of the graph; return that output's number."""
        dtype = str(self.builder.graph.avals[self.step.output].dtype)
        target = self.builder.add("/".join(self.node.path), shape, dtype, grid)
        path, inputs = "/".join(self.node.path), (source,) if isinstance(source, int) else source
        self.builder.ops.append(op(path=path, inputs=inputs, outputs=(target,), **fields))
        return target

    def shape_of(self, number: int) -> Shape:
        """Return the shape of a tensor of the program."""
        return self.builder.tensors[number].shape


@functools.lru_cache(maxsize=4096)
def _concrete_grid(lo: float, hi: float, spec: QuantSpec) -> Grid:
    """Return the grid on a range of float32 numbers; layers ask for each again and again."""
    scale, zero_point = _params(np.float32(lo), np.float32(hi), spec)
    return Grid(float(scale), int(zero_point), spec.qmin, spec.qmax)


_params = jax.jit(quant_params, static_argnums=2)


def concrete(grid: Grid) -> Grid:
    """Return a grid whose scale and zero point are numbers."""
    return Grid(float(grid.scale), int(grid.zero_point), grid.qmin, grid.qmax)


def requantize(c: Context, sums: jax.Array, clamp: Sequence[int]) -> jax.Array:
    """Scale integer sums to the output's grid, with the operation's multiplier.

    That is one number, one for each channel, or an array that broadcasts to the sums.
    """
    multiplier = c.arrays["multiplier"]
    if np.ndim(multiplier) < 2:
        multiplier = on_last_axis(multiplier, sums)
    return c.grid.from_float(scaled(sums, multiplier), clamp)


ONE_MULTIPLIER = {"multiplier": Need(("float32",), ())}
"""What scales all sums of an operation alike."""


def of_channels(kernel: Need, count: int) -> dict[str, Need]:
    """Return what the arrays of a layer have to be; `count`: of output channels."""
    scale, bias = Need(("float32",), (count,)), Need(("int32",), (count,))
    return {"kernel": kernel, "scale": scale, "bias": bias, "multiplier": scale}


def on_last_axis(v: jax.Array, x: jax.Array) -> jax.Array:
    """Reshape `(C,)` so that it broadcasts along the last axis of `x`."""
    return along_channel(v, x.ndim, -1)


def thinnest(value: ArrayLike) -> np.ndarray:
    """Return an array of length 1 along the axes that it is the same along, such as the batch."""
    array = np.asarray(value)
    for axis, stride in enumerate(array.strides):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and (stride == 0 or _repeats(array, first)):
            array = first
    return array


def _repeats(array: np.ndarray, part: np.ndarray) -> bool:
    """Whether an array repeats a part, whose numbers may be none (NaN)."""
    return array.tobytes() == np.broadcast_to(part, array.shape).tobytes()
