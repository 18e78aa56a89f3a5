"""Recognise what models make of several operations: softmax, products of two tensors, lookups."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.capture.biases import known_values
from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.log_softmax import find_log_softmax
from simqat_jax.capture.masks import hides_no_mask, merge_masked, take_masks
from simqat_jax.capture.norms import find_norms, find_spreads
from simqat_jax.capture.own_batch_norm import find_own_batch_norms
from simqat_jax.capture.parts import SAME, Parts, maker, reduced_axes, repeated, unwrapped
from simqat_jax.ir.compound import Lookup, MatMul, Softmax
from simqat_jax.ir.graph import (
    Add,
    Contraction,
    Elementwise,
    Float,
    Graph,
    Mean,
    Move,
    Node,
    Operand,
    as_kind,
    gathered_axis,
)


def find_compound(graph: Graph) -> Graph:
    """Find norms, deviations, softmaxes, their logarithms, products of two tensors, lookups."""
    graph = find_spreads(find_own_batch_norms(find_norms(graph)))
    graph = find_log_softmax(find_softmax(graph))
    return find_lookups(find_products_of_two(graph))


# Softmax -----------------------------------------------------------------------------------------


def find_softmax(graph: Graph) -> Graph:
    """Merge `exp(x - max(x)) / sum(exp(x - max(x)))` into one node, with a mask in front of it."""
    draft = Draft(graph)
    for node in graph.nodes:
        if node.primitive == "div" and not node.parts:
            _merge_softmax(draft, node)
    return draft.finished()


def _merge_softmax(draft: Draft, division: Node) -> None:
    parts = Parts(draft, division)
    exp = parts.made_by(division.inputs[0], "exp", Elementwise)
    total = parts.made_by(parts.behind(division.inputs[1]), "reduce_sum", Mean)
    if exp is None or total is None or parts.unconverted(total.inputs[0]) != exp.outputs[0]:
        return
    parts.add(exp, total)
    x = exp.inputs[0]
    difference = parts.made_by(x, "sub")
    if difference is not None:
        highest = parts.made_by(parts.behind(difference.inputs[1]), "reduce_max")
        same = highest is not None and reduced_axes(highest) == reduced_axes(total)
        if highest is not None and same and highest.inputs[0] == difference.inputs[0]:
            parts.add(difference, highest)
            x = difference.inputs[0]
    if not isinstance(x, int) or x not in draft.graph.data or not parts.are_aligned(x):
        return
    scores = take_masks(parts, x, reduced_axes(total))
    if parts.are_closed() and not _is_biased(draft, scores.tensor):
        merge_masked(parts, Softmax, scores, "softmax")


def _is_biased(draft: Draft, v: Operand) -> bool:
    """Whether numbers are added to scores that may be a mask, beside which grids have no digits."""
    node = maker(draft, unwrapped(draft, v))
    return isinstance(node, Add) and not all(hides_no_mask(draft, x) for x in node.inputs)


# Products of two tensors -------------------------------------------------------------------------


def find_products_of_two(graph: Graph) -> Graph:
    """Take the numbers by which a product of two tensors is scaled together with it."""
    graph = _scale_at_once(graph)
    draft = Draft(graph)
    for node in graph.nodes:
        if isinstance(node, Contraction) and _multiplies_two(graph, node):
            _merge_product(draft, node)
    return draft.finished()


def _scale_at_once(graph: Graph) -> Graph:
    """Scale products of two tensors before they get another shape.

    For one example, `jnp.matmul` leaves out the batch axis, and puts it back behind the product.
    """
    draft = Draft(graph)
    for node in graph.nodes:
        if isinstance(node, Contraction) and _multiplies_two(graph, node):
            reshapes = _reshapes_behind(draft, node)
            last = reshapes[-1] if reshapes else node
            scaling = draft.only_reader(last.outputs[0], last) if reshapes else None
            scaled = None if scaling is None else _scaled(draft, scaling)
            if scaling is not None and scaled is not None and draft.aval(scaled[1]).shape == ():
                _exchange(draft, node, reshapes, scaling, scaled)
            for v in dict.fromkeys(node.inputs):
                _scale_last(draft, node, v)
    return draft.finished()


def _scale_last(draft: Draft, product: Node, v: Operand) -> None:
    """Scale an operand of a product behind what gives it other shapes."""
    reshapes: list[Node] = []
    node, reader = maker(draft, v), product
    while node is not None and draft.only_reader(node.outputs[0], node) is reader:
        scaled = _scaled(draft, node)
        if scaled is not None and reshapes and draft.aval(scaled[1]).shape == ():
            made = [draft.made(reshapes[0], scaled[0], reshapes[0].eqn)]
            for behind in reshapes[1:]:
                made.append(draft.made(behind, made[-1].outputs[0], behind.eqn))
            draft.instead.update((replaced, []) for replaced in (node, *reshapes))
            last = made[-1].outputs[0]
            draft.instead[reshapes[-1]] = [*made, _rescaled(draft, node, last, scaled, (v,))]
        if scaled is not None or node.primitive not in SAME or not isinstance(node.inputs[0], int):
            return
        if draft.avals[node.inputs[0]].size != draft.avals[node.outputs[0]].size:
            return
        reshapes.insert(0, node)
        node, reader = maker(draft, node.inputs[0]), node


def _rescaled(
    draft: Draft,
    scaling: Node,
    x: int,
    scaled: tuple[int, Operand, bool],
    outputs: tuple[Operand, ...],
) -> Node:
    """Return what scales another tensor as a node does."""
    _, factor, divides = scaled
    eqn = traced(lax.div if divides else lax.mul, draft.avals[x], draft.aval(factor))
    whole = {"inputs": (x, factor), "outputs": outputs, "run": bound(eqn), "eqn": eqn}
    return dataclasses.replace(scaling, **whole)


def _reshapes_behind(draft: Draft, node: Node) -> list[Node]:
    """Return what gives the result of a node other shapes, and nothing else reads."""
    found: list[Node] = []
    while (behind := draft.only_reader(node.outputs[0], node)) is not None:
        sizes = draft.avals[node.outputs[0]].size, draft.avals[behind.outputs[0]].size
        if behind.primitive not in SAME or behind.parts or sizes[0] != sizes[1]:
            break
        found.append(behind)
        node = behind
    return found


def _exchange(
    draft: Draft,
    product: Node,
    reshapes: Sequence[Node],
    scaling: Node,
    scaled: tuple[int, Operand, bool],
) -> None:
    """Scale a product first, and give it other shapes then."""
    x = product.outputs[0]
    outputs = (draft.beside(scaling.outputs[0], draft.avals[x], -2),)
    made = [_rescaled(draft, scaling, x, scaled, outputs)]
    for node in reshapes:
        outputs = scaling.outputs if node is reshapes[-1] else ()
        made.append(draft.made(node, made[-1].outputs[0], node.eqn, outputs))
        draft.instead[node] = []
    draft.instead[scaling] = made


def _multiplies_two(graph: Graph, node: Contraction) -> bool:
    tensors = node.data_inputs(graph.data)
    floats = all(jnp.issubdtype(graph.avals[v].dtype, jnp.floating) for v in tensors)
    return not node.convolves and len(tensors) == 2 and floats


def _merge_product(draft: Draft, product: Contraction) -> None:
    operands: list[Operand] = list(product.inputs)
    parts, factors = Parts(draft, product), []
    for position, v in enumerate(operands):
        scaling = maker(draft, v)
        if scaling is None or scaling in draft.instead:  # or it belongs to the product before
            continue
        if draft.only_reader(scaling.outputs[0], scaling) is not product:
            continue
        scaled = _scaled(draft, scaling)
        if scaled is not None:
            parts.add(scaling)
            operands[position], *factor = scaled
            factors.append(factor)
    behind = draft.only_reader(product.outputs[0], product)
    scaled = None if behind is None else _scaled(draft, behind)
    if behind is not None and scaled is not None:
        parts.add(behind)
        factors.append(scaled[1:])
    inputs = (*operands, *(factor for factor, _ in factors))
    divides = tuple(divides for _, divides in factors)
    named = {"op": product.op, "path": product.path}
    parts.merged(MatMul, inputs, contraction=product, divides=divides, **named)


def _scaled(draft: Draft, node: Node) -> tuple[int, Operand, bool] | None:
    """Return what a node multiplies or divides by a number without data, and that number."""
    if node.primitive not in ("mul", "div") or isinstance(node, Float) or node.parts:
        return None
    pairs = [node.inputs, node.inputs[::-1]] if node.primitive == "mul" else [node.inputs]
    for v, factor in pairs:
        free = not (isinstance(factor, int) and factor in draft.graph.data)
        if isinstance(v, int) and v in draft.graph.data and free:
            source = repeated(draft, factor)
            if source is not None:
                return v, source, node.primitive == "div"
    return None


# Lookups -----------------------------------------------------------------------------------------


def find_lookups(graph: Graph) -> Graph:
    """Find the gathers of whole rows of a table by integers that depend on the data.

    Raises:
      ValueError: known integers pick rows that a table does not have.
    """
    draft = Draft(graph)

    def found(node: Node) -> Node:
        if not _looks_up(graph, node):
            _check_rows(draft, node)
            return node
        fills = node.eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        return as_kind(Lookup, node, op="lookup", clips=not fills)

    return dataclasses.replace(graph, nodes=tuple(map(found, graph.nodes)))


def _looks_up(graph: Graph, node: Node) -> bool:
    if node.primitive != "gather" or not isinstance(node, Move | Float) or node.layer is not None:
        return False
    table, picked = node.inputs
    depends = [isinstance(v, int) and v in graph.data for v in (table, picked)]
    if depends != [False, True]:
        return False
    fill = node.eqn.params["fill_value"]
    if fill is not None and fill != 0 and not np.isnan(fill):
        return False
    return gathered_axis(node.eqn) == 0


def _check_rows(draft: Draft, node: Node) -> None:
    """Raise ValueError where known integers pick rows beyond a table, which are NaN."""
    if node.primitive != "gather" or node.data_inputs(draft.graph.data) or node.layer is not None:
        return
    table, picked = node.inputs
    fills = node.eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    fill = node.eqn.params["fill_value"]
    if not fills or not (fill is None or np.isnan(fill)) or gathered_axis(node.eqn) != 0:
        return
    if not isinstance(table, int) or any(
        reader.primitive == "select_n" for v in node.outputs for reader in draft.readers[v]
    ):
        return
    values, rows = known_values(draft, picked), draft.avals[table].shape[0]
    if values is None or not values.size or -1 < values.min() <= values.max() < rows:
        return
    raise ValueError(
        f"{'/'.join((*node.path, node.op))}: it picks row {int(values.max())} of a table of {rows} "
        f"rows, numbered from 0, which gives NaN. Make the table longer, or the sequence shorter."
    )
