"""Inputs that are read as they are: ids, lengths and masks among the features of one array."""

import dataclasses

import jax.numpy as jnp

from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.passes import reading
from simqat_jax.ir.compound import Lookup, MatMul
from simqat_jax.ir.graph import Contraction, Graph, Move, Node, Product

_LAYERS = (Contraction, Product, MatMul, Lookup)


def keep_exact(graph: Graph) -> Graph:
    """Keep what is cast to integers, compared or used as an index off grids.

    Where something else computes with the same tensor, it reads a copy, which may lie on one.
    """
    exact, draft = _exact(graph), Draft(graph)
    copies: dict[int, int] = {}
    for node in graph.nodes:
        if isinstance(node, Move) or _is_exact(node, exact, graph):
            continue
        reads = exact.intersection(v for v in node.inputs if isinstance(v, int))
        made = []
        for v in sorted(reads - set(copies)):
            made.append(draft.made(node, v, traced(jnp.copy, graph.avals[v])))
            copies[v] = made[-1].outputs[0]
        if reads:
            draft.instead[node] = [*made, reading(node, copies)]
    return dataclasses.replace(draft.finished(), exact=exact)


def _exact(graph: Graph) -> frozenset[int]:
    """Return the tensors that nothing but the input led to and that must stay as they are."""
    raw = set(graph.arguments)
    for node in graph.nodes:
        layer = node.layer is not None or isinstance(node, _LAYERS)
        inputs = node.data_inputs(graph.data)
        if inputs and not layer and raw.issuperset(inputs):
            raw.update(node.outputs)
    exact: set[int] = set()
    for node in reversed(graph.nodes):
        if _is_exact(node, exact, graph):
            inputs = raw.intersection(node.data_inputs(graph.data))
            exact.update(v for v in inputs if _is_float(graph, v))
    return frozenset(exact)


def _is_exact(node: Node, exact: set[int] | frozenset[int], graph: Graph) -> bool:
    """Whether what a node makes is no real number, or must be exact itself."""
    counts = not node.effects and not any(_is_float(graph, v) for v in node.outputs)
    return counts or not exact.isdisjoint(node.outputs)


def _is_float(graph: Graph, v: int) -> bool:
    return bool(jnp.issubdtype(graph.avals[v].dtype, jnp.floating))
