"""Which tensors must lie on a grid, and which lead to what a model returns."""

from collections.abc import Sequence
from typing import NamedTuple

from simqat_jax.ir.graph import Graph
from simqat_jax.ir.plan import Step
from simqat_jax.ops.registry import operation_of


class Marks(NamedTuple):
    """What is asked of tensors.

    Attributes:
      needed: those that an integer operation reads.
      wanted: those that lead to an activation that the model returns.
    """

    needed: set[int]
    wanted: set[int]


def demand(graph: Graph, steps: Sequence[Step]) -> Marks:
    """Walk backwards through a model; of a tensor, the same is asked in every step of a loop."""
    marks, known = Marks(set(), graph.activations()), -1
    while known < len(marks.needed) + len(marks.wanted):
        known = len(marks.needed) + len(marks.wanted)
        _walk_backwards(graph, steps, marks)
        # A cell that starts on a grid is on grids from there on, as one that starts from zero is.
        marks.needed.update(graph.carried & graph.data & marks.wanted - graph.exact)
        for marked in marks:
            keys = {graph.repeated[v] for v in marked if v in graph.repeated}
            same = {v for v, key in graph.repeated.items() if key in keys}
            marked.update(same - graph.exact)
    return marks


def _walk_backwards(graph: Graph, steps: Sequence[Step], marks: Marks) -> None:
    for step in reversed(steps):
        outs = {step.output, *step.node.outputs}
        needed = not outs.isdisjoint(marks.needed)
        wanted = needed or not outs.isdisjoint(marks.wanted)
        data = step.node.tensors(graph.data)
        asked = operation_of(step.node).demand(data, needed=needed, wanted=wanted)
        marks.needed.update(set(asked.needed) - graph.exact)
        marks.wanted.update(asked.wanted)
