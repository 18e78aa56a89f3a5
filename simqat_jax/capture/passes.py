"""Passes over a captured graph: drop what nobody reads, merge what belongs together."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.ir.graph import (
    Add,
    Clamp,
    Constant,
    Elementwise,
    Float,
    Graph,
    Mean,
    Move,
    Node,
    Operand,
    as_kind,
)
from simqat_jax.numerics.requantize import FREE, Bounds

_SAME_VALUES = ("broadcast_in_dim", "convert_element_type", "reshape")


def dependent(nodes: Sequence[Node], sources: Iterable[int]) -> frozenset[int]:
    """Return the tensors that depend on any of `sources`, these included."""
    found = set(sources)
    for node in nodes:
        if any(isinstance(v, int) and v in found for v in node.inputs):
            found.update(node.outputs)
    return frozenset(found)


def computed(graph: Graph) -> frozenset[int]:
    """Return the tensors that depend on the model's inputs and on what is trained."""
    return dependent(graph.nodes, graph.trained) & graph.data


def chain(parts: Sequence[Node], inputs: tuple[Operand, ...]) -> Callable[..., tuple[Any, ...]]:
    """Return the function that runs `parts` on values for `inputs`."""

    def run(*values):
        env = {v: value for v, value in zip(inputs, values, strict=True) if isinstance(v, int)}
        for part in parts:
            operands = (v.value if isinstance(v, Constant) else env[v] for v in part.inputs)
            env.update(zip(part.outputs, part.run(*operands), strict=True))
        return tuple(env[v] for v in parts[-1].outputs)

    return run


def leading_to(graph: Graph, targets: Iterable[Operand], *, effects: bool = False) -> set[Node]:
    """Return the nodes on which any of `targets` depends.

    Args:
      graph: the graph.
      targets: operands.
      effects: nodes with an effect count as well.
    """
    needed, found = {v for v in targets if isinstance(v, int)}, set()
    for node in reversed(graph.nodes):
        if (effects and node.effects) or not needed.isdisjoint(node.outputs):
            needed.update(v for v in node.inputs if isinstance(v, int))
            found.add(node)
    return found


def prune(graph: Graph) -> Graph:
    """Leave out nodes whose results nobody reads, unless they have an effect."""
    kept = leading_to(graph, graph.outputs, effects=True)
    return dataclasses.replace(graph, nodes=tuple(n for n in graph.nodes if n in kept))


def share(graph: Graph) -> Graph:
    """Compute once what does not depend on the data and is computed twice in the same way.

    A kernel that is made anew in every call of its layer is one kernel.
    """
    same: dict[int, int] = {}
    known: dict[object, tuple[int, ...]] = {}
    nodes = []
    for node in graph.nodes:
        node = reading(node, same)
        key = None if node.data_inputs(graph.data) or node.effects else _key(node)
        if key is None or known.setdefault(key, node.outputs) == node.outputs:
            nodes.append(node)
        else:
            same.update(zip(node.outputs, known[key], strict=True))
    outputs = tuple(same.get(v, v) if isinstance(v, int) else v for v in graph.outputs)
    return dataclasses.replace(graph, nodes=tuple(nodes), outputs=outputs)


def _key(node: Node) -> object:
    """Return what tells an operation without data from every other; None: nothing does."""
    constants = [v.value for v in node.inputs if isinstance(v, Constant)]
    if node.layer is not None or any(np.size(c) != 1 for c in constants):
        return None
    operands = tuple(
        v if isinstance(v, int) else (np.asarray(v.value).item(), jnp.result_type(v.value))
        for v in node.inputs
    )
    key = (node.primitive, operands, tuple(sorted(node.eqn.params.items())), node.remat)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def merge_means(graph: Graph) -> Graph:
    """Merge a sum and the division of its result by a constant into one node: a mean."""
    readers = graph.readers()
    merged: dict[Node, Node | None] = {}
    for node in graph.nodes:
        if not isinstance(node, Mean) or node.outputs[0] in graph.outputs:
            continue
        users = readers[node.outputs[0]]
        if len(users) != 1 or users[0].primitive != "div" or users[0].remat != node.remat:
            continue
        numerator, divisor = users[0].inputs
        if numerator != node.outputs[0] or (isinstance(divisor, int) and divisor in graph.data):
            continue
        inputs = (*node.inputs, divisor)
        merged[node] = None
        merged[users[0]] = node.divided(users[0], inputs, chain((node, users[0]), inputs))
    nodes = (merged.get(node, node) for node in graph.nodes)
    return dataclasses.replace(graph, nodes=tuple(n for n in nodes if n is not None))


def _scalars(graph: Graph) -> set[int]:
    """Return the tensors that hold one number, maybe broadcast, and do not depend on the data."""
    scalars = {v for v, a in graph.avals.items() if a.size == 1 and v not in graph.data}
    for node in graph.nodes:
        if node.primitive in _SAME_VALUES and all(
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
            node.pointwise
            and len(sources) == 1
            and all(isinstance(v, int) and v in graph.data for v in operands)
            and graph.avals[out].shape == graph.avals[next(iter(sources))].shape
        ):
            roots[out] = sources.pop()
    return roots


def _elementwise_outputs(graph: Graph) -> tuple[dict[int, int], set[int]]:
    """Return each tensor's root, and the tensors that are seen outside of their function."""
    readers = graph.readers()
    producers = {v: node for node in graph.nodes for v in node.outputs}
    scalars = _scalars(graph)
    cuts = {v for v in graph.outputs if isinstance(v, int)}
    whole = _roots(graph, scalars, cuts)
    # A clamp right behind a tensor that only it reads belongs to that tensor's producer.
    cuts |= {
        node.outputs[0]
        for node in graph.nodes
        if isinstance(node, Clamp)
        for source in node.data_inputs(graph.data)
        if len(readers[source]) == 1
        and source not in whole
        and any(not isinstance(reader, Clamp) for reader in readers[node.outputs[0]])
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


def _merged_bounds(parts: Sequence[Clamp]) -> Bounds:
    lo, hi = FREE
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
            several = isinstance(node, Elementwise | Clamp)
            nodes.append(as_kind(Float, node) if several else node)
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
        whole = {"inputs": inputs, "run": chain(parts, inputs), "parts": tuple(parts)}
        clamps = [part for part in parts if isinstance(part, Clamp)]
        if len(clamps) == len(parts):
            nodes.append(as_kind(Clamp, node, bounds=_merged_bounds(clamps), **whole))
        else:
            op = node.op if len(parts) == 1 else "elementwise"
            nodes.append(as_kind(Elementwise, node, op=op, **whole))
    return dataclasses.replace(graph, nodes=tuple(nodes))


def random_keys(
    nodes: Sequence[Node], arguments: Sequence[int], avals: Mapping[int, jax.ShapeDtypeStruct]
) -> frozenset[int]:
    """Return the arguments that are random keys: typed, or plain numbers.

    Of plain numbers those are keys that numbers are drawn with, and what has a key's shape and type
    where nothing reads it, as in evaluation.
    """
    read = {v for node in nodes for v in node.inputs}
    drawn = {v for node in nodes if node.primitive == "random_wrap" for v in node.inputs}
    for node in reversed(nodes):
        if isinstance(node, Move) and not drawn.isdisjoint(node.outputs):
            drawn.update(node.inputs)

    def is_key(v: int) -> bool:
        if jnp.issubdtype(avals[v].dtype, jax.dtypes.prng_key) or v in drawn:
            return True
        if v in read or avals[v].dtype != jnp.uint32:
            return False
        plain = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        return avals[v].shape == plain.shape

    return frozenset(filter(is_key, arguments))


def name_random(graph: Graph) -> Graph:
    """Name operations with random numbers apart: dropout, stochastic depth, noise.

    Only training computes them, and evaluation numbers its operations without them. What scales by
    a constant next to one belongs to it, but not to a sum: that is scaled without noise as well.
    """
    readers = graph.readers()
    given = (v for v in graph.arguments if v not in graph.keys)
    drawn = graph.data - dependent(graph.nodes, given)
    random = {n for n in graph.nodes if not drawn.isdisjoint(n.data_inputs(graph.data))}
    masks = {n for n in random if not isinstance(n, Add)}
    made = {v for n in masks for v in n.outputs}
    for node in graph.nodes:
        only = readers[node.outputs[0]] if node.outputs[0] not in graph.outputs else []
        follows = not made.isdisjoint(node.inputs)
        if _scales(node) and (follows or (len(only) == 1 and only[0] in masks)):
            random.add(node)
            masks.add(node)
            made.update(node.outputs)
    nodes = [
        dataclasses.replace(n, op=f"random_{n.op}") if n in random and n.layer is None else n
        for n in graph.nodes
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _scales(node: Node) -> bool:
    """Whether it multiplies one tensor by constants."""
    parts = {part.primitive for part in node.parts or (node,)}
    return isinstance(node, Elementwise) and parts <= {"mul", "div"}


def simplify(graph: Graph) -> Graph:
    """Drop what nobody reads, then merge means and elementwise functions."""
    return merge_elementwise(merge_means(prune(graph)))


def reading(node: Node, instead: Mapping[int, int]) -> Node:
    """Return a node that reads other tensors, as do its parts."""

    def mapped(inputs: tuple[Operand, ...]) -> tuple[Operand, ...]:
        return tuple(instead.get(v, v) if isinstance(v, int) else v for v in inputs)

    parts = tuple(dataclasses.replace(p, inputs=mapped(p.inputs)) for p in node.parts)
    return dataclasses.replace(node, inputs=mapped(node.inputs), parts=parts)
