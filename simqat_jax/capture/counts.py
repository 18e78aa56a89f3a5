"""Means of what a mask leaves in: sums, or what else, divided by how much that is."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.capture.classify import POINTWISE
from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.masked import thin
from simqat_jax.capture.parts import SAME, Parts, maker, number
from simqat_jax.capture.passes import computed
from simqat_jax.capture.truths import Choice, Choices
from simqat_jax.ir import replay
from simqat_jax.ir.compound import CountedMean
from simqat_jax.ir.graph import Constant, Graph, Mean, Node, Operand, as_kind, shape_of

_MOST = 2**16
"""What may count more has no table of divisors."""


def find_counted_means(graph: Graph) -> Graph:
    """Find what is divided by what is made of a count of truth values, sums above all."""
    draft, of_layers = Draft(graph), computed(graph)
    for node in graph.nodes:
        if node.primitive in ("div", "mul") and not node.parts and node.layer is None:
            _merge_mean(draft, node, of_layers)
    return draft.finished()


def _merge_mean(draft: Draft, node: Node, of_layers: frozenset[int]) -> None:
    sides = [node.inputs] if node.primitive == "div" else [node.inputs, node.inputs[::-1]]
    for numerator, divisor in sides:
        shape = draft.avals[node.outputs[0]].shape
        if numerator not in of_layers or divisor in of_layers:
            continue
        if draft.aval(numerator).shape != shape:
            continue
        parts = Parts(draft, node)
        x, axes = _sum(parts, numerator) or (numerator, ())
        if not axes or not parts.are_closed():
            parts, x, axes = Parts(draft, node), numerator, ()
        counts = Counts(draft, node)
        found = counts.of(thin(draft, divisor))
        if found is not None and draft.aval(x).dtype == jnp.float32:
            with np.errstate(divide="ignore"):
                table = found.numbers if node.primitive == "div" else 1 / found.numbers
            draft.instead.update((part, []) for part in parts.ordered)
            mean = divided(draft, node, x, axes, Counted(found.counts, table))
            draft.instead[node] = [*counts.made, mean]
            return


def _sum(parts: Parts, v: Operand) -> tuple[Operand, tuple[int, ...]] | None:
    """Return of what and along which axes an operand is a sum, maybe in another shape."""
    draft, source = parts.draft, parts.behind(v)
    total = parts.made_by(source, "reduce_sum", Mean)
    if total is None or draft.aval(source).size != draft.aval(v).size:
        return None
    parts.add(total)
    return total.inputs[0], tuple(map(int, total.eqn.params["axes"]))


def divided(
    draft: Draft, node: Node, x: Operand, axes: tuple[int, ...], divisors: "Counted"
) -> CountedMean:
    """Return what makes the result of a node of sums that are divided by what a count tells."""
    result = draft.avals[node.outputs[0]]

    def mean(x: jax.Array, count: jax.Array, numbers: jax.Array) -> jax.Array:
        sums = (lax.reduce_sum(x, axes) if axes else x).reshape(result.shape)
        return (sums / numbers.at[count].get(mode="promise_in_bounds")).astype(result.dtype)

    inputs = (x, divisors.counts, Constant(divisors.numbers.astype(np.float32)))
    eqn = traced(jax.jit(mean), *map(draft.aval, inputs))
    whole = {"inputs": inputs, "run": bound(eqn), "eqn": eqn, "axes": axes}
    return as_kind(CountedMean, node, op="mean", parts=(), **whole)


class Counted(NamedTuple):
    """Numbers that depend on a count alone.

    Attributes:
      counts: int32; they broadcast to the numbers.
      numbers: at each count, from 0 on.
    """

    counts: int
    numbers: np.ndarray


class Counts:
    """What is made of counts of truth values.

    Attributes:
      made: the nodes that count.
    """

    def __init__(self, draft: Draft, at: Node):
        self.draft, self.at = draft, at
        self.made: list[Node] = []
        self._choices = Choices(draft)
        self._known: dict[Operand, Counted | None] = {}
        self._counted: dict[tuple[Choice, tuple[int, ...]], int] = {}

    def of(self, v: Operand) -> Counted | None:
        """Return what a tensor is made of, if it is one count and numbers that are known."""
        if v not in self._known:
            self._known[v] = self._of(v)
        return self._known[v]

    def _of(self, v: Operand) -> Counted | None:
        node = maker(self.draft, v)
        if node is None or node.layer is not None or node.remat != self.at.remat:
            return None
        if node.primitive == "reduce_sum":
            return self._of_sum(node)
        if node.primitive in (*SAME, "transpose"):
            return self._moved(node)
        return self._of_function(node) if node.primitive in POINTWISE else None

    def _of_sum(self, node: Node) -> Counted | None:
        """Return how often truth values are those that are 1 in a sum of zeros and ones."""
        mask, axes = self._choices.of(node.inputs[0], self.at), tuple(node.eqn.params["axes"])
        made = self.draft.instead.pop(self.at, [])  # truth values
        shape = self.draft.aval(node.inputs[0]).shape
        most = math.prod(shape[a] for a in axes)
        of_batch = 0 in axes and shape[0] == self.draft.graph.batch  # another table for each size
        if mask is None or not mask.is_binary or of_batch or most >= _MOST:
            return None

        def count(truth: jax.Array) -> jax.Array:
            return jnp.sum(truth if mask.yes else ~truth, axes, dtype=jnp.int32)

        if (mask, axes) not in self._counted:
            truth = thin(self.draft, mask.truth)
            lengths = self.draft.aval(truth).shape
            truth = truth if all(lengths[a] == shape[a] for a in axes) else mask.truth
            counted = self.draft.computed(self.at, "count", jax.jit(count), truth)
            self.made += [*made, counted]
            self._counted[mask, axes] = counted.outputs[0]
        numbers = np.arange(most + 1, dtype=self.draft.avals[node.outputs[0]].dtype)
        return Counted(self._counted[mask, axes], numbers)

    def _moved(self, node: Node) -> Counted | None:
        found = self.of(node.inputs[0])
        if found is None or node.primitive in ("copy", "stop_gradient"):
            return found
        primitive, params = node.eqn.primitive, node.eqn.params
        thinner = self.draft.avals[found.counts].shape  # what repeats an axis takes it at length 1
        shape = self.draft.aval(node.inputs[0]).shape
        shape = thinner if primitive.name == "broadcast_in_dim" else shape

        def move(x: jax.Array) -> jax.Array:
            return primitive.bind(jnp.broadcast_to(x, shape), **params)

        moved = self.draft.computed(self.at, "count", jax.jit(move), found.counts)
        self.made.append(moved)
        return found._replace(counts=moved.outputs[0])

    def _of_function(self, node: Node) -> Counted | None:
        """Return what a function of each number makes of one count and known numbers."""
        known = [number(self.draft, v) for v in node.inputs]
        counted = [self.of(v) for v, x in zip(node.inputs, known, strict=True) if x is None]
        found = [c for c in counted if c is not None]
        if not found or len(found) < len(counted) or len({c.counts for c in found}) > 1:
            return None
        each, length = iter(found), len(found[0].numbers)
        values = [
            next(each).numbers if x is None else np.full(length, x, shape_of(v).dtype)
            for v, x in zip(node.eqn.invars, known, strict=True)
        ]
        with jax.ensure_compile_time_eval():
            (numbers,) = replay.results(node.eqn, values)
        return found[0]._replace(numbers=np.asarray(numbers))
