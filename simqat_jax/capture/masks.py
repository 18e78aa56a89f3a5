"""Masks in front of a softmax: scores that a selection replaces, or to which numbers are added."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from simqat_jax.capture.biases import (
    FAR,
    MOST_TENSORS,
    Units,
    is_far,
    known_numbers,
    known_values,
    without_digits,
)
from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.parts import SAME, Parts, maker, number
from simqat_jax.capture.truths import Choices
from simqat_jax.ir.compound import OfExponentials, Softmax
from simqat_jax.ir.graph import (
    Add,
    Constant,
    Contraction,
    Float,
    Node,
    Operand,
    Product,
    as_kind,
    shape_of,
)
from simqat_jax.ir.replay import constants

_LOW = -FAR
"""Real units: what puts so low a number in the place of scores is a mask."""
_LARGE = 1e3
"""Scores are scaled by no more, nor by less than one of so many: a mask may be."""


@dataclasses.dataclass(frozen=True)
class Selected:
    """Truth values that let scores stay.

    Attributes:
      tensor: these.
      keeps: which of them does.
    """

    tensor: Operand
    keeps: bool

    def kept(self, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Return where scores stay."""
        del axes
        return mask if self.keeps else jnp.logical_not(mask)


@dataclasses.dataclass(frozen=True)
class Added:
    """Numbers far apart: beside the highest along axes, no other score counts.

    Attributes:
      tensor: these.
      subtracts: they are subtracted.
    """

    tensor: Operand
    subtracts: bool

    def kept(self, added: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Return where scores stay.

        Nowhere, where the highest is so low that no digit of a score is left beside it: then all
        are equal, as they are where a selection lets none stay.
        """
        added = -added if self.subtracts else added
        top = jnp.max(added, axes, keepdims=True)
        return added >= jnp.maximum(top, without_digits(added.dtype))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Truth values that let scores stay, which all do along axes where none would.

    Attributes:
      tensor: these.
    """

    tensor: Operand

    def kept(self, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        """Return where scores stay."""
        return mask | ~jnp.any(mask, axes, keepdims=True)


Mask = Selected | Added | Chosen


class Bias(NamedTuple):
    """What is added to scores and is no mask.

    Attributes:
      added: it.
      node: what adds it, maybe together with masks.
    """

    added: Operand
    node: Node


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a softmax is taken of.

    Attributes:
      tensor: the scores in front of the masks.
      axes: along which axes of these.
      masks: which of them count.
      biases: what is added to them besides, in front of a mask.
      reshaped: they get another shape behind all masks: other axes than these are joined or split.
    """

    tensor: int
    axes: tuple[int, ...]
    masks: tuple[Mask, ...] = ()
    biases: tuple[Bias, ...] = ()
    reshaped: bool = False


def take_masks(parts: Parts, x: int, axes: tuple[int, ...]) -> Scores:
    """Take along the masks that make a tensor, of which there is a softmax along axes."""
    found = ahead = Scores(x, axes)
    waiting: list[Node] = []
    while (node := maker(parts.draft, ahead.tensor)) is not None:
        behind = _behind(parts.draft, node, ahead)
        if behind is None:
            break
        waiting.append(node)
        if len(behind.masks) > len(ahead.masks):  # what is no mask stays, unless there is one
            parts.add(*waiting)
            found, waiting = behind, []
        ahead = behind
    return found


def _behind(draft: Draft, node: Node, at: Scores) -> Scores | None:
    """Return the scores that a node masks, adds biases to or reshapes; None: it does else."""
    if node.primitive == "select_n":
        return _selected(draft, node, at)
    if isinstance(node, Add):
        return _added(draft, node, at)
    if node.primitive == "reshape" and not at.masks and not at.biases:
        return _before_reshape(draft, node, at)
    return None


def _before_reshape(draft: Draft, node: Node, at: Scores) -> Scores | None:
    """Return scores in front of a reshape that leaves the axes of a softmax as they are."""
    (x,) = node.inputs
    before, after = draft.aval(x).shape, draft.avals[node.outputs[0]].shape
    kept = len(after) - min(at.axes)
    if not isinstance(x, int) or len(before) < kept or before[-kept:] != after[-kept:]:
        return None
    moved = len(before) - len(after)
    return Scores(x, tuple(a + moved for a in at.axes), reshaped=True)


def merge_masked(parts: Parts, kind: type[OfExponentials], of: Scores, op: str) -> None:
    """Merge parts that make a softmax, or its logarithm, of scores behind masks."""
    last, draft = parts.ordered[-1], parts.draft
    if not of.masks:
        parts.merged(kind, (of.tensor,), op=op, axes=of.axes)
        return
    mask = _joined(draft, last, of.masks, of.axes)
    fields = {"op": op, "axes": of.axes, "masked": True, "keeps": mask.keeps}
    if not of.biases and not of.reshaped:
        parts.merged(kind, (of.tensor, mask.tensor), **fields)
        return
    # Biases without their masks, another shape: operations that were not captured so.
    made: list[Node] = []
    x = of.tensor
    for mark, bias in enumerate(reversed(of.biases), 3):
        y = draft.beside(last.outputs[0], draft.avals[x], -mark)
        made += _with_bias(draft, x, bias, y)
        x = made[-1].outputs[0]
    inner, result = draft.avals[x], draft.avals[last.outputs[0]]
    compute = _masked_function(kind, mask.keeps, of.axes, result.dtype)
    eqn = traced(jax.jit(compute), inner, draft.aval(mask.tensor))
    outputs = last.outputs
    if of.reshaped:
        outputs = (draft.beside(outputs[0], shape_of(eqn.outvars[0]), -2),)
    whole = {"inputs": (x, mask.tensor), "outputs": outputs, "run": bound(eqn), "eqn": eqn}
    made.append(as_kind(kind, last, layer=None, parts=(), **whole, **fields))
    if of.reshaped:
        back = traced(lambda y: jnp.reshape(y, result.shape), draft.avals[outputs[0]])
        made.append(draft.made(last, outputs[0], back, last.outputs))
    draft.instead.update((part, []) for part in parts.ordered[:-1])
    draft.instead.setdefault(last, []).extend(made)


def _with_bias(draft: Draft, x: int, bias: Bias, y: int) -> list[Node]:
    """Return the nodes that make a tensor `y` of `x` and a bias."""
    shape, dtype, added = draft.avals[x].shape, draft.avals[x].dtype, bias.added
    nodes = []
    if draft.aval(added).shape != shape:
        places = tuple(range(len(shape)))
        repeat = traced(lambda b: lax.broadcast_in_dim(b, shape, places), draft.aval(added))
        nodes.append(draft.made(bias.node, added, repeat))
        added = nodes[-1].outputs[0]
    eqn = traced(lax.add, draft.avals[x], jax.ShapeDtypeStruct(shape, dtype))
    whole = {"inputs": (x, added), "outputs": (y,)}
    return [*nodes, as_kind(Add, bias.node, run=bound(eqn), eqn=eqn, **whole)]


def _masked_function(
    kind: type[OfExponentials], keeps: bool, axes: tuple[int, ...], dtype: np.dtype
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def function(x: jax.Array, mask: jax.Array) -> jax.Array:
        lowest = jnp.finfo(jnp.float32).min
        x = jnp.where(mask == keeps, x.astype(jnp.float32), lowest)
        below = x - lax.stop_gradient(x.max(axes, keepdims=True))
        e = jnp.exp(below)
        total = e.sum(axes, keepdims=True)
        y = e / total if kind is Softmax else below - jnp.log(total)
        return y.astype(dtype)

    return function


def _joined(draft: Draft, softmax: Node, masks: Sequence[Mask], axes: tuple[int, ...]) -> Selected:
    """Return masks in front of a softmax along axes as one of truth values."""
    masks = [_by_truths(draft, softmax, mask) for mask in masks]
    (first, *others) = masks
    if isinstance(first, Selected) and not others:
        return first
    operands = tuple(mask.tensor for mask in masks)

    def kept(*values: jax.Array) -> jax.Array:
        pairs = zip(masks, values, strict=True)
        return functools.reduce(jnp.logical_and, (mask.kept(x, axes) for mask, x in pairs))

    def made() -> Node:
        eqn = traced(jax.jit(kept), *map(draft.aval, operands))
        outputs = (draft.new(shape_of(eqn.outvars[0])),)
        whole = {"inputs": operands, "outputs": outputs, "run": bound(eqn), "eqn": eqn}
        return as_kind(Float, softmax, op="mask", layer=None, parts=(), **whole)

    return Selected(draft.once((tuple(masks), axes), softmax, made), keeps=True)


def _by_truths(draft: Draft, softmax: Node, mask: Mask) -> Mask:
    """Return a mask of added numbers by the truth values that choose between two of them."""
    if not isinstance(mask, Added) or mask.subtracts or not isinstance(mask.tensor, int):
        return mask
    choices = Choices(draft)
    found = choices.of(mask.tensor, softmax)
    if found is None or found.no == found.yes:
        return mask
    if min(found.no, found.yes) <= without_digits(jnp.float32):
        return mask
    return Chosen(choices.rising(found, softmax).truth)


def _selection(draft: Draft, node: Node) -> tuple[Operand, Selected] | None:
    """Return what a node puts a low number in the place of, and where it does not."""
    mask, *cases = node.inputs
    if len(cases) != 2 or draft.aval(mask).dtype != jnp.bool_:
        return None
    lowest = [number(draft, v) for v in cases]
    for keeps, other in ((True, lowest[0]), (False, lowest[1])):
        if other is not None and other <= _LOW:
            return cases[int(keeps)], Selected(mask, keeps)
    return None


def _selected(draft: Draft, node: Node, at: Scores) -> Scores | None:
    found = _selection(draft, node)
    if found is None or not isinstance(found[0], int) or found[0] not in draft.graph.data:
        return None
    return dataclasses.replace(at, tensor=found[0], masks=(*at.masks, found[1]))


def _added(draft: Draft, node: Add, at: Scores) -> Scores | None:
    a, b = node.inputs
    shape = draft.avals[node.outputs[0]].shape
    known: Units = {}
    for x, added in [(a, b)] if node.subtracts else [(a, b), (b, a)]:
        if not isinstance(x, int) or x not in draft.graph.data or draft.avals[x].shape != shape:
            continue
        aligned = len(draft.aval(added).shape) == len(shape)
        if not aligned or is_far(draft, x, known):
            continue
        found = _summand(draft, node, added, at.axes, known)
        if found is not None:
            masks, biases = (*at.masks, *found[0]), (*at.biases, *found[1])
            return dataclasses.replace(at, tensor=x, masks=masks, biases=biases)
    return None


_Summand = tuple[tuple[Mask, ...], tuple[Bias, ...]]


def _summand(
    draft: Draft, node: Add, v: Operand, axes: tuple[int, ...], known: Units
) -> _Summand | None:
    """Return the masks and biases that a summand of scores consists of; None: others as well."""
    if len(draft.aval(v).shape) != len(draft.avals[node.outputs[0]].shape):
        return None if number(draft, v) is None else ((), ())  # the same for all scores
    chosen = None if node.subtracts else _without_others(draft, node, v, axes, known)
    if chosen is not None:
        return chosen
    if is_far(draft, v, known):
        return (Added(v, node.subtracts),), ()
    dtype = draft.avals[node.outputs[0]].dtype
    is_data = isinstance(v, int) and v in draft.graph.data
    numbers = (
        None if is_data else known_numbers(draft, v, axes, subtracted=node.subtracts, dtype=dtype)
    )
    if numbers is not None:
        masks = () if numbers.kept is None else (Selected(Constant(numbers.kept), keeps=True),)
        biases = () if numbers.bias is None else (Constant(numbers.bias.astype(dtype)),)
        return masks, tuple(Bias(bias, node) for bias in biases)
    if node.subtracts:
        return None
    if hides_no_mask(draft, v):
        return (), (Bias(v, node),)
    inner = maker(draft, v)
    if isinstance(inner, Add) and not inner.subtracts:
        found = [_summand(draft, node, x, axes, known) for x in inner.inputs]
        each = [one for one in found if one is not None]
        if len(each) == len(found):
            (one, first), (other, second) = each
            return (*one, *other), (*first, *second)
    elif inner is not None and inner.primitive == "select_n":
        selection = _selection(draft, inner)
        found = selection and _summand(draft, node, selection[0], axes, known)
        if selection and found:
            return (selection[1], *found[0]), found[1]
    return None


def _without_others(
    draft: Draft, node: Add, v: Operand, axes: tuple[int, ...], known: Units
) -> _Summand | None:
    """Return a summand that puts so low a number in places that no score counts beside it."""
    inner = maker(draft, v)
    if inner is None or inner.primitive != "select_n":
        return None
    numbers = [number(draft, case) for case in inner.inputs[1:]]
    lowest = min((x for x in numbers if x is not None), default=0.0)
    if lowest > without_digits(draft.avals[node.outputs[0]].dtype):
        return None
    selection = _selection(draft, inner)
    found = selection and _summand(draft, node, selection[0], axes, known)
    return ((selection[1], *found[0]), found[1]) if selection and found else None


def hides_no_mask(draft: Draft, v: Operand) -> bool:
    """Whether a summand of scores is a product, known and small, or learned."""
    if not (isinstance(v, int) and v in draft.graph.data):
        values = known_values(draft, v)
        if values is not None:
            return bool(np.all(np.abs(values) < FAR))
        made_of = _near_sources(draft, v)
        return bool(made_of and made_of.intersection(draft.graph.parameters))
    node = draft.producers.get(v)
    while node is not None and _is_moved_or_scaled(draft, node):
        node = draft.producers.get(node.data_inputs(draft.graph.data)[0])
    if isinstance(node, Add):
        return all(hides_no_mask(draft, x) for x in node.inputs)
    return isinstance(node, Contraction | Product)


def _is_moved_or_scaled(draft: Draft, node: Node) -> bool:
    if node.primitive in (*SAME, "transpose"):
        return True
    data = draft.graph.data
    if node.primitive not in ("mul", "div") or node.parts or len(node.data_inputs(data)) != 1:
        return False
    (factor,) = (x for x in node.inputs if x not in data)
    known = number(draft, factor)
    if known is None:
        return _near_sources(draft, factor) is not None
    return 1 / _LARGE < abs(known) < _LARGE


def _near_sources(draft: Draft, v: Operand) -> set[Operand] | None:
    """Return what a tensor without data is made of; None: of constants as masks have them."""
    known, waiting = {v}, [v]
    while waiting:
        v = waiting.pop()
        node = draft.producers.get(v) if isinstance(v, int) else None
        held = [v.value] if isinstance(v, Constant) else constants(node) if node else []
        if len(known) > MOST_TENSORS or any(map(_reaches_far, held)):
            return None
        new = set(node.inputs) - known if node is not None else set()
        known.update(new)
        waiting.extend(new)
    return known


def _reaches_far(value: ArrayLike) -> bool:
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return False  # indices
    return isinstance(value, Tracer) or bool(np.any(np.abs(np.asarray(value)) >= FAR))
