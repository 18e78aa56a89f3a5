"""Constants that repeat along an axis, as learned queries do along the batch, are computed once.

What works on each entry of that axis by itself makes the same of every one: a repetition moves
behind it. An axis repeats because it was broadcast or tiled, whatever its length.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.capture.classify import POINTWISE, REDUCTIONS, classify, inner_equations
from simqat_jax.capture.contractions import product_axes, traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import inlined
from simqat_jax.ir import replay
from simqat_jax.ir.graph import Clamp, Elementwise, Graph, Node, Operand, shape_of

_REPEATS = ("broadcast_in_dim", "tile")
# What tells the lengths of results, and what it is where they are 1.
_LENGTHS = {
    "broadcast_in_dim": {"shape": 1},
    "reshape": {"new_sizes": 1},
    "slice": {"start_indices": 0, "limit_indices": 1},
    "tile": {"reps": 1},
}
_Links = list[tuple[tuple[int | None, ...], int]]
"""Axes along which an operation works on each entry by itself.

For each of them the axis of every operand, None where it has none, and that of the results.
"""


def move_repetitions(graph: Graph) -> Graph:
    """Compute constants that repeat along an axis with length 1 there, and repeat the results.

    The last pass: what a plan is made of stays as it is. Moved is what computes, not what only
    moves values, and what leads to it.
    """
    draft = Draft(graph)
    found = computed_once(draft)
    moved, read = set[Node](), set[Operand]()
    for node in reversed(graph.nodes):
        if node in found and (_computes(node) or not read.isdisjoint(node.outputs)):
            moved.add(node)
            read.update(node.inputs)
    if not moved:
        return graph
    once: dict[Operand, int] = {}
    for node in graph.nodes:
        if node in moved:
            once.update(_move(draft, node, found[node], once, moved))
    return draft.finished()


def _computes(node: Node) -> bool:
    equations = [e for p in node.parts or (node,) for e in inner_equations(p.eqn) or [p.eqn]]
    return not all(replay.moves(eqn.primitive.name) for eqn in equations)


def _move(
    draft: Draft,
    node: Node,
    eqn: core.JaxprEqn,
    once: Mapping[Operand, int],
    moved: set[Node],
) -> dict[Operand, int]:
    """Compute a node once; repeat what others read of it. Return what it makes now."""
    outputs = tuple(draft.new(shape_of(v)) for v in eqn.outvars)
    inputs = tuple(once.get(v, v) for v in node.inputs)
    whole = {"inputs": inputs, "outputs": outputs, "eqn": eqn, "run": inlined(eqn), "parts": ()}
    nodes = [dataclasses.replace(node, **whole)]
    for v, first in zip(node.outputs, outputs, strict=True):
        if v in draft.graph.outputs or not moved.issuperset(draft.readers[v]):
            shape = draft.avals[v].shape
            spread = traced(lambda x, shape=shape: _spread(x, shape), draft.avals[first])
            nodes.append(draft.made(node, first, spread, (v,)))
    draft.instead[node] = nodes
    return dict(zip(node.outputs, outputs, strict=True))


def _spread(x: ArrayLike, shape: Sequence[int], kept: Collection[int | None] = ()) -> jax.Array:
    """Repeat an array along its axes of length 1, but for some of them."""
    lengths = [1 if a in kept else n for a, n in enumerate(shape)]
    return lax.broadcast_in_dim(x, lengths, range(len(lengths)))


# Which constants repeat --------------------------------------------------------------------------


def computed_once(draft: Draft) -> dict[Node, core.JaxprEqn]:
    """Return for each node that makes such a constant what makes it with length 1 of such ones."""
    graph = draft.graph
    once: dict[Operand, jax.ShapeDtypeStruct] = {}
    found: dict[Node, core.JaxprEqn] = {}
    for node in graph.nodes:
        repeats = node.primitive in _REPEATS or not once.keys().isdisjoint(node.inputs)
        if not repeats or node.effects or not graph.data.isdisjoint(node.outputs):
            continue
        eqn = _computed_once(node, [once.get(v) or draft.aval(v) for v in node.inputs])
        if eqn is None:
            continue
        results = list(zip(node.outputs, map(shape_of, eqn.outvars), strict=True))
        if any(graph.avals[v].shape != aval.shape for v, aval in results):
            found[node] = eqn
            once.update(results)
    return found


def _computed_once(node: Node, avals: Sequence[jax.ShapeDtypeStruct]) -> core.JaxprEqn | None:
    """Return what a node computes of operands of length 1 along axes along which they repeat.

    None: it cannot be computed so.
    """

    def compute(*values: ArrayLike) -> Sequence[ArrayLike]:
        return replay.run_node(node, values, _bind)

    own_gradient = any(_has_own_gradient(part.eqn) for part in node.parts or (node,))
    of_elements = not node.parts and classify(node.eqn, node.inputs) in (Clamp, Elementwise)
    if own_gradient and not of_elements:
        return None
    with jax.disable_jit(False):  # it is one call
        eqn = traced(jax.jit(_first_of(node) if own_gradient else compute), *avals)
    return eqn if len(eqn.invars) == len(node.inputs) else None


def _has_own_gradient(eqn: core.JaxprEqn) -> bool:
    """Whether an equation calls a function whose gradient a model or JAX tells."""
    inner = (e for sub in core.jaxprs_in_params(eqn.params) for e in sub.eqns)
    return eqn.primitive.name.startswith("custom_") or any(map(_has_own_gradient, inner))


def _first_of(node: Node) -> Callable[..., Sequence[ArrayLike]]:
    """Return what computes all entries and takes the first: so the node's own gradient stays."""
    shapes = [shape_of(v).shape for v in node.eqn.invars]
    links = _of_elements(shapes, shape_of(node.eqn.outvars[0]).shape)

    def compute(*values: ArrayLike) -> Sequence[ArrayLike]:
        full = [_spread(x, shape) for x, shape in zip(values, shapes, strict=True)]
        (y,) = node.run(*full)
        for axis in _thin_axes(links, values):
            y = lax.slice_in_dim(y, 0, 1, axis=axis)
        return (y,)

    return compute


# Operations --------------------------------------------------------------------------------------


def _bind(eqn: core.JaxprEqn, values: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
    """Run an equation with length 1 along axes along which its operands and results repeat."""
    links, params = _links(eqn), {**eqn.primitive.get_bind_params(eqn.params)}
    thin = _thin_axes(links, values)
    kept = [{axes[n] for axes, k in links if k in thin} for n, _ in enumerate(values)]
    shapes = (shape_of(v).shape for v in eqn.invars)
    operands = [
        x if np.shape(x) == shape else _spread(x, shape, axes)
        for x, shape, axes in zip(values, shapes, kept, strict=True)
    ]
    for name, of_one in _LENGTHS.get(eqn.primitive.name, {}).items():
        params[name] = tuple(of_one if k in thin else n for k, n in enumerate(params[name]))
    result = eqn.primitive.bind(*replay.varying_as_traced(eqn, operands), **params)
    return result if eqn.primitive.multiple_results else [result]


def _thin_axes(links: _Links, values: Sequence[ArrayLike]) -> set[int]:
    """Return the axes of the results along which all operands have length 1."""
    return {
        k
        for axes, k in links
        if all(a is None or np.shape(x)[a] == 1 for a, x in zip(axes, values, strict=True))
    }


def _links(eqn: core.JaxprEqn) -> _Links:
    shapes = [shape_of(v).shape for v in eqn.invars]
    out = shape_of(eqn.outvars[0]).shape if eqn.outvars else ()
    params = eqn.params
    match eqn.primitive.name:
        case name if name in POINTWISE:
            return _of_elements(shapes, out)
        case name if name in REDUCTIONS:
            kept = [a for a, _ in enumerate(shapes[0]) if a not in params["axes"]]
            return [((a,), k) for k, a in enumerate(kept)]
        case "broadcast_in_dim":
            places = params["broadcast_dimensions"]
            same = [((a,), k) for a, k in enumerate(places)]
            return [*same, *(((None,), k) for k, _ in enumerate(out) if k not in places)]
        case "tile":
            whole = [a for a, n in enumerate(shapes[0]) if 1 in (n, params["reps"][a])]
            return [((a,), a) for a in whole]
        case "reshape" | "squeeze":
            places = {(math.prod(out[:k]), n): k for k, n in enumerate(out) if n > 1}
            before = [(math.prod(shapes[0][:a]), n) for a, n in enumerate(shapes[0])]
            return [((a,), places[at]) for a, at in enumerate(before) if at in places]
        case "transpose":
            return [((a,), k) for k, a in enumerate(params["permutation"])]
        case "slice":
            return [((a,), a) for a, _ in enumerate(out)]
        case "split":
            return [((a,), a) for a, _ in enumerate(out) if a != params["axis"]]
        case "concatenate":
            others = (a for a, _ in enumerate(out) if a != params["dimension"])
            return [((a,) * len(shapes), a) for a in others]
        case "dot_general":
            return [(pair, k) for k, pair in enumerate(product_axes(eqn))]
    return []


def _of_elements(shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> _Links:
    return [(tuple(k if s else None for s in shapes), k) for k, _ in enumerate(out)]
