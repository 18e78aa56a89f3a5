"""Numbers that are known and added to scores: masks are those far below others, biases the rest."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from simqat_jax.capture.classify import is_real
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.parts import SAME, maker, number
from simqat_jax.ir.graph import Constant, Node, Operand
from simqat_jax.ir.replay import constants

FAR = 88.0
"""Real units: of numbers farther apart, the exponential of the difference is no normal float32."""
_MOST_VALUES = 2**24
"""What is larger is not computed."""
_MOST_LEVELS = 16
"""A constant of more is no mask."""
MOST_TENSORS = 64
"""What is made of more is none either."""

# Each value of what these make of multiples of a number, their first operand, is one as well.
_KEEP_MULTIPLES = SAME | set(
    "convert_element_type transpose slice dynamic_slice rev tile split neg abs reduce_max "
    "reduce_min reduce_sum cumsum name sharding_constraint".split()
)
# Likewise of what they make of all operands.
_JOIN_MULTIPLES = frozenset("add sub add_any max min clamp concatenate pad".split())


class Known(NamedTuple):
    """Known numbers that are added to scores.

    Attributes:
      kept: where scores stay, shorter along axes along which it repeats; None: everywhere.
      bias: what is added to those, likewise; None: nothing but a number for all along the axes.
    """

    kept: np.ndarray | None
    bias: np.ndarray | None


def known_numbers(
    draft: Draft,
    v: Operand,
    axes: Sequence[int],
    *,
    subtracted: bool,
    dtype: DTypeLike = jnp.float32,
) -> Known | None:
    """Return what known numbers do to scores along axes; None: they are not known, or too wide.

    Numbers are sorted into levels that are `FAR` apart, of which the highest stays. Where its own
    numbers reach as far, a grid has no digits beside them.
    """
    values = known_values(draft, v)
    if values is None:
        return None
    values = -values if subtracted else values
    if not (values < np.inf).all():  # or NaN
        return None
    axes = tuple(axes)
    kept = _highest_level(values, axes)
    top = values.max(axes, keepdims=True)
    kept &= top > without_digits(dtype)
    with np.errstate(invalid="ignore"):  # infinities of what is not kept
        bias = np.where(kept, values - top, np.float32(0))
    if bias.min(initial=0) < -FAR:
        return None
    return Known(None if kept.all() else kept, bias if bias.any() else None)


def without_digits(dtype: DTypeLike) -> float:
    """Return the number beside which a floating dtype has no digit of a score left."""
    return -1 / float(jnp.finfo(dtype).eps)


def _highest_level(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return where numbers are not below a gap, counted from the highest along axes."""
    rows = np.moveaxis(values, axes, range(-len(axes), 0))
    flat = rows.reshape(*rows.shape[: -len(axes)], -1)
    ordered = -np.sort(-flat, axis=-1)
    with np.errstate(invalid="ignore"):
        gaps = ordered[..., :-1] - ordered[..., 1:] >= FAR
    last = np.where(gaps.any(-1), gaps.argmax(-1), flat.shape[-1] - 1)
    least = np.take_along_axis(ordered, last[..., None], -1)
    return np.moveaxis((flat >= least).reshape(rows.shape), range(-len(axes), 0), axes)


def known_values(draft: Draft, v: Operand) -> np.ndarray | None:
    """Return the numbers of a tensor that is made of known ones alone, float32.

    Its length is 1 along axes along which it is broadcast.
    """
    values: dict[Operand, np.ndarray | None] = {}

    def found(v: Operand) -> np.ndarray | None:
        if v not in values:
            values[v] = None
            values[v] = made(v) if len(values) <= MOST_TENSORS else None
        return values[v]

    def made(v: Operand) -> np.ndarray | None:
        if isinstance(v, Constant):
            is_known = is_real(v.value) and not isinstance(v.value, Tracer)
            return np.asarray(v.value) if is_known else None
        node = draft.producers.get(v)
        if node is None or v in draft.graph.data or node.effects:
            return None
        if any(isinstance(held, Tracer) for held in constants(node)):
            return None
        inputs = [x for x in map(found, node.inputs) if x is not None]
        if len(inputs) < len(node.inputs):
            return None
        thin = _thin(node, inputs[0]) if len(inputs) == 1 else None
        if thin is not None:
            return thin
        shapes = [draft.aval(x).shape for x in node.inputs]
        if max(map(np.prod, [draft.avals[v].shape, *shapes])) > _MOST_VALUES:
            return None
        full = [np.broadcast_to(x, s) for x, s in zip(inputs, shapes, strict=True)]
        with jax.ensure_compile_time_eval():
            return np.asarray(node.run(*full)[node.outputs.index(v)])

    result = found(v)
    return None if result is None else result.astype(np.float32)


def _thin(node: Node, x: np.ndarray) -> np.ndarray | None:
    """Return what a broadcast makes, of length 1 along new axes; None: it is another node."""
    if node.parts or node.primitive != "broadcast_in_dim":
        return None
    places = node.eqn.params["broadcast_dimensions"]
    shape = [1] * len(node.eqn.params["shape"])
    for axis, length in zip(places, x.shape, strict=True):
        shape[axis] = length
    return x.reshape(shape)


# What a tensor may hold --------------------------------------------------------------------------


Units = dict[Operand, float | None]
"""For each operand the number of which all that it may hold are multiples, zero as well.

Infinities are multiples of every number; it is infinity, where there is nothing but these and zero.
None: none is known.
"""


def is_far(draft: Draft, v: Operand, known: Units) -> bool:
    """Whether any two values of a tensor are equal or far apart, whatever the model's inputs."""
    unit = _unit(draft, v, known)
    return unit is not None and unit >= FAR


def _unit(draft: Draft, v: Operand, known: Units) -> float | None:
    if v not in known and len(known) < MOST_TENSORS:
        known[v] = None
        if isinstance(v, int):
            node = maker(draft, v)
            known[v] = None if node is None else _unit_behind(draft, node, known)
        elif is_real(v.value) and not isinstance(v.value, Tracer):  # of those, values are not known
            known[v] = _common(_distinct(np.asarray(v.value).ravel()))
        unit, dtype = known[v], draft.aval(v).dtype
        whole = not jnp.issubdtype(dtype, jnp.inexact)
        wraps = isinstance(v, int) and dtype.itemsize < 4  # truth values, or numbers modulo 256
        if whole and (unit is None or unit % 1 or wraps):  # ids, lengths; what is cut to them
            known[v] = 1.0
    return known.get(v)


def _unit_behind(draft: Draft, node: Node, known: Units) -> float | None:
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
    for _ in range(_MOST_LEVELS):
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
