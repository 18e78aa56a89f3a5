"""Masks of zeros and ones: what they leave out of tensors."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.capture.biases import FAR
from simqat_jax.capture.contractions import identity, traced, transposition
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.parts import SAME, maker, number
from simqat_jax.capture.passes import computed, dependent
from simqat_jax.capture.truths import Choice, Choices
from simqat_jax.ir.compound import Masked, Selected
from simqat_jax.ir.graph import Graph, Mean, Node, Operand, as_kind, shape_of

_LARGE = 1e3
"""A grid that reaches as far has no digits for activations."""
_EXTREMES = (("reduce_min",), ("reduce_max", "reduce_window_max"))
"""What the highest numbers count for nothing in, and the lowest ones."""
_COMPARISONS = frozenset("eq ne lt le gt ge is_finite".split())


def find_masked(graph: Graph) -> Graph:
    """Find what a mask leaves out of a tensor: in products with it, selections and their sums.

    A mask is made of the model's inputs alone: truth values, or numbers 0 and 1 made of these.
    """
    masks = _Masks(graph)
    for node in graph.nodes:
        if node.layer is None and not node.parts and node.outputs[0] not in graph.repeated:
            masks.visit(node)
    return dataclasses.replace(masks.draft.finished(), far=frozenset(masks.far))


class _Masks:
    """What masks leave out of the tensors of a graph."""

    def __init__(self, graph: Graph):
        self.draft = Draft(graph)
        self.choices = Choices(self.draft)
        self.computed = computed(graph)
        self.random = dependent(graph.nodes, graph.keys)
        self.far: set[int] = set()
        self._rules: Mapping[str, Callable[[Node, Operand, Operand], list[Node]]] = {
            "mul": self._of_product,
            "dot_general": self._of_sum,
            **dict.fromkeys(("add", "sub"), self._of_addition),
        }

    def visit(self, node: Node) -> None:
        """Put what leaves out numbers in the place of a node that does."""
        found = self._found(node)
        made = self.draft.instead.pop(node, [])  # truth values
        if found:
            self.draft.instead[node] = [*made, *found]

    def _found(self, node: Node) -> list[Node]:
        if not jnp.issubdtype(self.draft.avals[node.outputs[0]].dtype, jnp.floating):
            return []
        if node.primitive == "select_n":
            return self._of_selection(node)
        of = self._rules.get(node.primitive)
        if of is None:
            return []
        for x, mask in (node.inputs, node.inputs[::-1])[: 1 if node.primitive == "sub" else 2]:
            if x in self.computed and self._may_mask(mask):
                return of(node, x, mask)
        return []

    def _may_mask(self, v: Operand) -> bool:
        return v not in self.computed and v not in self.random

    def _of_selection(self, node: Node) -> list[Node]:
        truth, *cases = node.inputs
        aval = self.draft.aval(truth)
        if len(cases) != 2 or aval.dtype != bool or not aval.shape or not self._may_mask(truth):
            return []
        for keeps, x in enumerate(cases):
            fill = number(self.draft, cases[1 - keeps])
            if x in self.computed and fill is not None and self._fills(node, fill):
                mask = thin(self.draft, truth)
                return [masked(self.draft, node, x, mask, bool(keeps), node.outputs, fill)]
        known = [number(self.draft, v) or 0.0 for v in cases]
        if self.computed.isdisjoint(cases) or max(map(abs, known)) >= FAR:
            return []
        return [self._selected(node, thin(self.draft, truth), cases)]

    def _selected(self, node: Node, truth: Operand, cases: Sequence[Operand]) -> Node:
        """Return a node that selects between tensors of one grid."""

        def selected(no: jax.Array, yes: jax.Array, truth: jax.Array) -> jax.Array:
            return jnp.where(truth, yes, no)

        inputs = (*cases, truth)
        eqn = traced(jax.jit(selected), *map(self.draft.aval, inputs))
        whole = {"inputs": inputs, "run": bound(eqn), "eqn": eqn}
        return as_kind(Selected, node, op="select", parts=(), **whole)

    def _of_addition(self, node: Node, x: Operand, v: Operand) -> list[Node]:
        """Return what puts a number that is far from all others where a mask adds it."""
        mask = self.choices.of(v, node)
        if mask is None or self.draft.aval(x).shape != self.draft.avals[node.outputs[0]].shape:
            return []
        sign = -1 if node.primitive == "sub" else 1
        for keeps, fill, rest in ((True, mask.no, mask.yes), (False, mask.yes, mask.no)):
            if rest == 0 != fill and self._fills(node, sign * float(fill)):
                given = keeps, node.outputs, sign * float(fill)
                return [masked(self.draft, node, x, mask.truth, *given)]
        return []

    def _fills(self, node: Node, fill: float) -> bool:
        """Whether a mask may put a number into a tensor: zero, or the end of a grid in its place.

        It may be an end where nothing but extremes reads the tensor: there it counts for nothing.
        """
        v = node.outputs[0]
        if fill == 0 or (abs(fill) >= FAR and self._leads_to(v, _EXTREMES[fill < 0])):
            return True
        if abs(fill) >= _LARGE:
            self.far.add(v)
        return False

    def _leads_to(self, v: int, ends: Collection[str]) -> bool:
        """Whether nothing but such operations, of no compared results, reads a tensor."""
        readers = self._readers(v)
        return v not in self.draft.graph.outputs and all(
            node.primitive in ends
            and not any(r.primitive in _COMPARISONS for r in self._readers(node.outputs[0]))
            for node in readers
        )

    def _readers(self, v: int) -> Iterator[Node]:
        """Yield what reads a tensor, maybe in another shape or precision."""
        for node in self.draft.readers[v]:
            moves = node.primitive in (*SAME, "transpose", "convert_element_type")
            if moves and node.outputs[0] not in self.draft.graph.outputs:
                yield from self._readers(node.outputs[0])
            else:
                yield node

    def _of_product(self, node: Node, x: Operand, v: Operand) -> list[Node]:
        mask = self._mask(node, thin(self.draft, v))
        if mask is None or self.draft.aval(x).shape != self.draft.avals[node.outputs[0]].shape:
            return []
        return [masked(self.draft, node, x, mask.truth, bool(mask.yes), node.outputs)]

    def _of_sum(self, node: Node, x: Operand, v: Operand) -> list[Node]:
        """Return what multiplies each number by one of a mask, and sums."""
        draft, aval, result = self.draft, self.draft.aval(x), self.draft.avals[node.outputs[0]]
        weights = weighting(draft, node, node.inputs.index(x))
        mask = self._mask(node, v) if weights else None
        if weights is None or mask is None:
            return []
        beside = jax.jit(lambda t: weights.beside(t, len(aval.shape)))
        truths = draft.computed(node, "mask", beside, mask.truth)
        kept = masked(draft, node, x, truths.outputs[0], bool(mask.yes))
        add = traced(lambda x: lax.reduce_sum(x, weights.summed), aval)
        order, aval, shape = weights.order(len(aval.shape)), shape_of(add.outvars[0]), result.shape
        moves = []
        if order != identity(order):
            moves.append(transposition(aval, order))
            aval = shape_of(moves[-1].outvars[0])
        if aval.shape != shape:
            moves.append(traced(lambda x: x.reshape(shape), aval))
        outputs = (draft.new(shape_of(add.outvars[0])),) if moves else node.outputs
        whole = {"outputs": outputs, "run": bound(add), "eqn": add, "parts": ()}
        made = [truths, kept, as_kind(Mean, node, op="sum", inputs=kept.outputs, **whole)]
        for move in moves:
            outputs = node.outputs if move is moves[-1] else ()
            made.append(draft.made(node, made[-1].outputs[0], move, outputs))
        return made

    def _mask(self, node: Node, v: Operand) -> Choice | None:
        """Return the truth values that numbers 0 and 1 are."""
        mask = self.choices.of(v, node)
        return mask if mask is not None and mask.is_binary else None


def masked(
    draft: Draft,
    node: Node,
    x: Operand,
    truth: Operand,
    keeps: bool,
    outputs: tuple[int, ...] = (),
    fill: float = 0.0,
) -> Node:
    """Return a node that leaves out what a mask does, where `node` is."""
    aval = draft.aval(x)

    def function(x: jax.Array, truth: jax.Array) -> jax.Array:
        return jnp.where(truth if keeps else ~truth, x, jnp.asarray(fill, x.dtype))

    eqn = traced(jax.jit(function), aval, draft.aval(truth))
    outputs = outputs or (draft.new(aval),)
    whole = {"inputs": (x, truth), "outputs": outputs, "run": bound(eqn), "eqn": eqn}
    return as_kind(Masked, node, op="mask", parts=(), keeps=keeps, fill=fill, **whole)


class Weighting(NamedTuple):
    """A matrix product in which each number of the data is multiplied by one weight, and summed.

    Attributes:
      summed: the axes of the data that are summed over.
      batch: its axes that the result has first, in order.
      own: for each of these axes, in order, that of the weights.
    """

    summed: tuple[int, ...]
    batch: tuple[int, ...]
    own: tuple[int, ...]

    def beside(self, x: jax.Array, rank: int) -> jax.Array:
        """Give weights the axes of data of a rank, of length 1 where they have none."""
        axes = dict(zip((*self.summed, *self.batch), self.own, strict=True))
        order = [axes[a] for a in sorted(axes)]
        turned = lax.transpose(x, (*order, *(a for a in range(x.ndim) if a not in order)))
        lengths = iter(turned.shape)
        return turned.reshape([next(lengths) if a in axes else 1 for a in range(rank)])

    def order(self, rank: int) -> tuple[int, ...]:
        """Return in which order the product has the axes that a sum leaves of data of a rank."""
        left = [a for a in range(rank) if a not in self.summed]
        return tuple(map(left.index, (*self.batch, *(a for a in left if a not in self.batch))))


def weighting(draft: Draft, node: Node, data: int) -> Weighting | None:
    """Return how a matrix product weights data; None: each weight multiplies several numbers.

    Args:
      draft: the graph.
      node: the product.
      data: which of its operands are the data.
    """
    summed, batch = node.eqn.params["dimension_numbers"]
    own = (*summed[1 - data], *batch[1 - data])
    x, weights = (draft.aval(node.inputs[k]) for k in (data, 1 - data))
    if any(n > 1 and a not in own for a, n in enumerate(weights.shape)):
        return None
    if x.dtype != draft.avals[node.outputs[0]].dtype:
        return None
    return Weighting(tuple(summed[data]), tuple(batch[data]), own)


def thin(draft: Draft, v: Operand) -> Operand:
    """Return what an operand repeats along axes of length 1."""
    node = maker(draft, v)
    while node is not None and node.primitive == "broadcast_in_dim":
        if len(draft.aval(node.inputs[0]).shape) < len(draft.aval(v).shape):
            break
        v = node.inputs[0]
        node = maker(draft, v)
    return v
