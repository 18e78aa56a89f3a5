"""A model seen as a graph: tensors are numbers, nodes are layers and functional operations."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

Kind = Literal[
    "conv",  # nn.Conv
    "dense",  # nn.Dense, nn.DenseGeneral
    "batch_norm",  # nn.BatchNorm
    "add",  # add, subtract
    "mul",
    "mean",  # mean, average pool, sum
    "concat",
    "elementwise",  # function of one tensor and scalars: a lookup table on integer codes
    "clamp",  # relu, relu6, clip
    "pass",  # moves values without changing them: reshape, max_pool, slicing, dropout in eval ...
    "float",  # no integer form
]

LAYER_KINDS = ("conv", "dense")


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """An operand that is a constant of the model."""

    value: Any


Operand = int | Constant


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One Flax layer as a pure function of its inputs and parameters.

    Attributes:
      module: the layer, unbound, as the model constructed it.
      path: where it sits in the model.
      names: what each input after the first is: "kernel", "bias", "mean" ...
      training: for a BatchNorm: it uses batch statistics and returns new running ones.
    """

    module: nn.Module
    path: tuple[str, ...]
    names: tuple[str, ...] = ()
    training: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """One operation: `outputs = run(*inputs)`."""

    kind: Kind
    op: str
    path: tuple[str, ...]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]
    run: Callable[..., tuple[jax.Array, ...]]
    layer: Layer | None = None
    bounds: tuple[float, float] = (-np.inf, np.inf)
    """What a clamp clamps to, real units."""
    divisor: Any = None
    """What a mean divides its sum by: an Operand."""
    remat: tuple[int, dict[str, Any]] | None = None
    """Which call of `nn.remat` the node is inside of, and that call's parameters."""
    effects: bool = False
    """Whether it does more than return values: `jax.debug.print`."""
    eqn: Any = None
    """The equation that it was captured as; of a mean, that of its sum."""
    parts: tuple["Node", ...] = ()
    """What a mean or an elementwise node was merged from; empty: nothing."""

    def data_inputs(self, data: frozenset[int]) -> tuple[int, ...]:
        """The tensors among the inputs that depend on the model's inputs."""
        return tuple(v for v in self.inputs if isinstance(v, int) and v in data)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """A model call, flattened.

    Attributes:
      nodes: in the order of evaluation.
      inputs: one tensor per flattened input of the call (variables, arguments, random keys).
      input_names: for a floating-point argument its name ("input", "input/0"); None otherwise.
      outputs: operands, one per flattened output.
      avals: shape and dtype of every tensor.
      data: the tensors that depend on the arguments.
      unquantizable: module path and reason of each Conv or Dense that cannot be quantized.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    input_names: tuple[str | None, ...]
    outputs: tuple[Operand, ...]
    avals: dict[int, jax.ShapeDtypeStruct]
    data: frozenset[int]
    unquantizable: tuple[tuple[tuple[str, ...], str], ...]


def consumers(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """Return the nodes that read each tensor."""
    result: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        for v in dict.fromkeys(v for v in node.inputs if isinstance(v, int)):
            result[v].append(node)
    return result


def _chain(parts: Sequence[Node], inputs: tuple[Operand, ...]) -> Callable[..., tuple]:
    """Return the function that runs `parts` on values for `inputs`."""

    def run(*values):
        env = {v: value for v, value in zip(inputs, values, strict=True) if isinstance(v, int)}
        for part in parts:
            operands = (v.value if isinstance(v, Constant) else env[v] for v in part.inputs)
            env.update(zip(part.outputs, part.run(*operands), strict=True))
        return tuple(env[v] for v in parts[-1].outputs)

    return run


def prune(graph: Graph) -> Graph:
    """Leave out nodes whose results nobody reads, unless they have an effect."""
    needed = {v for v in graph.outputs if isinstance(v, int)}
    kept = []
    for node in reversed(graph.nodes):
        if node.effects or not needed.isdisjoint(node.outputs):
            needed.update(v for v in node.inputs if isinstance(v, int))
            kept.append(node)
    return dataclasses.replace(graph, nodes=tuple(reversed(kept)))


def merge_means(graph: Graph) -> Graph:
    """Merge a sum and the division of its result by a constant into one "mean" node."""
    readers = consumers(graph.nodes)
    merged: dict[Node, Node | None] = {}
    for node in graph.nodes:
        if node.kind != "mean" or node.outputs[0] in graph.outputs:
            continue
        users = readers[node.outputs[0]]
        if len(users) != 1 or users[0].op != "div" or users[0].remat != node.remat:
            continue
        numerator, divisor = users[0].inputs
        if numerator != node.outputs[0] or (isinstance(divisor, int) and divisor in graph.data):
            continue
        inputs = (*node.inputs, divisor)
        name = "avg_pool" if node.op == "reduce_window_sum" else "mean"
        merged[node] = None
        merged[users[0]] = dataclasses.replace(
            users[0],
            kind="mean",
            op=name,
            inputs=inputs,
            run=_chain((node, users[0]), inputs),
            divisor=divisor,
            eqn=node.eqn,
            parts=(node, users[0]),
        )
    nodes = (merged.get(node, node) for node in graph.nodes)
    return dataclasses.replace(graph, nodes=tuple(n for n in nodes if n is not None))


def _scalars(graph: Graph) -> set[int]:
    """Return the tensors that hold one number, maybe broadcast, and do not depend on the data."""
    scalars = {v for v, a in graph.avals.items() if a.size == 1 and v not in graph.data}
    for node in graph.nodes:
        if node.op in ("broadcast", "convert", "reshape") and all(
            v in scalars if isinstance(v, int) else np.size(v.value) == 1 for v in node.inputs
        ):
            scalars.update(node.outputs)
    return scalars


def _roots(graph: Graph, scalars: set[int], cuts: set[int]) -> dict[int, int]:
    """Return, for each tensor, the tensor of which it is an elementwise function."""
    roots: dict[int, int] = {}
    for node in graph.nodes:
        operands = [
            v
            for v in node.inputs
            if (v not in scalars if isinstance(v, int) else np.size(v.value) != 1)
        ]
        sources = {roots.get(v, v) if v not in cuts else v for v in operands if isinstance(v, int)}
        out = node.outputs[0]
        if (
            node.kind in ("elementwise", "clamp", "add", "mul")
            and len(sources) == 1
            and all(isinstance(v, int) and v in graph.data for v in operands)
            and graph.avals[out].shape == graph.avals[next(iter(sources))].shape
        ):
            roots[out] = sources.pop()
    return roots


def _elementwise_outputs(graph: Graph) -> tuple[dict[int, int], set[int]]:
    """Return each tensor's root, and the tensors that are seen outside of their function."""
    readers = consumers(graph.nodes)
    producers = {v: node for node in graph.nodes for v in node.outputs}
    scalars = _scalars(graph)
    cuts = {v for v in graph.outputs if isinstance(v, int)}
    whole = _roots(graph, scalars, cuts)
    # A clamp right behind a tensor that only it reads belongs to that tensor's producer.
    cuts |= {
        node.outputs[0]
        for node in graph.nodes
        if node.kind == "clamp"
        for source in node.data_inputs(graph.data)
        if len(readers[source]) == 1
        and source not in whole
        and any(reader.kind != "clamp" for reader in readers[node.outputs[0]])
    }
    while True:
        roots = _roots(graph, scalars, cuts)
        seen = {
            v
            for v, root in roots.items()
            for reader in readers[v]
            if roots.get(reader.outputs[0]) != root or reader.remat != producers[v].remat
        }
        if seen <= cuts:
            return roots, cuts
        cuts |= seen


def _merged_bounds(parts: Sequence[Node]) -> tuple[float, float]:
    lo, hi = -np.inf, np.inf
    for part in parts:
        lo, hi = (min(max(b, part.bounds[0]), part.bounds[1]) for b in (lo, hi))
    return lo, hi


def merge_elementwise(graph: Graph) -> Graph:
    """Merge operations that together are a function of one tensor and scalars into one node.

    GELU, `x * sigmoid(x)` or a clip written by hand becomes one node, whatever it is made of. A
    node made of clamps alone stays a "clamp", with their joint bounds.
    """
    roots, cuts = _elementwise_outputs(graph)
    parts_of: dict[int, list[Node]] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        out = node.outputs[0]
        if out not in roots:
            # An operation on several tensors that is none of the known ones.
            several = node.kind in ("elementwise", "clamp")
            nodes.append(dataclasses.replace(node, kind="float") if several else node)
            continue
        parts = list(
            dict.fromkeys(
                part
                for v in node.inputs
                if isinstance(v, int) and v in parts_of and v not in cuts
                for part in parts_of[v]
            )
        )
        parts_of[out] = parts = [*parts, node]
        if out not in cuts:
            continue
        made = {v for part in parts for v in part.outputs}
        inputs = tuple(
            dict.fromkeys(
                v for part in parts for v in part.inputs if isinstance(v, int) and v not in made
            )
        )
        inputs = (roots[out], *(v for v in inputs if v != roots[out]))
        clamp = all(part.kind == "clamp" for part in parts)
        nodes.append(
            dataclasses.replace(
                node,
                kind="clamp" if clamp else "elementwise",
                op=node.op if len(parts) == 1 or clamp else "elementwise",
                inputs=inputs,
                run=_chain(parts, inputs),
                parts=tuple(parts),
                bounds=_merged_bounds(parts) if clamp else node.bounds,
            )
        )
    return dataclasses.replace(graph, nodes=tuple(nodes))


def simplify(graph: Graph) -> Graph:
    """Drop what nobody reads, then merge means and elementwise functions."""
    return merge_elementwise(merge_means(prune(graph)))
