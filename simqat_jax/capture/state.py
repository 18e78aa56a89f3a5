"""What a call computes beside the activations: state that it keeps, sown values, intermediates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simqat_jax.capture.passes import dependent, leading_to
from simqat_jax.ir.graph import BatchNorm, Constant, Contraction, Graph, Node, Operand


@dataclasses.dataclass(frozen=True)
class Beside:
    """Tensors that a call stores: they are no outputs, and nothing is planned otherwise.

    Attributes:
      tensors: which.
      nodes: of the graph as it was traced, those that lead to them.
      statistics: tensors without the batch axis. What activations depend on may lie on grids, and
        a running mean that does is rounded in every step: they are computed again.
    """

    tensors: tuple[Operand, ...] = ()
    nodes: tuple[Node, ...] = ()
    statistics: frozenset[int] = frozenset()

    def values(self, known: Mapping[int, jax.Array]) -> list[jax.Array]:
        """Return their values.

        Args:
          known: those of the tensors that the plan makes. Of what it fuses or merges the nodes are
            run by themselves.
        """
        makers = {v: node for node in self.nodes for v in node.outputs}
        env = {v: x for v, x in known.items() if v not in self.statistics}

        def value(v: Operand) -> Any:
            if isinstance(v, Constant):
                return v.value
            if v not in env:
                node = makers[v]
                env.update(zip(node.outputs, node.run(*map(value, node.inputs)), strict=True))
            return env[v]

        return [jnp.asarray(value(v)) for v in self.tensors]


def beside(graph: Graph, tensors: tuple[Operand, ...]) -> Beside:
    """Return tensors of a graph as it was traced as what is computed beside it."""
    leading = leading_to(graph, tensors)
    nodes = tuple(node for node in graph.nodes if node in leading)
    return Beside(tensors, nodes, _statistics(graph, nodes))


def _statistics(graph: Graph, nodes: Sequence[Node]) -> frozenset[int]:
    """Return the tensors that functional operations make of data, and that have no batch axis."""
    batch = graph.batch
    if batch is None:
        return frozenset()
    fed = dependent(graph.nodes, graph.arguments)

    def is_statistic(node: Node) -> bool:
        layer = node.layer is not None or _has_kernel(node, fed)
        plain = not layer and node.data_inputs(graph.data) and not node.effects
        return bool(plain) and all(batch not in graph.avals[v].shape for v in node.outputs)

    return frozenset(v for node in nodes if is_statistic(node) for v in node.outputs)


def _has_kernel(node: Node, fed: frozenset[int]) -> bool:
    """Whether it multiplies data by what is none, or may do so: not data by data."""
    return isinstance(node, Contraction) and not fed.issuperset(node.inputs)


def stored(graph: Graph) -> list[int]:
    """Return the outputs that are computed beside the activations: what the model stores.

    The others are returned, running statistics of a BatchNorm layer, which its fold computes, and
    what a product with a kernel leads to that is there for nothing else: none leaves the plan.
    """
    fed = dependent(graph.nodes, graph.arguments)
    makers = {v: node for node in graph.nodes for v in node.outputs}
    shown = leading_to(graph, graph.outputs[: graph.returned])

    def is_planned(v: Operand) -> bool:
        maker = makers.get(v) if isinstance(v, int) else None
        if isinstance(maker, BatchNorm) and v in maker.outputs[1:]:
            return True
        return any(_has_kernel(node, fed) for node in leading_to(graph, [v]) - shown)

    others = range(graph.returned, len(graph.outputs))
    return [n for n in others if not is_planned(graph.outputs[n])]
