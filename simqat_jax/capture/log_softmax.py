"""Logarithms of a softmax, as JAX's function and as models write them."""

from simqat_jax.capture.classify import calls, inner_equations
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.masks import Scores, merge_masked, take_masks
from simqat_jax.capture.parts import Parts, number, reduced_axes
from simqat_jax.ir.compound import LogSoftmax
from simqat_jax.ir.graph import Add, Elementwise, Graph, Mean, Node, Operand


def find_log_softmax(graph: Graph) -> Graph:
    """Merge `x - log(sum(exp(x)))` into one node, also where `exp(x - max(x))` is added up."""
    draft = Draft(graph)
    for node in graph.nodes:
        if calls(node.eqn, "log_softmax", "reduce_max max sub exp reduce_sum log sub"):
            _replace_function(draft, node)
        elif isinstance(node, Add) and node.subtracts and not node.parts:
            _merge(draft, node)
    return draft.finished()


def _replace_function(draft: Draft, node: Node) -> None:
    reductions = [eqn for eqn in inner_equations(node.eqn) if "axes" in eqn.params]
    axes = {tuple(map(int, eqn.params["axes"])) for eqn in reductions}
    (x,) = node.inputs
    if len(axes) == 1 and isinstance(x, int):
        _merge_behind_masks(Parts(draft, node), x, axes.pop())


def _merge_behind_masks(parts: Parts, x: int, axes: tuple[int, ...]) -> None:
    """Merge parts that make the logarithm of a softmax of a tensor, with masks in front of it."""
    alone = Parts(parts.draft, parts.ordered[-1])
    alone.add(*parts.nodes)
    scores = take_masks(parts, x, axes)
    if not parts.are_closed():  # something else reads masked scores
        parts, scores = alone, Scores(x, axes)
    if parts.are_closed():
        merge_masked(parts, LogSoftmax, scores, "log_softmax")


def _merge(draft: Draft, last: Node) -> None:
    parts = Parts(draft, last)
    x, behind = last.inputs[0], parts.behind(last.inputs[1])
    added, shift = parts.made_by(behind, "add", Add), None
    if added is not None:  # x - (log(sum(exp(x - shift))) + shift)
        parts.add(added)
        pairs = (added.inputs, added.inputs[::-1])
        logs = [(a, b) for a, b in pairs if parts.made_by(parts.behind(a), "log")]
        if len(logs) != 1:
            return
        behind, shift = map(parts.behind, logs[0])
    total = _sum_of_exponentials(parts, behind)
    if total is None:
        return
    axes, y = total
    difference = parts.made_by(y, "sub", Add)
    maximum = None if difference is None else _maximum_taken_off(draft, difference, axes)
    if difference is not None and maximum is not None:
        parts.add(*maximum.nodes)
        same = shift is None or parts.behind(difference.inputs[1]) == shift
        starts_with = difference.outputs[0] if shift is None else difference.inputs[0]
        if not same or starts_with != x:
            return
        x = difference.inputs[0]
    elif shift is not None or x != y:
        return
    if isinstance(x, int) and x in draft.graph.data and parts.are_aligned(x):
        _merge_behind_masks(parts, x, axes)


def _sum_of_exponentials(parts: Parts, v: Operand) -> tuple[tuple[int, ...], Operand] | None:
    """Return the axes and the exponents of a sum of which a tensor is the logarithm."""
    log = parts.made_by(v, "log", Elementwise)
    if log is None:
        return None
    v = parts.behind(log.inputs[0])
    magnitude = parts.made_by(v, "abs", Elementwise)  # as `logsumexp` does
    if magnitude is not None:
        parts.add(magnitude)
        v = parts.behind(magnitude.inputs[0])
    total = parts.made_by(v, "reduce_sum", Mean)
    if total is None:
        return None
    exp = parts.made_by(parts.unconverted(total.inputs[0]), "exp", Elementwise)
    if exp is None:
        return None
    parts.add(log, total, exp)
    return reduced_axes(total), exp.inputs[0]


def _maximum_taken_off(draft: Draft, difference: Node, axes: tuple[int, ...]) -> Parts | None:
    """Return the nodes that subtract its maximum along axes from a tensor."""
    parts = Parts(draft, difference)
    v = parts.behind(difference.inputs[1])
    choice = parts.made_by(v, "select_n", Elementwise)  # zero where it is infinite
    if choice is not None:
        condition, zero, v = choice.inputs
        finite = parts.made_by(condition, "is_finite", Elementwise)
        if finite is None or finite.inputs[0] != v or number(draft, zero) != 0:
            return None
        parts.add(choice, finite)
        v = parts.behind(v)
    highest = parts.made_by(v, "reduce_max")
    if highest is None or reduced_axes(highest) != axes:
        return None
    parts.add(highest)
    return parts if highest.inputs[0] == difference.inputs[0] else None
