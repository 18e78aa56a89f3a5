"""Decide what is quantized: one quantizer per tensor, at its producer."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from simqat_jax.config import QuantSpec, SimQATConfig
from simqat_jax.graph import LAYER_KINDS, Graph, Node, consumers

_FUSES_CLAMP = (*LAYER_KINDS, "batch_norm", "add", "mul", "mean")
_MOVES_CHANNELS = ("transpose", "rev", "gather", "broadcast", "max", "min", "reduce_window_max")


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """One quantizer and the name of its state in `quant_stats`.

    Attributes:
      name: "Conv_0/kernel", "Conv_0/output", "Block_0/add/output", "input".
      spec: grid and observer.
      num_channels: entries of its range, None for one per tensor.
      nonnegative: the tensor holds nothing below zero (a ReLU's output), so that its range starts
        at zero and its zero point is the lowest code.
      role: what it quantizes. A constant, and a weight under the observer "batch", take the range
        of the values at hand and keep no state.
    """

    name: str
    spec: QuantSpec
    num_channels: int | None
    role: Literal["activation", "weight", "constant"]
    nonnegative: bool = False

    @property
    def has_state(self) -> bool:
        """Whether `quant_stats` holds a range of this name."""
        return self.role == "activation" or (
            self.role == "weight" and self.spec.observer != "batch"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A node with what is fused behind it, evaluated as one.

    Attributes:
      node: the operation.
      batch_norm: the BatchNorm behind a Conv or Dense.
      clamp: the ReLU, ReLU6 or clip behind it.
      output: the tensor that leaves the step (of several, the first).
      quantized: whether it runs on integers once converted.
    """

    node: Node
    batch_norm: Node | None
    clamp: Node | None
    output: int
    quantized: bool = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The operation and what is fused behind it."""
        return tuple(n for n in (self.node, self.batch_norm, self.clamp) if n is not None)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """The result of planning.

    Attributes:
      graph: the model.
      steps: its nodes, grouped, in the order of evaluation.
      at: the tensors that are quantized, each with its quantizer.
      grids: every tensor that lies on an integer grid, with the quantizer that set the grid.
      weights: the kernel quantizer of each layer path.
      constants: the quantizer of each constant operand, by (step, input position).
      unquantizable: module path and reason of what stays float although it should not.
    """

    graph: Graph
    steps: tuple[Step, ...]
    at: dict[int, Quantizer]
    grids: dict[int, Quantizer]
    weights: dict[tuple[str, ...], Quantizer]
    constants: dict[tuple[Step, int], Quantizer]
    unquantizable: tuple[tuple[str, str], ...]

    @property
    def numbered(self) -> frozenset[str]:
        """The names of quantizers that count operations: "Block_0/add/output", the first add."""
        return frozenset(
            self.grids[step.output].name
            for step in self.steps
            if step.node.layer is None and (step.quantized or step.output in self.at)
        )

    @property
    def shared(self) -> frozenset[str]:
        """The names of quantizers that several tensors have in common."""
        counts = Counter(q.name for q in (*self.at.values(), *self.constants.values()))
        return frozenset(name for name, count in counts.items() if count > 1)

    @property
    def stateful(self) -> dict[str, Quantizer]:
        """Every quantizer with a range in `quant_stats`, by name, in order of evaluation."""
        everything = (*self.at.values(), *self.weights.values())
        return {q.name: q for q in everything if q.has_state}


def _group(graph: Graph) -> list[Step]:
    """Fuse BatchNorm and clamp behind the operation whose only reader they are."""
    readers = consumers(graph.nodes)
    taken: set[Node] = set()
    steps: dict[Node, Step] = {}

    def only_reader(node: Node, kinds: Sequence[str]) -> Node | None:
        out = node.outputs[0]
        users = readers[out]
        fits = len(users) == 1 and users[0].kind in kinds and out not in graph.outputs
        return users[0] if fits and users[0].remat == node.remat else None

    for node in graph.nodes:
        if node in taken:
            continue
        norm = None
        if node.kind in LAYER_KINDS and _one_norm_channel_each(node):
            norm = only_reader(node, ("batch_norm",))
        if norm is not None and (norm.inputs[0] != node.outputs[0] or not _last_axis(graph, norm)):
            norm = None
        last = norm or node
        clamp = only_reader(last, ("clamp",)) if node.kind in _FUSES_CLAMP else None
        step = Step(node, norm, clamp, (clamp or last).outputs[0])
        taken.update(step.nodes)
        steps[step.nodes[-1]] = step
    # A step runs where its last node did: by then every operand of its nodes is known.
    return [steps[node] for node in graph.nodes if node in steps]


def _last_axis(graph: Graph, norm: Node) -> bool:
    assert norm.layer is not None
    ndim = len(graph.avals[norm.outputs[0]].shape)
    return [axis % ndim for axis in _feature_axes(norm.layer.module)] == [ndim - 1]


def _feature_axes(module: Any) -> tuple[int, ...]:
    return (module.axis,) if isinstance(module.axis, int) else tuple(module.axis)


def _one_norm_channel_each(node: Node) -> bool:
    """Whether the output channels of a layer are the channels of a BatchNorm behind it."""
    module: Any = node.layer and node.layer.module
    return isinstance(module.features, int) or len(module.features) == 1


class _Namer:
    """Gives each quantizer a name of its own."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def unique(self, stem: str, leaf: str = "") -> str:
        """Return `stem` and `leaf`, with a number behind `stem` from the second time on."""
        numbers = ("", *(f"_{n}" for n in range(1, len(self.used) + 1)))
        name = next(n for n in (stem + k + leaf for k in numbers) if n not in self.used)
        self.used.add(name)
        return name


class _Planner:
    def __init__(self, graph: Graph, config: SimQATConfig):
        self.graph = graph
        self.config = config
        self.steps = _group(graph)
        self.namer = _Namer()
        self.demanded: set[int] = set()
        self.wanted = {v for v in graph.outputs if isinstance(v, int)}
        self.at: dict[int, Quantizer] = {}
        self.grids: dict[int, Quantizer] = {}
        self.weights: dict[tuple[str, ...], Quantizer] = {}
        self.constants: dict[tuple[Step, int], Quantizer] = {}
        self.shared: dict[Quantizer, Quantizer] = {}
        self.unquantizable = [("/".join(path), reason) for path, reason in graph.unquantizable]

    # Backwards: which tensors must lie on a grid --------------------------------------------

    def floating(self, v: int) -> bool:
        return bool(jnp.issubdtype(self.graph.avals[v].dtype, jnp.floating))

    def data(self, step: Step) -> tuple[int, ...]:
        return step.node.data_inputs(self.graph.data)

    def joins(self, step: Step) -> bool:
        """Whether the step puts all of its inputs on grids once something needs its output."""
        kind, count = step.node.kind, len(self.data(step))
        return kind in ("mean", "concat") or (kind in ("add", "mul") and count > 1)

    def mark_demand(self) -> None:
        """Mark what layers need on a grid (`demanded`), and what leads to outputs (`wanted`)."""
        for step in reversed(self.steps):
            data, kind = self.data(step), step.node.kind
            outs = {step.output, *step.node.outputs}
            demanded = not outs.isdisjoint(self.demanded)
            wanted = demanded or not outs.isdisjoint(self.wanted)
            if kind in LAYER_KINDS:
                self.demanded.update(data[:1])
            elif kind == "pass":
                self.demanded.update(data[:1] if demanded else ())
                self.wanted.update(data[:1] if wanted else ())
            elif self.joins(step) and demanded:
                self.demanded.update(data)
            elif kind != "float" and wanted:
                self.wanted.update(data)

    # Forwards: which tensors get a quantizer ------------------------------------------------

    def quantizer(self, name: str, v: int, nonnegative: bool = False) -> Quantizer:
        spec, shape = self.config.activation, self.graph.avals[v].shape
        if spec.per_channel and len(shape) < 2:
            raise ValueError(
                f"{name}: a tensor of shape {shape} has no channel axis, and "
                "SimQATConfig.activation asks for one range per channel. Use "
                "activation=QuantSpec(per_channel=False), or leave the layer out with exclude."
            )
        channels = shape[-1] if spec.per_channel else None
        return Quantizer(name, spec, channels, "activation", nonnegative)

    def place(self, v: int, name: str, nonnegative: bool = False) -> None:
        self.at[v] = self.grids[v] = self.quantizer(name, v, nonnegative)

    def output_name(self, step: Step) -> str:
        node = step.batch_norm if step.node.kind == "batch_norm" else step.node
        node = node or step.node
        if node.layer is not None:
            return self.namer.unique("/".join((*node.layer.path, "output")))
        return self.namer.unique("/".join((*node.path, node.op)), "/output")

    def carries_grid(self, step: Step) -> bool:
        """Whether values leave the step as they came, so that the grid stays."""
        node, data = step.node, self.data(step)
        if not data or data[0] != node.inputs[0] or data[0] not in self.grids:
            return False
        if node.kind == "clamp":
            return all(b in (0.0, -np.inf, np.inf) for b in node.bounds)
        if node.kind != "pass":
            return False
        if not self.config.activation.per_channel:
            return True
        before, after = self.graph.avals[data[0]].shape, self.graph.avals[step.output].shape
        return before[-1:] == after[-1:] and node.op not in _MOVES_CHANNELS

    def is_quantized(self, step: Step) -> bool:
        node, data = step.node, self.data(step)
        if node.kind in LAYER_KINDS:
            return self.place_kernel(step)
        if not data or not self.floating(step.output) or not all(map(self.floating, data)):
            return False
        if node.kind == "batch_norm" and not _last_axis(self.graph, node):
            reason = "the feature axis of this BatchNorm is not the last one"
            self.unquantizable.append(("/".join(node.path), reason))
            return False
        on_grid = all(v in self.grids for v in data)
        demanded, wanted = step.output in self.demanded, step.output in self.wanted
        if node.kind == "concat" and self.config.activation.per_channel:
            return False
        if self.joins(step):
            return demanded or (wanted and on_grid)
        return (
            node.kind in ("add", "mul", "batch_norm", "elementwise", "clamp")
            and on_grid
            and (demanded or wanted)
        )

    def visit(self, step: Step) -> Step:
        node, data = step.node, self.data(step)
        if self.carries_grid(step):
            for v in node.outputs:
                self.grids[v] = self.grids[data[0]]
            return step
        quantized = self.is_quantized(step)
        if quantized:
            step = dataclasses.replace(step, quantized=True)
            if node.kind == "concat":
                self.share(step)
                return step
            self.place_constants(step)
        for v in (step.output, *node.outputs[1:]):
            if (quantized and v == step.output) or (v in self.demanded and self.floating(v)):
                last = step.nodes[-1]
                nonnegative = last.kind == "clamp" and last.bounds[0] >= 0
                self.place(v, self.output_name(step), nonnegative and v == step.output)
        return step

    def place_kernel(self, step: Step) -> bool:
        """Place the kernel's quantizer; return False for a layer that stays float."""
        layer, x = step.node.layer, step.node.inputs[0]
        assert layer is not None
        if not isinstance(x, int) or x not in self.grids:
            what = f"of type {self.graph.avals[x].dtype}" if isinstance(x, int) else "a constant"
            reason = f"its input is {what}, no floating-point array that depends on the model's"
            self.unquantizable.append(("/".join(layer.path), reason))
            return False
        kernel = self.graph.avals[step.node.inputs[1]]  # type: ignore[index]
        channels = kernel_channels(layer.module, kernel.shape)
        spec = self.config.weight
        self.weights[layer.path] = Quantizer(
            "/".join((*layer.path, "kernel")),
            spec,
            channels if spec.per_channel else None,
            "weight",
        )
        return True

    def place_constants(self, step: Step) -> None:
        """Give each constant operand of an add or a product a quantizer."""
        if step.node.kind not in ("add", "mul"):
            return
        data = self.data(step)
        for position, v in enumerate(step.node.inputs):
            if v not in data:
                name = self.namer.unique("/".join((*step.node.path, step.node.op)), "/constant")
                spec = dataclasses.replace(
                    self.config.activation, observer="batch", quant_delay=0, per_channel=False
                )
                self.constants[step, position] = Quantizer(name, spec, None, "constant")

    def share(self, step: Step) -> None:
        """Put the inputs of a concat on one grid, which its output has too."""
        joint = self.quantizer(self.output_name(step), step.output)
        for position, v in enumerate(step.node.inputs):
            if isinstance(v, int) and v in self.grids:
                if self.canonical(self.grids[v]) is not joint:
                    self.shared[self.canonical(self.grids[v])] = joint
            else:
                self.constants[step, position] = joint
        self.grids[step.output] = joint

    def canonical(self, quantizer: Quantizer) -> Quantizer:
        while quantizer in self.shared:
            quantizer = self.shared[quantizer]
        return quantizer

    def plan(self) -> Placement:
        self.mark_demand()
        for v, name in zip(self.graph.inputs, self.graph.input_names, strict=True):
            if name is not None and v in self.demanded:
                self.place(v, self.namer.unique(name))
        steps = tuple(map(self.visit, self.steps))
        return Placement(
            graph=self.graph,
            steps=steps,
            at={v: self.canonical(q) for v, q in self.at.items()},
            grids={v: self.canonical(q) for v, q in self.grids.items()},
            weights=self.weights,
            constants={k: self.canonical(q) for k, q in self.constants.items()},
            unquantizable=tuple(self.unquantizable),
        )


def kernel_channels(module, shape: tuple[int, ...]) -> int:
    """Return the number of output channels of a Conv or Dense kernel of this shape."""
    features = module.features
    count = len(features) if isinstance(features, Sequence) else 1
    return math.prod(shape[len(shape) - count :])


def check_batch_statistics(graph: Graph) -> None:
    """Raise ValueError for a BatchNorm that would take statistics of one value per channel."""
    for node in graph.nodes:
        if node.kind != "batch_norm" or node.layer is None or not node.layer.training:
            continue
        shape = graph.avals[node.outputs[0]].shape
        module: Any = node.layer.module
        features = math.prod(shape[axis] for axis in _feature_axes(module))
        if math.prod(shape) == features and module.axis_name is None:
            raise ValueError(
                f"{'/'.join(node.path)}: its batch holds one value per channel (shape {shape}), "
                "which has no variance. Train with a larger batch, or call the BatchNorm with "
                "use_running_average=True."
            )


def place_quantizers(graph: Graph, config: SimQATConfig) -> Placement:
    """Plan the quantization of a model.

    Quantized are the inputs of the model that an integer operation reads; the outputs of Conv and
    Dense (behind BatchNorm and ReLU), of add, multiply, mean and average pooling, of activation
    functions; and what a float operation hands to an integer one. Whatever only moves values
    (max_pool, reshape, slicing, padding with zero ...) and a ReLU behind a quantized tensor keep
    the grid. The tensors of one concatenation share one.

    Raises: ValueError: a Conv or Dense that cannot be quantized (`config.strict`), nothing to
      quantize, per-channel activations without a channel axis.
    """
    placement = _Planner(graph, config).plan()
    if placement.unquantizable and config.strict:
        reasons = dict(placement.unquantizable)
        listing = "\n".join(f"  {path or 'the model'}: {why}" for path, why in reasons.items())
        raise ValueError(
            f"cannot quantize\n{listing}\nLeave them float with "
            f"SimQATConfig(exclude={tuple(reasons)!r}), or whatever cannot be quantized with "
            "SimQATConfig(strict=False)."
        )
    if not placement.weights:
        raise ValueError(
            "nothing to quantize: the model calls no nn.Conv or nn.Dense that is not excluded."
        )
    return placement
