"""State that a model keeps of its activations: statistics, computed beside the activations."""

import dataclasses

from simqat_jax.capture.draft import Draft
from simqat_jax.capture.passes import leading_to, reading
from simqat_jax.ir.graph import Contraction, Graph, Node, Product


def separate_state(graph: Graph) -> Graph:
    """Compute statistics for the state apart, where activations depend on them as well.

    What activations depend on may lie on grids. A running mean that does is rounded in every step,
    and no longer moves by less than half a code.
    """
    kept = {v for v in graph.outputs[graph.returned :] if isinstance(v, int)}
    batch = graph.batch
    if batch is None or not kept:
        return graph

    def is_statistic(node: Node) -> bool:
        layer = node.layer is not None or isinstance(node, Contraction | Product)
        plain = not layer and node.data_inputs(graph.data) and not node.effects
        return bool(plain) and all(batch not in graph.avals[v].shape for v in node.outputs)

    shown = leading_to(graph, graph.outputs[: graph.returned])
    both = leading_to(graph, kept) & shown
    draft, twins = Draft(graph), dict[int, int]()
    for node in graph.nodes:
        if node in both and is_statistic(node):
            outputs = tuple(draft.new(graph.avals[v]) for v in node.outputs)
            twin = dataclasses.replace(reading(node, twins), outputs=outputs)
            twins.update(zip(node.outputs, outputs, strict=True))
            draft.instead[node] = [node, twin]
        elif node not in shown:
            draft.instead[node] = [reading(node, twins)]
    outputs = [
        twins.get(v, v) if isinstance(v, int) and n >= graph.returned else v
        for n, v in enumerate(graph.outputs)
    ]
    return dataclasses.replace(draft.finished(), outputs=tuple(outputs))
