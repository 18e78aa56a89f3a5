"""Masks that are divided by their counts before they weight a sum: the sum is divided instead.

`(x * (mask / mask.sum())).sum()` is `(x * mask).sum() / mask.sum()`, of numbers that eight bits
hold: the share of one of many is less than a step of a grid on which there is all of one.
"""

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.capture.contractions import identity
from simqat_jax.capture.counts import Counts, divided
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.masked import Weighting, masked, thin, weighting
from simqat_jax.capture.parts import SAME, maker
from simqat_jax.capture.passes import computed
from simqat_jax.capture.truths import Choices
from simqat_jax.ir.graph import Graph, Mean, Node, Operand

_KEEP = frozenset(("copy", "stop_gradient", "convert_element_type"))
_MOVES = (SAME - _KEEP) | {"transpose"}


def find_shares(graph: Graph) -> Graph:
    """Find sums that are weighted by a mask which is divided by how much it leaves in."""
    draft, of_layers = Draft(graph), computed(graph)
    for node in graph.nodes:
        product = _product(draft, node)
        if product is None or node.outputs[0] in graph.repeated:
            continue
        for data, (x, v) in enumerate((product.inputs, product.inputs[::-1])):
            if x in of_layers and v not in of_layers:
                _merge_sum(draft, node, product, data)
    return draft.finished()


def _product(draft: Draft, node: Node) -> Node | None:
    """Return what multiplies the terms of a sum; a matrix product does so itself."""
    if node.layer is not None or node.parts:
        return None
    if node.primitive == "dot_general":
        return node
    if not isinstance(node, Mean) or node.primitive != "reduce_sum":
        return None
    product = maker(draft, node.inputs[0])
    if product is None or product.primitive != "mul":
        return None
    return product if draft.only_reader(product.outputs[0], product) is node else None


def _merge_sum(draft: Draft, node: Node, product: Node, data: int) -> None:
    x, v = product.inputs[data], product.inputs[1 - data]
    rank = len(draft.aval(x).shape)
    if node is product:
        weights = weighting(draft, node, data)
    else:
        summed = tuple(map(int, node.eqn.params["axes"]))
        left = tuple(a for a in range(rank) if a not in summed)
        weights = Weighting(summed, left, (*summed, *left))
    division, moves = _division(draft, v)
    if weights is None or division is None:
        return
    axes, shape = weights.summed, draft.avals[division.outputs[0]].shape
    result = draft.avals[node.outputs[0]].shape
    if weights.order(rank) != identity(range(rank - len(axes))):
        return

    def moved(x: jax.Array) -> jax.Array:
        """Give what the mask is made of the axes of the data."""
        x = jnp.broadcast_to(x, shape)
        for move in moves:
            x = move.eqn.primitive.bind(x, **move.eqn.params)
        return weights.beside(x, rank)

    def of_sums(count: jax.Array) -> jax.Array:
        first = tuple(slice(1) if a in axes else slice(None) for a in range(rank))
        count = lax.squeeze(moved(count)[first], axes)
        return count.reshape((*count.shape, *(1,) * (len(result) - count.ndim)))

    mask, counts = Choices(draft).of(division.inputs[0], node), Counts(draft, node)
    made = draft.instead.pop(node, [])  # truth values
    divisor = thin(draft, division.inputs[1])
    found = counts.of(divisor)
    if mask is None or not mask.is_binary or found is None:
        return
    with jax.ensure_compile_time_eval():
        places = moved(jnp.arange(draft.aval(divisor).size).reshape(draft.aval(divisor).shape))
        if bool(jnp.any(places != places.max(axes, keepdims=True))):
            return  # it is another one for some of the terms of a sum
    truths = draft.computed(node, "mask", jax.jit(moved), mask.truth)
    kept = masked(draft, node, x, truths.outputs[0], bool(mask.yes))
    count = draft.computed(node, "count", jax.jit(of_sums), found.counts)
    mean = divided(draft, node, kept.outputs[0], axes, found._replace(counts=count.outputs[0]))
    draft.instead[node] = [*made, *counts.made, truths, kept, count, mean]


def _division(draft: Draft, v: Operand) -> tuple[Node | None, list[Node]]:
    """Return the division that makes a tensor, and what gives its result other shapes, in order."""
    moves: list[Node] = []
    node = maker(draft, v)
    while node is not None and node.primitive in (*_MOVES, *_KEEP):
        moves = [node, *moves] if node.primitive in _MOVES else moves
        node = maker(draft, node.inputs[0])
    return (node if node is not None and node.primitive == "div" else None), moves
