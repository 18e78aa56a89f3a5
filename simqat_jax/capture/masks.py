"""Masks in front of a softmax: scores that a selection replaces, or to which numbers are added."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from simqat_jax.capture.classify import is_real
from simqat_jax.capture.contractions import traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.parts import SAME, Parts, maker, number
from simqat_jax.ir.compound import OfExponentials
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

_FAR = 1e3
"""Real units: farther apart than scores are. A grid of 8 bits would reach it with steps of 4 alone,
each of which divides a share by 50."""
_MOST_VALUES = 16
"""A constant of more is no mask."""
_MOST_TENSORS = 64
"""What is made of more is none either."""

# Each value of what these make of multiples of a number, their first operand, is one as well.
_KEEP_MULTIPLES = SAME | set(
    "convert_element_type transpose slice dynamic_slice rev tile split neg abs reduce_max "
    "reduce_min reduce_sum cumsum name sharding_constraint".split()
)
# Likewise of what they make of all operands.
_JOIN_MULTIPLES = frozenset("add sub add_any max min clamp concatenate pad".split())


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
        lowest = -1 / float(jnp.finfo(added.dtype).eps)
        return added >= jnp.maximum(jnp.max(added, axes, keepdims=True), lowest)


Mask = Selected | Added


def take_masks(parts: Parts, x: int) -> tuple[int, list[Mask]]:
    """Take along the masks that make a tensor; return the scores in front of them, and these."""
    masks: list[Mask] = []
    while (node := maker(parts.draft, x)) is not None:
        found = _masked(parts.draft, node)
        if found is None:
            break
        parts.add(node)
        x = found[0]
        masks.append(found[1])
    return x, masks


def merge_masked(
    parts: Parts,
    kind: type[OfExponentials],
    scores: int,
    masks: Sequence[Mask],
    *,
    op: str,
    axes: tuple[int, ...],
) -> None:
    """Merge parts that make a softmax, or its logarithm, of scores behind masks."""
    last = parts.ordered[-1]
    if not masks:
        parts.merged(kind, (scores,), op=op, axes=axes)
        return
    mask = _joined(parts.draft, last, masks, axes)
    parts.merged(kind, (scores, mask.tensor), op=op, axes=axes, masked=True, keeps=mask.keeps)


def _joined(draft: Draft, softmax: Node, masks: Sequence[Mask], axes: tuple[int, ...]) -> Selected:
    """Return masks in front of a softmax along axes as one of truth values."""
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


def _masked(draft: Draft, node: Node) -> tuple[int, Mask] | None:
    """Return the scores that a node masks, and how; None: it does not."""
    if node.primitive == "select_n":
        return _selected(draft, node)
    return _added(draft, node) if isinstance(node, Add) else None


def _selected(draft: Draft, selection: Node) -> tuple[int, Mask] | None:
    mask, *cases = selection.inputs
    if len(cases) != 2 or draft.aval(mask).dtype != jnp.bool_:
        return None
    lowest = [number(draft, v) for v in cases]
    for keeps, other in ((True, lowest[0]), (False, lowest[1])):
        v = cases[int(keeps)]
        if other is not None and other <= -_FAR and isinstance(v, int) and v in draft.graph.data:
            return v, Selected(mask, keeps)
    return None


def _added(draft: Draft, node: Add) -> tuple[int, Mask] | None:
    a, b = node.inputs
    shape = draft.avals[node.outputs[0]].shape
    known: _Units = {}
    for x, added in [(a, b)] if node.subtracts else [(a, b), (b, a)]:
        if not isinstance(x, int) or x not in draft.graph.data or draft.avals[x].shape != shape:
            continue
        aligned = len(draft.aval(added).shape) == len(shape)
        if aligned and _is_far(draft, added, known) and not _is_far(draft, x, known):
            return x, Added(added, node.subtracts)
    return None


def hides_no_mask(draft: Draft, v: Operand) -> bool:
    """Whether a summand of scores is a product, or learned: biases of relative positions."""
    if not (isinstance(v, int) and v in draft.graph.data):
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
    return _near_sources(draft, factor) is not None and (known is None or abs(known) > 1 / _FAR)


def _near_sources(draft: Draft, v: Operand) -> set[Operand] | None:
    """Return what a tensor without data is made of; None: of constants as masks have them."""
    known, waiting = {v}, [v]
    while waiting:
        v = waiting.pop()
        node = draft.producers.get(v) if isinstance(v, int) else None
        held = [v.value] if isinstance(v, Constant) else constants(node) if node else []
        if len(known) > _MOST_TENSORS or any(map(_reaches_far, held)):
            return None
        new = set(node.inputs) - known if node is not None else set()
        known.update(new)
        waiting.extend(new)
    return known


def _reaches_far(value: ArrayLike) -> bool:
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return False  # indices
    return isinstance(value, Tracer) or bool(np.any(np.abs(np.asarray(value)) >= _FAR))


# What a tensor may hold --------------------------------------------------------------------------


_Units = dict[Operand, float | None]
"""For each operand the number of which all that it may hold are multiples, zero as well.

Infinities are multiples of every number; it is infinity, where there is nothing but these and zero.
None: none is known.
"""


def _is_far(draft: Draft, v: Operand, known: _Units) -> bool:
    """Whether any two values of a tensor are equal or far apart, whatever the model's inputs."""
    unit = _unit(draft, v, known)
    return unit is not None and unit >= _FAR


def _unit(draft: Draft, v: Operand, known: _Units) -> float | None:
    if v not in known and len(known) < _MOST_TENSORS:
        known[v] = None
        if isinstance(v, int):
            node = maker(draft, v)
            known[v] = None if node is None else _unit_behind(draft, node, known)
        elif is_real(v.value) and not isinstance(v.value, Tracer):  # of those, values are not known
            known[v] = _common(_distinct(np.asarray(v.value).ravel()))
        unit, whole = known[v], not jnp.issubdtype(draft.aval(v).dtype, jnp.inexact)
        if whole and (unit is None or unit % 1):  # ids, lengths, truth values; what is cut to them
            known[v] = 1.0
    return known.get(v)


def _unit_behind(draft: Draft, node: Node, known: _Units) -> float | None:
    units = (_unit(draft, v, known) for v in node.inputs)
    match node.primitive:
        case name if name in _KEEP_MULTIPLES:
            return next(units)
        case name if name in _JOIN_MULTIPLES:
            return _common(units)
        case "select_n":
            return _common(itertools.islice(units, 1, None))
        case "mul":
            a, b = units
            return None if a is None or b is None else a * b
        case "div":
            unit, divisor = next(units), number(draft, node.inputs[1])
            return unit / abs(divisor) if unit and divisor else None
    return None


def _distinct(values: np.ndarray) -> Iterator[float | None]:
    """Yield the values of a constant, each once; None where there are many."""
    for _ in range(_MOST_VALUES):
        if not values.size:
            return
        yield abs(float(values[0]))
        values = values[values != values[0]]
    yield None


def _common(units: Iterable[float | None]) -> float | None:
    """Return the greatest number of which all of these are multiples, zero as well."""
    common = math.inf
    for unit in units:
        if unit is None:
            return None
        while unit and math.isfinite(unit):
            common, unit = unit, math.fmod(common, unit) if math.isfinite(common) else 0.0
    return common
