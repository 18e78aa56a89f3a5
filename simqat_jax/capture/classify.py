"""What one equation of a jaxpr is: its class of node, what it clamps to, its name for display."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.ir.graph import (
    Add,
    Clamp,
    Concat,
    Constant,
    Elementwise,
    Extremum,
    Float,
    Mean,
    Move,
    Mul,
    Node,
    Operand,
    Position,
    shape_of,
)
from simqat_jax.ir.replay import INLINED_CALLS
from simqat_jax.numerics.requantize import FREE, Bounds

_MOVES = (
    "reshape transpose squeeze expand_dims broadcast_in_dim slice dynamic_slice rev copy split "
    "tile convert_element_type stop_gradient gather reduce_max reduce_min reduce_window_max "
    "sharding_constraint name pad pvary".split()
)
_FUNCTIONS = (
    "neg abs sign floor ceil round exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt sin cos "
    "tan asin acos atan atan2 sinh cosh asinh acosh atanh erf erfc erf_inv integer_pow square pow "
    "div rem clamp select_n ge gt le lt eq ne and or not xor is_finite nextafter".split()
)
POINTWISE = frozenset(_FUNCTIONS) | set(
    "add sub add_any mul max min convert_element_type copy stop_gradient name".split()
)
"""What works on each element by itself."""
REDUCTIONS = frozenset(
    "reduce_sum reduce_prod reduce_max reduce_min reduce_and reduce_or argmax argmin".split()
)
"""What leaves out axes, and works along no other."""
_CLASSES: dict[str, type[Node]] = {
    **dict.fromkeys(_MOVES, Move),
    **dict.fromkeys(_FUNCTIONS, Elementwise),
    **dict.fromkeys(("add", "sub", "add_any"), Add),
    "mul": Mul,
    **dict.fromkeys(("max", "min"), Extremum),
    **dict.fromkeys(("reduce_sum", "reduce_window_sum"), Mean),
    **dict.fromkeys(("argmax", "argmin"), Position),
    **dict.fromkeys(("concatenate", "stack"), Concat),
}
# What an elementwise function may be made of besides elementwise operations.
_ALSO_ELEMENTWISE = frozenset(
    "add sub mul max min convert_element_type copy stop_gradient broadcast_in_dim pvary".split()
)
# Kept whole, under their names, where the model calls them through jit.
_NAMED_FUNCTIONS = frozenset(
    "relu relu6 leaky_relu sigmoid silu hard_sigmoid hard_silu hard_tanh elu celu selu gelu "
    "softplus log_sigmoid soft_sign mish squareplus sparse_plus".split()
)
# Kept whole and float: eight bits of what they are made of are too few.
_FLOAT_FUNCTIONS = frozenset("log_softmax _var _std norm".split())
_DISPLAY = {
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_sum": "sum",
    "concatenate": "concat",
    "stack": "concat",
    "logistic": "sigmoid",
    "hard_silu": "hard_swish",
    "convert_element_type": "convert",
    "broadcast_in_dim": "broadcast",
}


# Class -------------------------------------------------------------------------------------------


def classify(eqn: core.JaxprEqn, inputs: Sequence[Operand]) -> type[Node]:
    """Return the class of node that an equation becomes, seen by itself.

    Args:
      eqn: the equation.
      inputs: its operands in the graph.
    """
    if clamp_bounds(eqn, inputs):
        return Clamp
    name = eqn.primitive.name
    subs = list(core.jaxprs_in_params(eqn.params))
    if subs:
        table = len(eqn.outvars) == 1 and _only_elementwise(subs[0])
        return Elementwise if table else Float
    kind = _CLASSES.get(name, Float)
    if kind is Elementwise:
        return Elementwise
    if kind is Position:
        return Position if _is_floating(eqn.invars[0]) else Float
    if not eqn.outvars or not _is_floating(eqn.outvars[0]):
        return Float
    if kind is Move:
        return Move if _keeps_grid(eqn, inputs) else Float
    return kind


def _keeps_grid(eqn: core.JaxprEqn, inputs: Sequence[Operand]) -> bool:
    """Whether an operation that moves values adds none that may be off their grid."""
    match eqn.primitive.name:
        case "gather" if eqn.params["fill_value"] not in (None, 0):
            return False
        case "pad" if _scalar_value(inputs[1]) != 0.0:
            return False
    return _is_floating(eqn.invars[0])


def _is_floating(v: core.Var | core.Literal) -> bool:
    return bool(jnp.issubdtype(shape_of(v).dtype, jnp.floating))


def _only_elementwise(jaxpr: core.Jaxpr) -> bool:
    if any(shape_of(v).size != 1 for v in jaxpr.constvars):
        return False
    for eqn in jaxpr.eqns:
        subs = list(core.jaxprs_in_params(eqn.params))
        name = eqn.primitive.name
        if subs and not all(map(_only_elementwise, subs)):
            return False
        if not subs and _CLASSES.get(name) is not Elementwise and name not in _ALSO_ELEMENTWISE:
            return False
    return True


# Clamps ------------------------------------------------------------------------------------------


def clamp_bounds(eqn: core.JaxprEqn, inputs: Sequence[Operand | None]) -> Bounds | None:
    """Return what an equation clamps its one tensor to, or None if it does anything else.

    Args:
      eqn: the equation.
      inputs: its operands in the graph; None where they are not known to be constant.
    """
    subs = list(core.jaxprs_in_params(eqn.params))
    if subs:
        return _chain_bounds(subs[0])
    known = [value for value in map(_scalar_value, inputs) if value is not None]
    match eqn.primitive.name, known:
        case "max", [bound]:
            return bound, math.inf
        case "min", [bound]:
            return -math.inf, bound
        case "clamp", [lo, hi]:
            return lo, hi
    return None


def _chain_bounds(jaxpr: core.Jaxpr) -> Bounds | None:
    """Return what a function of one tensor clamps it to, one operation behind the other."""
    values, (lo, hi) = jaxpr.invars, FREE
    constants: dict[core.Var, Constant] = {}  # those that vary over a mesh axis
    for eqn in jaxpr.eqns:
        inputs = [
            Constant(v.val) if isinstance(v, core.Literal) else constants.get(v) for v in eqn.invars
        ]
        if eqn.primitive.name == "pvary" and inputs[0] is not None:
            constants[eqn.outvars[0]] = inputs[0]
            continue
        bounds = clamp_bounds(eqn, inputs)
        tensors = [v for v, known in zip(eqn.invars, inputs, strict=True) if known is None]
        if bounds is None or tensors != values:
            return None
        lo, hi = (min(max(b, bounds[0]), bounds[1]) for b in (lo, hi))
        values = eqn.outvars
    return (lo, hi) if len(values) == 1 and jaxpr.outvars == values else None


def _scalar_value(operand: Operand | None) -> float | None:
    """Return a constant that is one real number, or None: complex numbers have no order."""
    if not isinstance(operand, Constant) or np.size(operand.value) != 1:
        return None
    return float(np.asarray(operand.value).item()) if is_real(operand.value) else None


def is_real(value: ArrayLike) -> bool:
    """Whether a constant holds real or whole numbers, or truth values: nothing complex, no key."""
    dtype = jnp.result_type(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


# Functions and names -----------------------------------------------------------------------------


def function_name(eqn: core.JaxprEqn) -> str:
    """Return the name of the function that an equation calls; "" if it has none."""
    return str(eqn.params.get("name", ""))


def inner_equations(eqn: core.JaxprEqn) -> list[core.JaxprEqn]:
    """Return what an equation that calls a function computes, nested functions opened."""
    found = []
    for jaxpr in core.jaxprs_in_params(eqn.params):
        for inner in jaxpr.eqns:
            found += inner_equations(inner) or [inner]
    return found


def calls(eqn: core.JaxprEqn, name: str, primitives: str) -> bool:
    """Whether an equation calls a function of this name that computes these, in this order.

    What repeats values, stops gradients, changes types or is of mesh axes alone counts for nothing.
    """
    if function_name(eqn) != name:
        return False
    found = [inner.primitive.name for inner in inner_equations(eqn)]
    aside = ("broadcast_in_dim", "stop_gradient", "convert_element_type", "pvary")
    return [n for n in found if n not in aside] == primitives.split()


def is_float_function(eqn: core.JaxprEqn) -> bool:
    """Whether an equation calls a function that stays float."""
    return function_name(eqn) in _FLOAT_FUNCTIONS


def is_named_function(eqn: core.JaxprEqn, inputs: Sequence[Operand]) -> bool:
    """Whether an equation calls a known function of one tensor, of that name and nature."""
    named = function_name(eqn) in _NAMED_FUNCTIONS
    return named and classify(eqn, inputs) in (Clamp, Elementwise)


def display_name(eqn: core.JaxprEqn, bounds: Bounds | None) -> str:
    """Return what a plan calls an operation. Nothing else depends on it.

    Args:
      eqn: the equation.
      bounds: what it clamps to, None for what is no clamp.
    """
    primitive, function = eqn.primitive.name, function_name(eqn)
    if bounds == (0.0, math.inf):
        return "relu"
    if bounds and not function:
        return "clip"
    if primitive == "reduce_window_max" and eqn.params["window_dimensions"][-1] == 1:
        return "max_pool"
    # Other operations than calls have a "name" too, which is none of a function.
    calls = primitive in INLINED_CALLS or "call" in primitive
    name = function.lstrip("_") if function and calls else primitive
    return _DISPLAY.get(name, name)
