"""Variances, mean squares and their roots, as models write them."""

import math
from typing import NamedTuple

from simqat_jax.capture.classify import calls, function_name
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.parts import Parts, maker, number, reduced_axes
from simqat_jax.ir.graph import Add, Clamp, Elementwise, Float, Mean, Node, Operand
from simqat_jax.numerics.requantize import FREE


class Variance(NamedTuple):
    """A variance or mean square; `max(variance + epsilon, floor)` is what a root is taken of.

    Attributes:
      x: of which tensor.
      axes: over which axes.
      centered: the mean is subtracted.
      terms: by how many it would have to be divided to be a mean: 1, or of a sum its terms.
      epsilon: what is added.
      floor: the least that it counts.
    """

    x: int
    axes: tuple[int, ...]
    centered: bool
    terms: int = 1
    epsilon: float = 0.0
    floor: float = 0.0

    @property
    def least(self) -> float:
        """The least deviation."""
        return math.sqrt(self.floor / self.terms)

    def has_form(self, draft: Draft) -> bool:
        """Whether each example has its own."""
        return 0 not in self.axes and self.x in draft.graph.data


def is_root(node: Node) -> bool:
    """Whether a node takes a square root, as `jnp.std` and `jnp.linalg.norm` do."""
    if isinstance(node, Float):
        length = calls(node.eqn, "norm", "mul reduce_sum sqrt")
        return length or function_name(node.eqn) == "_std"
    return node.primitive in ("sqrt", "rsqrt") and isinstance(node, Elementwise)


def is_variance(node: Node) -> bool:
    """Whether a node is `jnp.var`."""
    return isinstance(node, Float) and function_name(node.eqn) == "_var"


def variance_under(parts: Parts, root: Node) -> Variance | None:
    """Return the variance whose root a node is; its parts are added."""
    if isinstance(root, Float):
        return _under_function(parts.draft, root)
    v, epsilon, floor = parts.behind(root.inputs[0]), 0.0, 0.0
    clamp = maker(parts.draft, v)
    if isinstance(clamp, Clamp) and 0 < clamp.bounds[0] < clamp.bounds[1] == math.inf:
        floor = clamp.bounds[0]
        v = parts.behind(v, (clamp.bounds,))
    added = parts.made_by(v, "add", Add)
    if added is not None:
        known = known_number(parts.draft, added)
        if known is None:
            return None
        parts.add(added)
        v, epsilon = known
    variance = _plain_variance(parts, parts.behind(v, (FREE, (0.0, math.inf))))
    return None if variance is None else variance._replace(epsilon=epsilon, floor=floor)


def variance_of(parts: Parts, node: Node) -> Variance | None:
    """Return what `jnp.var` computes: divided by the number of elements, of all of them."""
    x, *others = node.inputs  # the correction, and what is left out
    if not isinstance(x, int) or [number(parts.draft, v) for v in others] != [0]:
        return None
    parts.add(node)
    return Variance(x, reduced_axes(node), True)


def known_number(draft: Draft, node: Node) -> tuple[Operand, float] | None:
    """Return the operand of a sum to which a number is added, and that number."""
    pairs = [(a, number(draft, b)) for a, b in (node.inputs, node.inputs[::-1])]
    return next(((a, b) for a, b in pairs if b is not None), None)


def _under_function(draft: Draft, root: Node) -> Variance | None:
    x, *others = root.inputs
    if not isinstance(x, int):
        return None
    axes = reduced_axes(root)
    if function_name(root.eqn) == "_std":
        return Variance(x, axes, True) if [number(draft, v) for v in others] == [0] else None
    return Variance(x, axes, False, _terms(draft, x, axes))


def _plain_variance(parts: Parts, v: Operand) -> Variance | None:
    node = maker(parts.draft, v)
    if node is None:
        return None
    if node.primitive == "sub" and isinstance(node, Add):  # mean(x^2) - mean(x)^2
        parts.add(node)
        return _fast_variance(parts, node)
    if is_variance(node):
        return variance_of(parts, node)
    mean = _mean(parts, v) or _sum(parts, v)
    x = None if mean is None else _squared(parts, mean.of)
    if mean is None or x is None:
        return None
    difference = subtracted_mean(parts.draft, x, mean.axes)
    if difference is None:
        return Variance(x, mean.axes, False, mean.terms)
    parts.add(*difference.nodes)
    x = difference.ordered[-1].inputs[0]
    assert isinstance(x, int)
    return Variance(x, mean.axes, True, mean.terms)


def _fast_variance(parts: Parts, difference: Node) -> Variance | None:
    mean = _mean(parts, parts.behind(difference.inputs[0]))
    x = None if mean is None else _squared(parts, mean.of)
    of_mean = _squared(parts, parts.behind(difference.inputs[1]))
    other = None if of_mean is None else _mean(parts, parts.behind(of_mean))
    if mean is None or x is None or other != _Mean(x, mean.axes):
        return None
    return Variance(x, mean.axes, True)


class _Mean(NamedTuple):
    """A mean over axes, or a sum of so many terms."""

    of: int
    axes: tuple[int, ...]
    terms: int = 1


def _mean(parts: Parts, v: Operand) -> _Mean | None:
    """Return what a tensor is the mean of, over which axes."""
    division = parts.made_by(v, "div")
    if division is None:
        return None
    total = _sum(parts, parts.behind(division.inputs[0]))
    if total is None or number(parts.draft, division.inputs[1]) != total.terms:
        return None
    parts.add(division)
    return _Mean(total.of, total.axes)


def _sum(parts: Parts, v: Operand) -> _Mean | None:
    """Return what a tensor is the sum of, over which axes."""
    total = parts.made_by(v, "reduce_sum", Mean)
    x = None if total is None else parts.unconverted(total.inputs[0])
    if total is None or not isinstance(x, int):
        return None
    parts.add(total)
    axes = reduced_axes(total)
    return _Mean(x, axes, _terms(parts.draft, x, axes))


def _terms(draft: Draft, x: int, axes: tuple[int, ...]) -> int:
    return math.prod(draft.avals[x].shape[a] for a in axes)


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


def subtracted_mean(draft: Draft, v: Operand, axes: tuple[int, ...]) -> Parts | None:
    """Return the nodes that subtract its mean over axes from a tensor."""
    node = maker(draft, v)
    if node is None or node.primitive != "sub" or not isinstance(node.inputs[0], int):
        return None
    parts = Parts(draft, node)
    mean = _mean(parts, parts.behind(node.inputs[1]))
    return parts if mean == _Mean(node.inputs[0], axes) else None
