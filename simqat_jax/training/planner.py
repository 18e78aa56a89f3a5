"""Decide what is quantized: one quantizer per tensor, at its producer."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.compound import Softmax
from simqat_jax.ir.graph import (
    BatchNorm,
    Clamp,
    Float,
    Graph,
    Move,
    N,
    Node,
    Product,
)
from simqat_jax.ir.plan import Placement, Quantizer, Slot, Step
from simqat_jax.numerics.rounding import ROUNDINGS
from simqat_jax.ops.operation import Operation, Situation
from simqat_jax.ops.registry import operation_of
from simqat_jax.training.batch_norm import mapped_axis
from simqat_jax.training.decisions import Decision, Decisions, check_rules
from simqat_jax.training.demand import demand
from simqat_jax.training.widths import check_targets


def group(graph: Graph) -> list[Step]:
    """Fuse BatchNorm and clamp behind the operation whose only reader they are."""
    readers = graph.readers()
    taken: set[Node] = set()
    steps: dict[Node, Step] = {}

    def only_reader(node: Node, kind: type[N]) -> N | None:
        out = node.outputs[0]
        users = readers[out]
        if len(users) != 1 or out in graph.outputs or users[0].remat != node.remat:
            return None
        return users[0] if isinstance(users[0], kind) else None

    for node in graph.nodes:
        if node in taken:
            continue
        norm = None
        if isinstance(node, Product) and node.channels_last:
            norm = only_reader(node, BatchNorm)
        if norm is not None and (norm.inputs[0] != node.outputs[0] or not norm.on_last_axis):
            norm = None
        last = norm or node
        clamp = only_reader(last, Clamp) if operation_of(node).fuses_clamp else None
        step = Step(node, norm, clamp, (clamp or last).outputs[0])
        taken.update(step.nodes)
        steps[step.nodes[-1]] = step
    # A step runs where its last node did: by then every operand of its nodes is known.
    return [steps[node] for node in graph.nodes if node in steps]


def _last_steps(graph: Graph, steps: Sequence[Step]) -> dict[object, Step]:
    """Return what makes each tensor that steps of a loop repeat the last time, in this order."""
    last: dict[object, Step] = {}
    for step in reversed(steps):
        key = graph.repeated.get(step.output)
        if key is not None and step.node.data_inputs(graph.data):
            last.setdefault(key, step)
    return dict(reversed(last.items()))


class _Namer:
    """Gives each quantizer a name of its own."""

    def __init__(self) -> None:
        self.used: set[str] = set()

    def unused(self, stem: str, leaf: str = "") -> str:
        """Return `stem` and `leaf`, with a number behind `stem` from the second time on."""
        numbers = ("", *(f"_{n}" for n in range(1, len(self.used) + 1)))
        return next(n for n in (stem + k + leaf for k in numbers) if n not in self.used)

    def unique(self, stem: str, leaf: str = "") -> str:
        """Return such a name, which is used from here on."""
        name = self.unused(stem, leaf)
        self.used.add(name)
        return name


class _Planner:
    """Places quantizers: tells which of the tensors on which there is a demand get one."""

    def __init__(self, graph: Graph, config: SimQATConfig):
        self.graph = graph
        self.config = config
        self.steps = group(graph)
        self.namer = _Namer()
        self.needed, self.wanted = demand(graph, self.steps)
        self.at: dict[int, Quantizer] = {}
        self.grids: dict[int, Quantizer] = {}
        self.weights: dict[Node, Quantizer] = {}
        self.kernels: dict[tuple[object, int], Quantizer] = {}
        self.constants: dict[Slot, Quantizer] = {}
        self.shared: dict[Quantizer, Quantizer] = {}
        self.last = _last_steps(graph, self.steps)
        self.names: dict[object, str] = {}
        self.decisions = Decisions(config)
        self.decided: dict[Node, Decision] = {}
        self.repeated: dict[object, Quantizer] = {}
        self.unquantizable = {"/".join(path): reason for path, reason in graph.unquantizable}

    def plan(self) -> Placement:
        for v, name in zip(self.graph.inputs, self.graph.input_names, strict=True):
            if name is not None and v in self.needed:
                name = self.namer.unique(name)
                self.place(v, name, self.decisions.about(name.split("/"), "input"))
        self.name_repeated()
        visited = [self.visit(step) for step in self.steps]
        final = {
            old: self.decided[new.node].finished(new, self.weights, self.unquantizable)
            for old, new in zip(self.steps, visited, strict=True)
        }
        constants = {
            Slot(final[step], position): self.canonical(q)
            for (step, position), q in self.constants.items()
        }
        return Placement(
            graph=self.graph,
            steps=tuple(final.values()),
            at={v: self.canonical(q) for v, q in self.at.items()},
            grids={v: self.canonical(q) for v, q in self.grids.items()},
            weights=self.weights,
            constants=constants,
            rounding=ROUNDINGS[self.config.backend],
            freeze_bn=self.config.freeze_bn,
            axis_name=mapped_axis(self.graph),
        )

    # Tensors ---------------------------------------------------------------------------------

    def floating(self, v: int) -> bool:
        return bool(jnp.issubdtype(self.graph.avals[v].dtype, jnp.floating))

    def data(self, step: Step) -> tuple[int, ...]:
        return step.node.data_inputs(self.graph.data)

    # Forwards --------------------------------------------------------------------------------

    def visit(self, step: Step) -> Step:
        node, data, operation = step.node, self.data(step), operation_of(step.node)
        self.decided[node] = self.deciding(step)
        if self.carries_grid(step, operation):
            for v in node.outputs:
                self.grids[v] = self.grids[data[0]]
            return step
        quantized = self.is_quantized(step, operation)
        if quantized and operation.shares_grid:
            self.share(step)
            return dataclasses.replace(step, quantized=True)
        if quantized and operation.quantizes_constants:
            self.place_constants(step)
        for v in (step.output, *node.outputs[1:]):
            if (quantized and v == step.output) or (v in self.needed and self.floating(v)):
                self.place_output(step, v)
        return dataclasses.replace(step, quantized=quantized)

    def deciding(self, step: Step) -> Decision:
        """Return what is decided about a step; about a loop's, the last one."""
        key = self.graph.repeated.get(step.output)
        node = self.last.get(key, step).node
        if isinstance(node, Float) and node.excluded_by is not None:
            return self.decisions.of(node.excluded_by, (*node.path, node.op))
        if node.layer is not None:
            return self.decisions.about(node.layer.path, node.kind)
        name = self.names.get(key) or self.namer.unused("/".join((*node.path, node.op)), "/output")
        return self.decisions.about(name.removesuffix("/output").split("/"), node.kind)

    def carries_grid(self, step: Step, operation: Operation) -> bool:
        """Whether values leave the step as they came, so that the grid stays."""
        node, data = step.node, self.data(step)
        if not data or data[0] != node.inputs[0] or data[0] not in self.grids:
            return False
        if operation.shares_grid:  # parts of one tensor, put together again
            grids = {self.grids.get(v) for v in node.inputs if isinstance(v, int)}
            return len(data) == len(node.inputs) and len(grids) == 1
        per_channel = self.grids[data[0]].spec.per_channel
        return operation.carries_grid(node, self.graph, per_channel=per_channel)

    def is_quantized(self, step: Step, operation: Operation) -> bool:
        node, data = step.node, self.data(step)
        if isinstance(node, Product):
            self.place_kernel(node)
            return True
        tensors = node.tensors(self.graph.data)
        if not data or not all(map(self.floating, (step.output, *tensors))):
            return False
        refusal = operation.refusal(node)
        if refusal is not None:
            self.unquantizable["/".join(node.path)] = refusal
            return False
        situation = Situation(
            inputs=len(tensors),
            on_grid=all(v in self.grids for v in tensors),
            needed=step.output in self.needed,
            wanted=step.output in self.wanted,
            per_channel=self.decided[node].activation.per_channel,
        )
        if not operation.is_quantized(node, situation):
            return False
        left_out = not self.decided[node].quantize
        if left_out and step.output not in self.needed:
            self.output_name(step)  # that of the next one of its kind does not depend on rules
        return not left_out

    # Quantizers ------------------------------------------------------------------------------

    def place(self, v: int, name: str, decided: Decision, nonnegative: bool = False) -> None:
        shape = self.graph.avals[v].shape
        self.at[v] = self.grids[v] = _of_activation(name, shape, decided, nonnegative)

    def name_repeated(self) -> None:
        """Name what steps of a loop share, as it stands in the last one.

        The first one leaves out what is zero there, unless the caller tells what it starts from.
        """
        for key, step in self.last.items():
            if isinstance(step.node, Product):
                self.place_kernel(step.node)
            if not isinstance(step.node, Move) and self.floating(step.output):
                self.names[key] = self.output_name(step)

    def place_output(self, step: Step, v: int) -> None:
        """Give a tensor that leaves a step a quantizer; steps of a loop share one."""
        key = self.graph.repeated.get(v)
        if key in self.repeated:
            self.at[v] = self.grids[v] = self.repeated[key]
            return
        last = self.last.get(key, step)
        clamp = last.nodes[-1] if v == step.output else None
        clamped = isinstance(clamp, Clamp) and clamp.bounds[0] >= 0
        nonnegative = clamped or isinstance(clamp, Softmax)
        name = self.names.get(key) or self.output_name(last)
        self.place(v, name, self.decided[step.node], nonnegative)
        if key is not None:
            self.repeated[key] = self.at[v]

    def output_name(self, step: Step) -> str:
        node = step.node
        if node.layer is not None:
            return self.namer.unique("/".join((*node.layer.path, "output")))
        return self.namer.unique("/".join((*node.path, node.op)), "/output")

    def place_kernel(self, node: Product) -> None:
        """Place the kernel's quantizer; a kernel that is used again has it already."""
        kernel = node.inputs[1]
        repeated = self.graph.repeated.get(kernel) if isinstance(kernel, int) else None
        key = repeated or kernel, node.num_channels
        if key not in self.kernels:
            name = self.namer.unique(node.kernel_name)
            decided = self.decisions.about(node.layer.path, node.kind)
            self.kernels[key] = _of_kernel(name, node.num_channels, decided)
        self.weights[node] = self.kernels[key]

    def place_constants(self, step: Step) -> None:
        """Give each constant operand of an add or a product a quantizer."""
        data = self.data(step)
        for position, v in enumerate(step.node.inputs):
            if v not in data:
                name = self.namer.unique("/".join((*step.node.path, step.node.op)), "/constant")
                constant = _of_constant(name, self.decided[step.node])
                self.constants[Slot(step, position)] = constant

    def share(self, step: Step) -> None:
        """Put the inputs of a concat or maximum on one grid, which its output has too."""
        shape = self.graph.avals[step.output].shape
        joint = _of_activation(self.output_name(step), shape, self.decided[step.node])
        for position, v in enumerate(step.node.numbers):
            if isinstance(v, int) and v in self.grids:
                if self.canonical(self.grids[v]) is not joint:
                    self.shared[self.canonical(self.grids[v])] = joint
            else:
                self.constants[Slot(step, position)] = joint
        self.grids[step.output] = joint

    def canonical(self, quantizer: Quantizer) -> Quantizer:
        while quantizer in self.shared:
            quantizer = self.shared[quantizer]
        return quantizer


def _of_kernel(name: str, num_channels: int, decided: Decision) -> Quantizer:
    channels = num_channels if decided.weight.per_channel else None
    return Quantizer(name, decided.weight, channels, "weight", rule=decided.rule)


def _of_constant(name: str, decided: Decision) -> Quantizer:
    spec = dataclasses.replace(
        decided.activation, observer="batch", quant_delay=0, per_channel=False
    )
    return Quantizer(name, spec, None, "constant", rule=decided.rule)


def _of_activation(
    name: str, shape: tuple[int, ...], decided: Decision, nonnegative: bool = False
) -> Quantizer:
    spec = decided.activation
    if spec.per_channel and len(shape) < 2:
        raise ValueError(
            f"{name}: a tensor of shape {shape} has no channel axis, and its activation spec asks "
            "for one range per channel. Use activation=QuantSpec(per_channel=False), or leave "
            "the layer out with exclude."
        )
    channels = shape[-1] if spec.per_channel else None
    return Quantizer(name, spec, channels, "activation", nonnegative, decided.rule)


def place_quantizers(graph: Graph, config: SimQATConfig) -> Placement:
    """Plan the quantization of a model.

    Quantized are the inputs of the model that an integer operation reads; the outputs of products
    with a kernel (behind BatchNorm and ReLU), of add, multiply, mean and average pooling, of
    activation functions; and what a float operation hands to an integer one. Whatever only moves
    values (max_pool, reshape, slicing, padding with zero ...) and a ReLU behind a quantized tensor
    keep the grid. The tensors of one concatenation, maximum or
    minimum share one.

    Raises:
      ValueError: a product that cannot be quantized (`config.strict`), nothing to quantize,
        per-channel activations without a channel axis, codes that `config.targets` cannot hold.
    """
    planner = _Planner(graph, config)
    placement, reasons = planner.plan(), planner.unquantizable
    check_rules(placement, config)
    check_targets(placement, config)
    if reasons and config.strict:
        listing = "\n".join(f"  {path or 'the model'}: {why}" for path, why in reasons.items())
        paths = tuple(path for path in reasons if path)
        these = f"Leave them float with SimQATConfig(exclude={paths!r}), or l" if paths else "L"
        raise ValueError(
            f"cannot quantize\n{listing}\n{these}eave float whatever cannot be quantized with "
            "SimQATConfig(strict=False)."
        )
    if not placement.weights:
        raise ValueError(
            "nothing to quantize: no convolution or matrix product of the model's input with a "
            "kernel is left that is not excluded."
        )
    return placement
