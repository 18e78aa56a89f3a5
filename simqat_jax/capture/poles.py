"""Functions with a pole, and the norms made of them: they stay float.

No grid of few bits holds both what is near a pole and what is far from it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.capture.classify import is_real
from simqat_jax.capture.passes import dependent
from simqat_jax.ir.graph import (
    Add,
    Constant,
    Elementwise,
    Float,
    Graph,
    Move,
    Mul,
    Node,
    as_kind,
)

_POLE = "a function with a pole has no table of few codes"
_NORM = "it is part of a norm"
_NEAR = 0.01
"""From a pole, as near as the argument of a function may come that becomes a table."""


def keep_norms_float(graph: Graph) -> Graph:
    """Leave functions with a pole float, and what multiplies or shifts by their results.

    A norm written by hand is a statistic of a tensor, its reciprocal square root, and products
    with that. In evaluation the statistic may be a constant: the same operations stay float.
    """
    trained = dependent(graph.nodes, graph.inputs)
    roots: set[int] = set()
    factors: set[int] = set()
    normalized: set[int] = set()
    statistics: set[int] = set()
    nodes = []
    for node in graph.nodes:
        operands = {v for v in node.inputs if isinstance(v, int)}
        if isinstance(node, Elementwise) and has_pole(node):
            factors.update(node.outputs)
            node = as_kind(Float, node, why=_POLE)
        elif operands & trained and not node.data_inputs(graph.data):
            roots.update(_made_of(node, "sqrt", roots))
            divides = node.primitive == "div" and node.inputs[1] in roots
            factors.update(node.outputs if divides else _made_of(node, "rsqrt", factors))
        elif isinstance(node, Mul) and operands & factors:
            others = (operands & graph.data) - factors
            (normalized if others else factors).update(node.outputs)
            node = as_kind(Float, node, why=_NORM)
        elif isinstance(node, Add) and operands & statistics:
            normalized.update(node.outputs)
            node = as_kind(Float, node, why=_NORM)
        elif isinstance(node, Add) and len(operands & graph.data) == 1 and operands & normalized:
            normalized.update(node.outputs)
        elif isinstance(node, Move) and operands & factors:
            factors.update(node.outputs)
        elif isinstance(node, Move) and operands & normalized:
            grows = graph.avals[node.outputs[0]].size > graph.avals[min(operands)].size
            (statistics if grows else normalized).update(node.outputs)
        nodes.append(node)
    return dataclasses.replace(graph, nodes=tuple(nodes))


def _made_of(node: Node, function: str, sources: set[int]) -> Sequence[int]:
    """Return the results of a function, and of what scales or shifts some of its own."""
    parts = {part.primitive for part in node.parts or (node,)}
    passes = isinstance(node, Add | Mul | Move | Float) and not sources.isdisjoint(node.inputs)
    return node.outputs if function in parts or (passes and node.layer is None) else ()


# Poles -------------------------------------------------------------------------------------------


class _Interval(NamedTuple):
    """Between which ends a value lies, and whether it follows the data."""

    lo: float = -math.inf
    hi: float = math.inf
    varies: bool = True

    def reaches(self, *points: float) -> bool:
        """Whether a value that follows the data may come near a point, or pass it."""
        near = (self.lo - _NEAR < p < self.hi + _NEAR for p in points)
        return self.varies and any(near)

    def falls_below(self, point: float) -> bool:
        return self.varies and self.lo < point + _NEAR


def has_pole(node: Node) -> bool:
    """Whether a function of one tensor has a pole where its argument may come near.

    Args:
      node: the function; the intervals of its parts follow from their operations.
    """
    values = {v: _Interval() for v in node.inputs if isinstance(v, int)}
    first = next((v for v in node.inputs if isinstance(v, int)), None)
    values.update({v: _Interval(varies=False) for v in values if v != first})
    try:
        for part in node.parts or (node,):
            operands = [
                _literal(v.value) if isinstance(v, Constant) else values[v] for v in part.inputs
            ]
            values.update(zip(part.outputs, _results(part.eqn, operands), strict=False))
    except _PoleError:
        return True
    return False


class _PoleError(Exception):
    """A function has a pole."""


def _literal(value: ArrayLike) -> _Interval:
    if not is_real(value):
        return _Interval(varies=False)
    array = np.asarray(value, np.float64)
    return _Interval(float(array.min()), float(array.max()), False) if array.size else _Interval()


def _results(eqn: core.JaxprEqn, operands: Sequence[_Interval]) -> list[_Interval]:
    subs = list(core.jaxprs_in_params(eqn.params))
    if not subs:
        return [_interval(eqn, operands)] * len(eqn.outvars)
    jaxpr = subs[0]
    env: dict[core.Var, _Interval] = dict.fromkeys(jaxpr.constvars, _Interval(varies=False))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(v: core.Var | core.Literal) -> _Interval:
        return _literal(v.val) if isinstance(v, core.Literal) else env[v]

    for inner in jaxpr.eqns:
        env.update(zip(inner.outvars, _results(inner, list(map(read, inner.invars))), strict=True))
    return list(map(read, jaxpr.outvars))


def _interval(eqn: core.JaxprEqn, xs: Sequence[_Interval]) -> _Interval:
    name, varies = eqn.primitive.name, any(x.varies for x in xs)
    _check_pole(eqn, xs)
    rule = _ENDS.get(name)
    if name == "mul" and eqn.invars[0] is eqn.invars[1]:
        rule = _ENDS["square"]
    if name == "integer_pow":
        rule = _ENDS["square"] if eqn.params["y"] in (2, 4) else None
    lo, hi = rule(*xs) if rule else (-math.inf, math.inf)
    return _Interval(lo, hi, varies)


def _check_pole(eqn: core.JaxprEqn, xs: Sequence[_Interval]) -> None:
    match eqn.primitive.name:
        case "rsqrt" | "log":
            pole = xs[0].falls_below(0.0)
        case "log1p":
            pole = xs[0].falls_below(-1.0)
        case "div" | "rem":
            pole = xs[1].reaches(0.0)
        case "integer_pow":
            pole = eqn.params["y"] < 0 and xs[0].reaches(0.0)
        case "pow":
            pole = xs[0].falls_below(0.0) and (xs[1].varies or xs[1].lo < 0)
        case "atanh" | "erf_inv":
            pole = xs[0].reaches(-1.0, 1.0)
        case "tan":
            pole = xs[0].varies
        case _:
            pole = False
    if pole:
        raise _PoleError


_Ends = tuple[float, float]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _times(a: _Interval, b: _Interval) -> _Ends:
    products = [0.0 if 0 in (p, q) else p * q for p in a[:2] for q in b[:2]]
    return min(products), max(products)


def _over(a: _Interval, b: _Interval) -> _Ends:
    if b.lo <= 0 <= b.hi:
        return -math.inf, math.inf
    return _times(a, _Interval(1 / b.hi, 1 / b.lo))


def _magnitude(x: _Interval) -> _Ends:
    ends = abs(x.lo), abs(x.hi)
    return (0.0 if x.lo <= 0 <= x.hi else min(ends)), max(ends)


def _squared(x: _Interval, *_: _Interval) -> _Ends:
    lo, hi = _magnitude(x)
    return lo * lo, hi * hi


def _within(lo: float, hi: float) -> Callable[..., _Ends]:
    return lambda *xs: (lo, hi)


def _same(x: _Interval, *_: _Interval) -> _Ends:
    return x.lo, x.hi


_ENDS: Mapping[str, Callable[..., _Ends]] = {
    **dict.fromkeys(("convert_element_type", "copy", "stop_gradient"), _same),
    **dict.fromkeys(("broadcast_in_dim", "reshape"), _same),
    **dict.fromkeys(("tanh", "erf", "sin", "cos", "sign"), _within(-1.0, 1.0)),
    **dict.fromkeys(("logistic", "ge", "gt", "le", "lt", "eq", "ne"), _within(0.0, 1.0)),
    "exp": lambda x: (_exp(x.lo), _exp(x.hi)),
    "exp2": lambda x: (_exp(x.lo * math.log(2)), _exp(x.hi * math.log(2))),
    "expm1": lambda x: (_exp(x.lo) - 1, _exp(x.hi) - 1),
    "abs": _magnitude,
    "square": _squared,
    "sqrt": lambda x: (math.sqrt(max(x.lo, 0.0)), math.sqrt(max(x.hi, 0.0))),
    "neg": lambda x: (-x.hi, -x.lo),
    "add": lambda a, b: (a.lo + b.lo, a.hi + b.hi),
    "sub": lambda a, b: (a.lo - b.hi, a.hi - b.lo),
    "mul": _times,
    "div": _over,
    "max": lambda a, b: (max(a.lo, b.lo), max(a.hi, b.hi)),
    "min": lambda a, b: (min(a.lo, b.lo), min(a.hi, b.hi)),
    "clamp": lambda lo, x, hi: (max(x.lo, lo.lo), min(x.hi, hi.hi)),
    "select_n": lambda _, *xs: (min(x.lo for x in xs), max(x.hi for x in xs)),
}
