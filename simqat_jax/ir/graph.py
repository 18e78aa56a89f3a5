"""A model seen as a graph: tensors are numbers, nodes are layers and functional operations."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.numerics.contraction import Sums, summed_axes
from simqat_jax.numerics.requantize import FREE, Bounds

V = TypeVar("V")


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An operand that is a constant of the model."""

    value: ArrayLike


CONTRACTIONS = ("dot_general", "conv_general_dilated")
"""What multiplies two tensors and sums: convolutions and matrix products."""
Operand = int | Constant
"""A tensor, by its number, or a constant."""


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """An operation with parameters.

    Attributes:
      module: the Flax layer, unbound, as the model constructed it; None: it is written by hand.
      path: what its quantizers are named after: where it sits in the model.
      names: what each input after the first is: "kernel", "bias", "mean" ...
    """

    module: nn.Module | None
    path: tuple[str, ...]
    names: tuple[str, ...] = ()

    def named(self, values: Sequence[V]) -> dict[str, V]:
        """Name the values of the inputs after the first."""
        return dict(zip(self.names, values, strict=True))


def shape_of(v: core.Var | core.Literal) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of an operand or a result of an equation."""
    aval: Any = v.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def gathered_axes(eqn: core.JaxprEqn) -> tuple[int, ...] | None:
    """Return the axes at which a gather picks, in the order of its indices; None: it picks parts.

    What it picks is whole along all other axes.
    """
    x, numbers = shape_of(eqn.invars[0]).shape, eqn.params["dimension_numbers"]
    axes = tuple(map(int, numbers.start_index_map))
    sizes = tuple(1 if k in axes else d for k, d in enumerate(x))
    collapses = tuple(numbers.collapsed_slice_dims) == tuple(sorted(axes))
    whole = collapses and tuple(eqn.params["slice_sizes"]) == sizes
    return axes if whole and not numbers.operand_batching_dims else None


def gathered_axis(eqn: core.JaxprEqn) -> int | None:
    """Return the axis along which a gather picks, as `jnp.take` does; None: it picks otherwise."""
    axes = gathered_axes(eqn)
    if axes is None or len(axes) != 1:
        return None
    (axis,), (x, indices) = axes, (shape_of(v).shape for v in eqn.invars)
    lead = len(indices) - 1
    usual = (*range(axis), *range(axis + lead, len(x) - 1 + lead))
    return axis if eqn.params["dimension_numbers"].offset_dims == usual else None


@dataclasses.dataclass(frozen=True)
class Remat:
    """A call of `nn.remat`.

    Attributes:
      number: which one, in order of the calls.
      policy: what may be kept for the backward pass, as `jax.checkpoint` takes it.
      prevent_cse: as `jax.checkpoint` takes it.
    """

    number: int
    policy: Callable[..., bool] | None = dataclasses.field(compare=False)
    prevent_cse: bool = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """One operation: `outputs = run(*inputs)`. Its class says what it is.

    Attributes:
      op: its name, for display and in the names of quantizers; nothing else depends on it.
      path: of the module that it belongs to.
      inputs: its operands.
      outputs: the tensors that it makes.
      run: computes them.
      eqn: what it was captured as; of a mean, its sum.
      layer: the Flax layer that it is; None for a functional operation.
      remat: the call of `nn.remat` that it is inside of.
      effects: whether it does more than return values: `jax.debug.print`.
      parts: what it was merged from; empty: nothing.
      kind: what a plan calls its class; nothing else depends on it.
    """

    op: str
    path: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    run: Callable[..., Sequence[jax.Array]]
    eqn: core.JaxprEqn
    layer: Layer | None = None
    remat: Remat | None = None
    effects: bool = False
    parts: tuple["Node", ...] = ()
    kind: str = "float"

    pointwise: ClassVar[bool] = False
    """Whether it may be part of a function of each element of one tensor."""

    @property
    def only_training(self) -> bool:
        """Whether it computes as in training and has no meaning in evaluation."""
        return False

    @property
    def primitive(self) -> str:
        """The name of the operation that it was captured as."""
        return self.eqn.primitive.name

    @property
    def where(self) -> str:
        """Its path, for messages; of an operation of the model itself, its name."""
        return "/".join(self.path) or self.op

    @property
    def numbers(self) -> tuple[Operand, ...]:
        """The inputs that are computed with, not masks or indices."""
        return self.inputs

    def data_inputs(self, data: frozenset[int]) -> tuple[int, ...]:
        """The tensors among the inputs that depend on the model's inputs."""
        return tuple(v for v in self.inputs if isinstance(v, int) and v in data)

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """Those among them that are computed with, not masks or indices."""
        return self.data_inputs(data)


N = TypeVar("N", bound=Node)


def as_kind(kind: type[N], node: Node, /, **changes: Any) -> N:
    """Return an operation as one of another class, with changes."""
    shared = {f.name: getattr(node, f.name) for f in dataclasses.fields(Node) if f.name != "kind"}
    return kind(**{**shared, **changes})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Float(Node):
    """What has no integer form.

    Attributes:
      why: the reason, for display.
      excluded_by: the place of the rule that leaves it float; None: there is no need for one.
    """

    why: str = "no integer form"
    excluded_by: int | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Contraction(Node):
    """A convolution or matrix product of two tensors, as captured.

    Attributes:
      module: the Flax layer that makes it; None: it is written by hand.
    """

    module: nn.Module | None = None

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.primitive == "conv_general_dilated"

    @property
    def summed_length(self) -> int:
        """The length of the longest axis that is summed over, without windows; 1: there is none."""
        shape = shape_of(self.eqn.invars[1]).shape
        axes = summed_axes(self.primitive, self.eqn.params, shape)
        return 1 if axes is None else shape[axes[1]]

    def multiplied(self, sums: Sums, x: jax.Array, y: jax.Array, how: Any) -> list[jax.Array]:
        """Multiply whole numbers with a function of `numerics.contraction`; `how`: its last one."""
        return sums(self.primitive, self.eqn.params, x, y, how)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """What multiplies data by a kernel, its second input, and adds a bias, its third if any.

    The kernel is whatever does not depend on the model's arguments. Its output channels are its
    last axes: those of a convolution are (spatial ..., in, out).

    Attributes:
      kernel_name: of the kernel's quantizer.
      counted: it has no parameter or layer to be named after, and is told by its place.
      channel_axes: the axes of the product that the output channels are, in order.
      features: their lengths.
      before: what happens to the data first: it is reshaped, or padded with zeros.
      contraction: the convolution or matrix product itself.
      order: in which order the axes of its result are taken, before a last reshape.
      shape: of the output.
    """

    layer: Layer = dataclasses.field()
    kind: str = dataclasses.field()
    kernel_name: str
    counted: bool
    channel_axes: tuple[int, ...]
    features: tuple[int, ...]
    before: tuple[Node, ...]
    contraction: Contraction
    order: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_channels(self) -> int:
        """The number of output channels."""
        return math.prod(self.features)

    @property
    def channels_last(self) -> bool:
        """Whether the output channels are the last axis of the output, and nothing else is."""
        return self.channel_axes == (len(self.shape) - 1,)

    def multiplied(self, sums: Sums, x: jax.Array, kernel: jax.Array, how: Any) -> list[jax.Array]:
        """Multiply whole numbers, see `Contraction.multiplied`."""
        for node in self.before:
            fixed = [jnp.asarray(v.value, x.dtype) for v in node.inputs if isinstance(v, Constant)]
            x = node.eqn.primitive.bind(x, *fixed, **node.eqn.params)
        products = self.contraction.multiplied(sums, x, kernel, how)
        return [product.transpose(self.order).reshape(self.shape) for product in products]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(Node):
    """A BatchNorm layer.

    Attributes:
      training: it uses batch statistics and returns new running ones.
    """

    layer: Layer = dataclasses.field()
    training: bool
    kind: str = "batch_norm"

    @property
    def only_training(self) -> bool:
        """Whether it uses batch statistics."""
        return self.training

    @property
    def module(self) -> nn.BatchNorm:
        """The layer."""
        assert isinstance(self.layer.module, nn.BatchNorm)
        return self.layer.module

    @property
    def axes(self) -> tuple[int, ...]:
        """Its feature axes, none of them negative."""
        axes = (self.module.axis,) if isinstance(self.module.axis, int) else self.module.axis
        return tuple(axis % self._rank for axis in axes)

    def is_variance(self, var: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """Tell of each channel whether its variance has a standard deviation."""
        return var + self.module.epsilon > 0

    @property
    def on_last_axis(self) -> bool:
        """Whether its features are the channels of a layer."""
        return self.axes == (self._rank - 1,)

    @property
    def _rank(self) -> int:
        return shape_of(self.eqn.outvars[0]).ndim


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Add(Node):
    """A sum or difference of two tensors."""

    kind: str = "add"
    pointwise: ClassVar[bool] = True

    @property
    def subtracts(self) -> bool:
        """Whether it is a difference."""
        return self.primitive == "sub"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Mul(Node):
    """A product of two tensors, element by element."""

    kind: str = "mul"
    pointwise: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Mean(Node):
    """A sum along axes or over windows, and maybe a division behind it.

    Attributes:
      divisor: by what.
    """

    divisor: Operand | None = None
    kind: str = "mean"

    def divided(
        self, division: Node, inputs: tuple[Operand, ...], run: Callable[..., Sequence[jax.Array]]
    ) -> "Mean":
        """Return this sum and the division by a constant behind it as one.

        Args:
          division: the division.
          inputs: those of this sum, and the divisor.
          run: computes both.
        """
        windows = self.primitive == "reduce_window_sum"
        return as_kind(
            Mean,
            division,
            op="avg_pool" if windows else "mean",
            inputs=inputs,
            run=run,
            divisor=inputs[-1],
            eqn=self.eqn,
            parts=(self, division),
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """A concatenation or stack of tensors."""

    kind: str = "concat"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Extremum(Node):
    """The larger, or the smaller, of two tensors, element by element."""

    kind: str = "extremum"
    pointwise: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Position(Node):
    """Where along an axis a tensor is highest, or lowest: argmax and argmin."""

    kind: str = "position"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Node):
    """A function of each element of one tensor, and of scalars."""

    kind: str = "elementwise"
    pointwise: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Clamp(Node):
    """A relu, relu6 or clip.

    Attributes:
      bounds: what it clamps to, real units.
    """

    bounds: Bounds = FREE
    kind: str = "clamp"
    pointwise: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Move(Node):
    """What moves values without changing them: reshape, max_pool, slicing."""

    kind: str = "pass"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dropout(Move):
    """An active dropout: it keeps the grid of its input for the next layer, not its codes."""

    @property
    def only_training(self) -> bool:
        """It does: evaluation drops nothing."""
        return True


class Unquantizable(NamedTuple):
    """A product that cannot be quantized, and why."""

    path: tuple[str, ...]
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model call, flattened.

    Attributes:
      nodes: in the order of evaluation.
      inputs: one tensor per flattened input of the call (variables, arguments, random keys).
      input_names: for a floating-point argument its name ("input", "input/0"); None otherwise.
      outputs: operands, one per flattened output.
      returned: how many of the outputs the model returns; the others are state that it keeps.
      avals: shape and dtype of every tensor.
      data: the tensors that depend on the arguments or on random keys.
      arguments: the inputs that are arguments of the call.
      keys: the inputs that are random keys, typed or plain numbers; arguments may be among them.
      parameters: for each input that is a parameter its path in "params"; for the slice of one that
        a layer of a loop has, with its number.
      trained: the path of each input that is a parameter or statistic, collection first.
      unquantizable: the products that cannot be quantized.
      exact: the tensors that are read as they are, and lie on no grid.
      far: the tensors with known numbers beside which a grid has no digits for others.
      repeated: of what the steps of a loop make again, which tensor it is: the same in every step.
      carried: what such loops start from.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    input_names: tuple[str | None, ...]
    outputs: tuple[Operand, ...]
    returned: int
    avals: dict[int, jax.ShapeDtypeStruct]
    data: frozenset[int]
    arguments: tuple[int, ...]
    keys: frozenset[int]
    parameters: Mapping[int, tuple[str, ...]]
    trained: Mapping[int, tuple[str, ...]]
    unquantizable: tuple[Unquantizable, ...]
    exact: frozenset[int] = frozenset()
    far: frozenset[int] = frozenset()
    repeated: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    carried: frozenset[int] = frozenset()

    @property
    def batch(self) -> int | None:
        """The first length that all arrays among the arguments have in common."""
        shapes = [self.avals[v].shape for v in self.inputs if v in self.data - self.keys]
        lengths = {shape[0] for shape in shapes if shape}
        return lengths.pop() if len(lengths) == 1 else None

    def activations(self) -> set[int]:
        """Return the outputs that are activations: one value or more for each example.

        State that a model keeps is none, nor is a loss, which has no batch axis. Where no output
        has it, the model works on single examples, and what is more than a number counts.
        """
        batch = self.batch
        returned = {v for v in self.outputs[: self.returned] if isinstance(v, int)}
        batched = {v for v in returned if batch is None or batch in self.avals[v].shape}
        return batched or {v for v in returned if self.avals[v].shape}

    def read_trained(self) -> dict[int, tuple[str, ...]]:
        """Return the path of each parameter and statistic, real numbers, that a node reads."""
        read = {v for node in self.nodes for v in node.inputs}
        found = {v: path for v, path in self.trained.items() if v in read}
        return {v: p for v, p in found.items() if jnp.issubdtype(self.avals[v].dtype, jnp.floating)}

    def readers(self) -> dict[int, list[Node]]:
        """Return the nodes that read each tensor."""
        result: dict[int, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for v in dict.fromkeys(v for v in node.inputs if isinstance(v, int)):
                result[v].append(node)
        return result
