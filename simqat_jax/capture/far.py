"""Masks of numbers so large that no grid has digits beside them: what reads them stays float."""

import dataclasses

from simqat_jax.ir.graph import (
    Add,
    Clamp,
    Concat,
    Elementwise,
    Extremum,
    Float,
    Graph,
    Mean,
    Move,
    Mul,
    Node,
    as_kind,
)

_READERS = (Add, Clamp, Concat, Elementwise, Extremum, Mean, Move, Mul)
_WHY = "a mask put numbers into it beside which a grid has no digits"
_ENDS = frozenset("reduce_max reduce_min reduce_window_max argmax argmin".split())
_LINEAR = frozenset("mul div neg add sub convert_element_type copy stop_gradient".split())


def keep_far_float(graph: Graph) -> Graph:
    """Leave float what reads numbers that a mask put far from all others, until they are gone.

    They go with a maximum or minimum, and with a function that is not linear.
    """
    far, nodes = set(graph.far), []
    for node in graph.nodes:
        if isinstance(node, _READERS) and not far.isdisjoint(node.tensors(graph.data)):
            if _keeps_far(node):
                far.update(node.outputs)
            node = as_kind(Float, node, why=_WHY)
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _keeps_far(node: Node) -> bool:
    if isinstance(node, Elementwise):
        return all(part.primitive in _LINEAR for part in node.parts or (node,))
    return not isinstance(node, Clamp | Extremum) and node.primitive not in _ENDS
