"""Norms that models write by hand."""

import math
from typing import NamedTuple

from simqat_jax.capture.classify import function_name
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.parts import SAME, Parts, maker, number, reduced_axes, repeated
from simqat_jax.ir.compound import Norm
from simqat_jax.ir.graph import Add, Elementwise, Float, Graph, Mean, Node, Operand
from simqat_jax.numerics.requantize import FREE


class _Variance(NamedTuple):
    """A variance or mean square.

    Attributes:
      x: of which tensor.
      axes: over which axes.
      centered: the mean is subtracted.
    """

    x: int
    axes: tuple[int, ...]
    centered: bool


def find_norms(graph: Graph) -> Graph:
    """Merge what normalizes a tensor, scales and shifts it into one node.

    That is a mean square or variance, as a sum of squares or as `mean(x^2) - mean(x)^2`, its
    square root, a product or quotient, and what without data multiplies and is added behind.
    """
    draft = Draft(graph)
    for node in graph.nodes:
        if node.primitive in ("sqrt", "rsqrt") and isinstance(node, Elementwise):
            _merge_norm(draft, node)
    return draft.finished()


def _merge_norm(draft: Draft, root: Node) -> None:
    parts = Parts(draft, root)
    variance, epsilon = _variance(parts, root)
    if variance is None or 0 in variance.axes:
        return
    affine = _normalized(parts, root, variance)
    if affine is None:
        return
    _add_affine(parts, affine)
    rank = len(draft.avals[variance.x].shape)
    placed = [(w, name) for v, name in affine if (w := _of_rank(draft, v, rank)) is not None]
    if len(placed) < len(affine):
        return
    if not parts.are_closed() or not parts.are_aligned(variance.x):
        return
    last = parts.ordered[-1]
    inputs = (variance.x, *(v for v, _ in placed))
    parts.merged(
        Norm,
        inputs,
        op="norm",
        layer=None,
        path=last.path,
        axes=variance.axes,
        groups=None,
        feature_axes=tuple(range(rank)),
        centered=variance.centered,
        epsilon=epsilon,
        affine=tuple(name for _, name in placed),
    )


def _of_rank(draft: Draft, v: Operand, rank: int) -> Operand | None:
    """Return an operand that broadcasts to a tensor of so many axes; None: it does not."""
    return v if len(draft.aval(v).shape) == rank else repeated(draft, v)


def _variance(parts: Parts, root: Node) -> tuple[_Variance | None, float]:
    """Return the variance whose root it is, and what is added to it."""
    draft = parts.draft
    v, epsilon = parts.behind(root.inputs[0]), 0.0
    added = parts.made_by(v, "add", Add)
    if added is not None:
        pair = [(a, number(draft, b)) for a, b in (added.inputs, added.inputs[::-1])]
        v, known = next(((a, b) for a, b in pair if b is not None), (None, None))
        if v is None or known is None:
            return None, 0.0
        parts.add(added)
        epsilon = known
    v = parts.behind(v, (FREE, (0.0, math.inf)))
    difference = parts.made_by(v, "sub", Add)
    if difference is not None:  # mean(x^2) - mean(x)^2
        parts.add(difference)
        return _fast_variance(parts, difference), epsilon
    whole = _whole_variance(parts, v)
    if whole is not None:
        return whole, epsilon
    mean = _mean(parts, v)
    squared = None if mean is None else _squared(parts, mean.of)
    if mean is None or squared is None:
        return None, 0.0
    difference = _difference(parts.draft, squared, mean.axes)
    if difference is None:
        return _Variance(squared, mean.axes, False), epsilon
    parts.add(*difference.nodes)
    x = difference.ordered[-1].inputs[0]
    assert isinstance(x, int)
    return _Variance(x, mean.axes, True), epsilon


def _whole_variance(parts: Parts, v: Operand) -> _Variance | None:
    """Return what `jnp.var` takes the variance of, divided by the number of elements."""
    node = maker(parts.draft, v)
    if node is None or function_name(node.eqn) != "_var":
        return None
    x, *others = node.inputs  # the correction, and what is left out
    if not isinstance(x, int) or [number(parts.draft, v) for v in others] != [0]:
        return None
    parts.add(node)
    return _Variance(x, reduced_axes(node), True)


def _fast_variance(parts: Parts, difference: Node) -> _Variance | None:
    mean = _mean(parts, parts.behind(difference.inputs[0]))
    x = None if mean is None else _squared(parts, mean.of)
    of_mean = _squared(parts, parts.behind(difference.inputs[1]))
    other = None if of_mean is None else _mean(parts, parts.behind(of_mean))
    if mean is None or x is None or other != _Mean(x, mean.axes):
        return None
    return _Variance(x, mean.axes, True)


class _Mean(NamedTuple):
    of: int
    axes: tuple[int, ...]


def _mean(parts: Parts, v: Operand) -> _Mean | None:
    """Return what a tensor is the mean of, over which axes."""
    division = parts.made_by(v, "div")
    if division is None:
        return None
    total = parts.made_by(parts.behind(division.inputs[0]), "reduce_sum", Mean)
    if total is None or not isinstance(total.inputs[0], int):
        return None
    x, axes = total.inputs[0], tuple(map(int, total.eqn.params["axes"]))
    shape = parts.draft.avals[x].shape
    if number(parts.draft, division.inputs[1]) != math.prod(shape[a] for a in axes):
        return None
    parts.add(division, total)
    return _Mean(x, axes)


def _squared(parts: Parts, v: Operand) -> int | None:
    """Return what a tensor is the square of."""
    node = maker(parts.draft, v)
    if node is None or isinstance(node, Float):
        return None
    name, params = node.primitive, node.eqn.params
    twice = name == "mul" and node.inputs[0] == node.inputs[1]
    power = name == "integer_pow" and params["y"] == 2
    if not (twice or power or name == "square") or not isinstance(node.inputs[0], int):
        return None
    parts.add(node)
    return node.inputs[0]


def _difference(draft: Draft, v: Operand, axes: tuple[int, ...]) -> Parts | None:
    """Return the nodes that subtract its mean from a tensor."""
    node = maker(draft, v)
    if node is None or node.primitive != "sub" or not isinstance(node.inputs[0], int):
        return None
    parts = Parts(draft, node)
    mean = _mean(parts, parts.behind(node.inputs[1]))
    return parts if mean == _Mean(node.inputs[0], axes) else None


_Affine = list[tuple[Operand, str]]
"""What a norm is multiplied by, and what is added: operands with "scale" or "bias"."""


def _normalized(parts: Parts, root: Node, variance: _Variance) -> _Affine | None:
    """Follow the root to the product of what it normalizes; return the factors on the way."""
    draft, node, inverse = parts.draft, root, root.primitive == "rsqrt"
    affine: _Affine = []
    while True:
        v = node.outputs[0]
        reader = draft.only_reader(v, node)
        if reader is None or isinstance(reader, Float) or reader.parts:
            return None
        others = [x for x in reader.inputs if x != v]
        free = [x for x in others if not (isinstance(x, int) and x in draft.graph.data)]
        match reader.primitive:
            case "mul" if inverse and free:
                affine.append((free[0], "scale"))
            case "mul" if inverse and others and _take_normalized(parts, others[0], variance):
                parts.add(reader)
                return affine
            case "div" if not inverse and _take_normalized(parts, reader.inputs[0], variance):
                parts.add(reader)
                return affine
            case "div" if not inverse and number(draft, reader.inputs[0]) == 1.0:
                inverse = True
            case name if name in SAME:
                pass
            case _:
                return None
        parts.add(reader)
        node = reader


def _take_normalized(parts: Parts, v: Operand, variance: _Variance) -> bool:
    """Take along what a variance is to normalize; tell whether `v` is that."""
    if not variance.centered:
        return v == variance.x
    difference = _difference(parts.draft, v, variance.axes)
    if difference is None or difference.ordered[-1].inputs[0] != variance.x:
        return False
    parts.add(*difference.nodes)
    return True


def _add_affine(parts: Parts, affine: _Affine) -> None:
    """Add what multiplies the normalized tensor and is added to it, without data."""
    draft, node = parts.draft, parts.ordered[-1]
    while True:
        v = node.outputs[0]
        reader = draft.only_reader(v, node)
        if reader is None or isinstance(reader, Float) or reader.parts:
            return
        if reader.primitive not in ("mul", "add"):
            return
        others = [x for x in reader.inputs if x != v]
        if len(others) != 1 or (isinstance(others[0], int) and others[0] in draft.graph.data):
            return
        parts.add(reader)
        affine.append((others[0], "scale" if reader.primitive == "mul" else "bias"))
        if reader.primitive == "add":
            return
        node = reader
