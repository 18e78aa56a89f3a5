"""Norms that models write by hand, and deviations and variances by themselves."""

import math
from typing import NamedTuple

import numpy as np

from simqat_jax.capture.draft import Draft
from simqat_jax.capture.parts import SAME, Parts, number, repeated
from simqat_jax.capture.passes import prune
from simqat_jax.capture.variances import (
    Variance,
    is_root,
    is_variance,
    known_number,
    subtracted_mean,
    variance_of,
    variance_under,
)
from simqat_jax.ir.compound import Norm, Spread
from simqat_jax.ir.graph import Clamp, Constant, Float, Graph, Node, Operand


def find_norms(graph: Graph) -> Graph:
    """Merge what normalizes a tensor, scales and shifts it into one node.

    That is a mean square, a sum of squares or a variance, as a sum of squares or as
    `mean(x^2) - mean(x)^2`, its square root, a product or quotient, and what without data
    multiplies and is added behind.
    """
    draft = Draft(graph)
    for node in graph.nodes:
        if is_root(node):
            _merge_norm(draft, node)
    return draft.finished()


def _merge_norm(draft: Draft, root: Node) -> None:
    parts = Parts(draft, root)
    variance = variance_under(parts, root)
    if variance is None or not variance.has_form(draft):
        return
    way = _normalized(parts, root, variance)
    if way is None:
        return
    affine = [*way.affine]
    _add_affine(parts, affine)
    if variance.terms > 1:  # x / sqrt(sum(x^2)), by the mean of x^2
        affine.insert(0, (Constant(np.float32(1 / math.sqrt(variance.terms))), "scale"))
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
        epsilon=variance.epsilon / variance.terms,
        least=max(variance.least, way.least / math.sqrt(variance.terms)),
        offset=way.offset / math.sqrt(variance.terms),
        affine=tuple(name for _, name in placed),
    )


def _of_rank(draft: Draft, v: Operand, rank: int) -> Operand | None:
    """Return an operand that broadcasts to a tensor of so many axes; None: it does not."""
    return v if len(draft.aval(v).shape) == rank else repeated(draft, v)


_Affine = list[tuple[Operand, str]]
"""What a norm is multiplied by, and what is added: operands with "scale" or "bias"."""


class _Way(NamedTuple):
    """What happens to a root before something is divided by it.

    Attributes:
      affine: factors of its inverse.
      least: the least that it counts.
      offset: what is added to it then.
    """

    affine: _Affine
    least: float
    offset: float


def _normalized(parts: Parts, root: Node, variance: Variance) -> _Way | None:
    """Follow the root to the product of what it normalizes."""
    draft, node, inverse = parts.draft, root, root.primitive == "rsqrt"
    affine, least, offset = _Affine(), 0.0, 0.0

    def takes(v: Operand) -> bool:
        return _take_normalized(parts, v, variance, affine)

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
            case "mul" if inverse and others and takes(others[0]):
                parts.add(reader)
                return _Way(affine, least, offset)
            case "div" if not inverse and takes(reader.inputs[0]):
                parts.add(reader)
                return _Way(affine, least, offset)
            case "div" if not inverse and number(draft, reader.inputs[0]) == 1.0:
                inverse = True
            case "add" if not inverse and (known := known_number(draft, reader)) is not None:
                offset += known[1]
            case _ if not inverse and not offset and isinstance(reader, Clamp):
                if reader.bounds[1] != math.inf:
                    return None
                least = max(least, reader.bounds[0])
            case name if name in SAME:
                pass
            case _:
                return None
        parts.add(reader)
        node = reader


def _take_normalized(parts: Parts, v: Operand, variance: Variance, affine: _Affine) -> bool:
    """Take along what a variance is to normalize; tell whether `v` is that, or scales it."""
    draft = parts.draft
    if not variance.centered and v == variance.x:
        return True
    difference = subtracted_mean(draft, v, variance.axes) if variance.centered else None
    if difference is not None and difference.ordered[-1].inputs[0] == variance.x:
        parts.add(*difference.nodes)
        return True
    scaling = parts.made_by(v, "mul")
    for x, factor in () if scaling is None else (scaling.inputs, scaling.inputs[::-1]):
        free = not (isinstance(factor, int) and factor in draft.graph.data)
        if scaling and free and _take_normalized(parts, x, variance, affine):
            parts.add(scaling)
            affine.append((factor, "scale"))
            return True
    return False


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


# Deviations --------------------------------------------------------------------------------------


def find_spreads(graph: Graph) -> Graph:
    """Merge what makes a deviation, a variance or a length that normalizes nothing into one node.

    A mean on the way that something else reads stays besides.
    """
    draft = Draft(graph)
    for node in graph.nodes:
        if (is_root(node) and node.primitive != "rsqrt") or is_variance(node):
            _merge_spread(draft, node)
    return prune(draft.finished())


def _merge_spread(draft: Draft, last: Node) -> None:
    parts = Parts(draft, last)
    rooted = not is_variance(last)
    variance = variance_under(parts, last) if rooted else variance_of(parts, last)
    if variance is None or not variance.has_form(draft) or not parts.are_aligned(variance.x):
        return
    if any(node.remat != last.remat or node.effects for node in parts.nodes):
        return
    lengths = draft.avals[variance.x].shape
    shape = [1 if a in variance.axes else d for a, d in enumerate(lengths)]
    if math.prod(shape) != draft.avals[last.outputs[0]].size:
        return
    parts.merged(
        Spread,
        (variance.x,),
        keep=True,
        op=last.op,
        axes=variance.axes,
        centered=variance.centered,
        rooted=rooted,
        factor=math.sqrt(variance.terms),
        epsilon=variance.epsilon / variance.terms,
        least=variance.least,
    )
