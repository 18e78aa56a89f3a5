"""Tensors of two numbers, as truth values choose: masks, as models make and use them."""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from simqat_jax.capture.biases import without_digits
from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.parts import SAME, maker, number
from simqat_jax.capture.passes import reading
from simqat_jax.ir.graph import Constant, Elementwise, Graph, Node, Operand, as_kind

_KEEP = frozenset(("copy", "stop_gradient"))
_MOVES = (SAME - _KEEP) | {"transpose", "rev", "slice"}
_OF_TWO = {"mul": lax.bitwise_and, "min": lax.bitwise_and, "max": lax.bitwise_or}
_ARITHMETIC = {
    **{"mul": operator.mul, "div": operator.truediv},
    **{"add": operator.add, "sub": operator.sub},
}
_COMPARE = {
    **{"ne": operator.ne, "eq": operator.eq, "gt": operator.gt},
    **{"ge": operator.ge, "lt": operator.lt, "le": operator.le},
}


class Choice(NamedTuple):
    """Numbers of which there are two.

    Attributes:
      truth: truth values.
      no: the number where they are false.
      yes: where they are true.
    """

    truth: int
    no: np.float32
    yes: np.float32

    @property
    def is_binary(self) -> bool:
        """Whether they are 0 and 1, in any order."""
        return {self.no, self.yes} == {0, 1}


def read_truths(graph: Graph) -> Graph:
    """Read truth values in the place of numbers that were made of them, where these are a mask.

    `nn.make_attention_mask` returns numbers, and attention compares them with zero. Their products
    are conjunctions, and `1 - mask` is what a mask is not. Where one of two numbers that are added
    is so low that no digit of a sum is left, and the other one zero, the sum is a selection.
    """
    draft = Draft(graph)
    choices = Choices(draft)
    instead: dict[int, int] = {}
    for node in graph.nodes:
        if node.parts or node.layer is not None:
            continue
        made = choices.of_comparison(node)
        made = choices.of_sum(node) if made is None else made
        if made is None:
            draft.instead.pop(node, None)
        else:
            instead[node.outputs[0]] = made
    if not instead:
        return graph
    found = draft.finished()
    nodes = (reading(node, instead) for node in found.nodes if node.outputs[0] not in instead)
    outputs = tuple(instead.get(v, v) if isinstance(v, int) else v for v in graph.outputs)
    return dataclasses.replace(found, nodes=tuple(nodes), outputs=outputs)


class Choices:
    """The tensors of two numbers in a graph."""

    def __init__(self, draft: Draft):
        self.draft = draft
        self._others: set[Operand] = set()

    def of_comparison(self, node: Node) -> int | None:
        """Return the truth values that a comparison of two numbers with a third is."""
        compare = _COMPARE.get(node.primitive)
        if compare is None:
            return None
        found = self._with_number(node, compare, node)
        if found is None or found.no == found.yes:
            return None
        return found.truth if found.yes else self._made(node, lax.bitwise_not, found.truth)

    def of_sum(self, node: Node) -> int | None:
        """Return the selection that the sum of a tensor and a mask is."""
        if node.primitive not in ("add", "add_any") or not self._is_float(node.outputs[0]):
            return None
        for x, added in (node.inputs, node.inputs[::-1]):
            if not self._is_data(added) or self.of(x, node) is not None:
                continue
            mask = self._mask(self.of(added, node), node)
            if mask is not None:
                return self._selected(node, mask, x)
        return None

    def rising(self, found: Choice, at: Node) -> Choice:
        """Return the same numbers by the truth values that are true at the higher one."""
        if found.no <= found.yes:
            return found
        return Choice(self._made(at, lax.bitwise_not, found.truth), found.yes, found.no)

    def of(self, v: Operand, at: Node) -> Choice | None:
        """Return which two numbers a tensor consists of; what makes truths comes before `at`."""
        node = maker(self.draft, v)
        if node is None or node.remat != at.remat or node.layer is not None or v in self._others:
            return None
        found = self._of_node(node, at)
        if found is None:
            self._others.add(v)
        return found

    def _of_node(self, node: Node, at: Node) -> Choice | None:
        if node.primitive == "convert_element_type":
            return self._of_conversion(node, at)
        if not self._has_numbers(node.outputs[0]):
            return None
        if node.primitive in _KEEP:
            return self.of(node.inputs[0], at)
        if node.primitive in _MOVES and len(node.inputs) == 1:
            found = self.of(node.inputs[0], at)
            return found and found._replace(truth=self._moved(at, node.eqn, found.truth))
        if node.primitive == "select_n":
            return self._of_selection(node)
        return self._of_arithmetic(node, at)

    def _of_conversion(self, node: Node, at: Node) -> Choice | None:
        (source,) = node.inputs
        if not isinstance(source, int) or not self._has_numbers(node.outputs[0]):
            return None
        if self.draft.avals[source].dtype == bool:
            return Choice(source, np.float32(0), np.float32(1))
        return self.of(source, at)

    def _of_selection(self, node: Node) -> Choice | None:
        truth, *cases = node.inputs
        numbers = [number(self.draft, case) for case in cases]
        if not isinstance(truth, int) or len(cases) != 2 or None in numbers:
            return None
        if self.draft.avals[truth].shape != self.draft.avals[node.outputs[0]].shape:
            return None
        return Choice(truth, *map(np.float32, numbers))

    def _of_arithmetic(self, node: Node, at: Node) -> Choice | None:
        halves = node.primitive == "div" and not self._is_float(node.outputs[0])
        compute = None if halves else _ARITHMETIC.get(node.primitive)
        found = compute and self._with_number(node, compute, at)
        if found or node.primitive not in (*_OF_TWO, "add"):
            return found
        a = self.of(node.inputs[0], at)
        b = None if a is None else self.of(node.inputs[1], at)
        if a is None or b is None:
            return None
        if node.primitive == "add":
            return self._both(at, self._mask(a, at), self._mask(b, at))
        if (*a[1:], *b[1:]) != (0, 1, 0, 1):
            return None
        return a._replace(truth=self._made(at, _OF_TWO[node.primitive], a.truth, b.truth))

    def _mask(self, found: Choice | None, at: Node) -> Choice | None:
        """Return numbers with zero where truth values keep a sum; None: they are no mask."""
        found = None if found is None else self.rising(found, at)
        lowest = without_digits(jnp.float32)
        return found if found is not None and found.no <= lowest and found.yes == 0 else None

    def _both(self, at: Node, a: Choice | None, b: Choice | None) -> Choice | None:
        """Return what the sum of two masks is."""
        if a is None or b is None:
            return None
        truth = self._made(at, lax.bitwise_and, a.truth, b.truth)
        return Choice(truth, min(a.no, b.no), np.float32(0))

    def _with_number(self, node: Node, compute: Callable[..., float], at: Node) -> Choice | None:
        """Return what an operation makes of two numbers and a third."""
        a, b = node.inputs
        numbers = number(self.draft, a), number(self.draft, b)
        with np.errstate(all="ignore"):
            if isinstance(a, int) and numbers[1] is not None and (found := self.of(a, at)):
                results = (compute(x, np.float32(numbers[1])) for x in found[1:])
            elif isinstance(b, int) and numbers[0] is not None and (found := self.of(b, at)):
                results = (compute(np.float32(numbers[0]), x) for x in found[1:])
            else:
                return None
            return Choice(found.truth, *map(np.float32, results))

    def _is_data(self, v: Operand) -> bool:
        return isinstance(v, int) and v in self.draft.graph.data

    def _is_float(self, v: int) -> bool:
        return bool(jnp.issubdtype(self.draft.avals[v].dtype, jnp.floating))

    def _has_numbers(self, v: int) -> bool:
        return self._is_float(v) or self.draft.avals[v].dtype == jnp.int32

    def _moved(self, at: Node, move: core.JaxprEqn, source: int) -> int:
        return self._made(at, lambda x: move.primitive.bind(x, **move.params), source)

    def _made(self, at: Node, function: Callable[..., object], *sources: int) -> int:
        """Return the truth values that a function makes of others, in front of a node."""
        node = self.draft.computed(at, "mask", function, *sources)
        self.draft.instead.setdefault(at, []).append(node)
        return node.outputs[0]

    def _selected(self, at: Node, mask: Choice, x: Operand) -> int:
        """Return a tensor where a mask keeps it, and the mask's low number elsewhere."""
        aval = self.draft.avals[at.outputs[0]]
        axes = range(len(aval.shape))
        truth = mask.truth
        if self.draft.avals[truth].shape != aval.shape:
            truth = self._made(at, lambda t: lax.broadcast_in_dim(t, aval.shape, axes), truth)
        lowest = self._repeated(at, Constant(np.asarray(mask.no, aval.dtype)), ())
        shape = self.draft.aval(x).shape
        kept = x if shape == aval.shape else self._repeated(at, x, axes[len(axes) - len(shape) :])
        eqn = traced(lax.select_n, self.draft.avals[truth], aval, aval)
        whole = {"inputs": (truth, lowest, kept), "run": bound(eqn), "eqn": eqn}
        selected = as_kind(Elementwise, self.draft.made(at, x, eqn), **whole)
        self.draft.instead.setdefault(at, []).append(selected)
        return selected.outputs[0]

    def _repeated(self, at: Node, v: Operand, axes: Sequence[int]) -> int:
        """Return an operand with the shape of what a node makes."""
        shape = self.draft.avals[at.outputs[0]].shape
        eqn = traced(lambda x: lax.broadcast_in_dim(x, shape, axes), self.draft.aval(v))
        node = self.draft.made(at, v, eqn)
        self.draft.instead.setdefault(at, []).append(node)
        return node.outputs[0]
