"""BatchNorms that models write by hand: one slope and one shift for each channel."""

from collections.abc import Iterator
from typing import NamedTuple

from simqat_jax.capture.draft import Draft
from simqat_jax.capture.parts import SAME, Parts, reduced_axes
from simqat_jax.ir.compound import ChannelAffine
from simqat_jax.ir.graph import Float, Graph, Node, Operand

_STEPS = ("add", "sub", "mul", "div")
_PASSES = frozenset((*_STEPS, *SAME, "convert_element_type"))
"""What a factor may be made of besides a root."""


class _Step(NamedTuple):
    """An operation on a tensor and one number for each of its channels.

    Attributes:
      node: the operation.
      x: the tensor.
      v: the numbers.
    """

    node: Node
    x: int
    v: Operand


def find_own_batch_norms(graph: Graph) -> Graph:
    """Merge what scales and shifts the channels of a tensor, by a root among others, into one node.

    In training these are statistics of the batch, in evaluation they do not depend on the data:
    both must come out alike, as ranges are those of training.
    """
    draft, taken = Draft(graph), set[Node]()
    for node in graph.nodes:
        steps = [] if node in taken else _steps_from(draft, node)
        if _is_batch_norm(draft, steps):
            taken.update(step.node for step in steps)
            _merge(draft, steps)
    return draft.finished()


def _merge(draft: Draft, steps: list[_Step]) -> None:
    last, operands = steps[-1].node, [step.v for step in steps]
    parts = Parts(draft, last)
    parts.add(*(step.node for step in steps))
    parts.merged(
        ChannelAffine,
        (steps[0].x, *operands),
        keep=True,
        op=last.op,
        steps=tuple(step.node.primitive for step in steps),
        training=any(v in draft.graph.data for v in operands),
    )


def _is_batch_norm(draft: Draft, steps: list[_Step]) -> bool:
    data = draft.graph.data
    return (
        any(_is_rooted(draft, step) for step in steps)
        and len({step.node.remat for step in steps}) == 1
        and all(_is_of_batch(draft, s.v, steps[0].x) for s in steps if s.v in data)
    )


def _steps_from(draft: Draft, first: Node) -> list[_Step]:
    """Return the operations on each channel that follow each other."""
    step, steps, rooted = _step(draft, first), list[_Step](), False
    while step is not None:
        steps.append(step)
        rooted = rooted or _is_rooted(draft, step)
        step = _following(draft, step.node, rooted)
    return steps


def _step(draft: Draft, node: Node) -> _Step | None:
    if node.primitive not in _STEPS or isinstance(node, Float) or node.parts:
        return None
    if node.layer is not None or node in draft.instead:
        return None
    shape = draft.avals[node.outputs[0]].shape
    numbers = (*(1,) * (len(shape) - 1), *shape[-1:])
    pairs = [node.inputs, node.inputs[::-1]]
    for x, v in pairs[:1] if node.primitive in ("sub", "div") else pairs:
        if not isinstance(x, int) or x not in draft.graph.data:
            continue
        if draft.avals[x].shape == shape != numbers == draft.aval(v).shape:
            return _Step(node, x, v)
    return None


def _following(draft: Draft, node: Node, rooted: bool) -> _Step | None:
    """Return the next operation on each channel.

    What is subtracted first, statistics of the batch may read as well.
    """
    y = node.outputs[0]
    readers = draft.readers[y]
    if y in draft.graph.outputs or (rooted and len(readers) > 1):
        return None
    steps = [step for reader in readers if (step := _step(draft, reader)) and step.x == y]
    return steps[0] if len(steps) == 1 else None


def _is_rooted(draft: Draft, step: _Step) -> bool:
    """Whether it multiplies or divides by what a square root was taken of."""
    if step.node.primitive not in ("mul", "div"):
        return False
    passed = _behind(draft, step.v, step.x, _PASSES)
    return any(node.primitive in ("sqrt", "rsqrt") for node in passed)


def _is_of_batch(draft: Draft, v: Operand, x: int) -> bool:
    """Whether numbers are made of statistics over the batch of a tensor."""
    return any(0 in reduced_axes(node) for node in _behind(draft, v, x))


def _behind(
    draft: Draft, v: Operand, x: int, through: frozenset[str] | None = None
) -> Iterator[Node]:
    """Yield the nodes that lead to an operand, back to `x`; `through`: these alone are passed."""
    waiting, seen = [v], {x}
    while waiting:
        v = waiting.pop()
        node = draft.producers.get(v) if isinstance(v, int) and v not in seen else None
        if isinstance(v, int):
            seen.add(v)
        if node is not None:
            yield node
            if through is None or node.primitive in through:
                waiting += node.inputs
