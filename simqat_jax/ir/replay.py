"""Run captured operations again: at other shapes, or with a rounding of its own for each."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray, Tracer
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.ir.graph import Constant, Node, Operand, shape_of
from simqat_jax.numerics.affine import own_rounding, true_divide

Bind = Callable[[core.JaxprEqn, Sequence[ArrayLike]], Sequence[ArrayLike]]
INLINED_CALLS = ("jit", "pjit", "closed_call", "core_call")
"""Calls that are nothing but what they call."""
_CALLS = (*INLINED_CALLS, "custom_jvp_call", "custom_vjp_call")
_ARITHMETIC = frozenset("add sub mul div square integer_pow".split())
"""What compilers contract with their neighbours, or reassociate with constants."""
_MOVES = frozenset(
    "reshape transpose squeeze expand_dims broadcast_in_dim slice rev copy split concatenate pad "
    "tile gather dynamic_slice select_n convert_element_type stop_gradient iota pvary".split()
)
"""What computes nothing."""


def _run(
    jaxpr: core.Jaxpr, consts: Sequence[ArrayLike], values: Sequence[ArrayLike], bind: Bind
) -> list[ArrayLike]:
    env: dict[core.Var, ArrayLike] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(v: core.Var | core.Literal) -> ArrayLike:
        return v.val if isinstance(v, core.Literal) else env[v]

    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, _run_eqn(eqn, list(map(read, eqn.invars)), bind), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _called(eqn: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """Return the function that a call calls, None for an operation of another kind."""
    if eqn.primitive.name not in _CALLS:
        return None
    return next(eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params)


def _run_eqn(eqn: core.JaxprEqn, values: Sequence[ArrayLike], bind: Bind) -> Sequence[ArrayLike]:
    closed = _called(eqn)
    if closed is not None:
        return _run(closed.jaxpr, closed.consts, values, bind)
    return bind(eqn, values)


def alone(
    name: str,
    dtype: np.dtype | None,
    compute: Callable[..., Any],
    values: Sequence[ArrayLike],
) -> Sequence[ArrayLike]:
    """Run a primitive so that it rounds by itself, whatever is compiled around it.

    Args:
      name: the primitive's.
      dtype: of its first result; None: it has none.
      compute: makes its result, or all of its results, of its operands.
      values: its operands.
    """
    if name in _ARITHMETIC and dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        if name == "div":
            a, b = jnp.broadcast_arrays(*(jnp.asarray(v, dtype) for v in values))
            return (own_rounding(true_divide(a, b)),)
        return (own_rounding(compute(*values)),)
    # In which order a sum is taken, or how a function is approximated, depends on what it is fused
    # with.
    apart = not moves(name)
    result = compute(*(lax.optimization_barrier(tuple(values)) if apart else values))
    made = tuple(result) if isinstance(result, list | tuple) else (result,)
    return lax.optimization_barrier(made) if apart else made


def moves(name: str) -> bool:
    """Whether a primitive computes nothing."""
    return name in _MOVES


def results(
    eqn: core.JaxprEqn, values: Sequence[ArrayLike], params: dict[str, object] | None = None
) -> Sequence[ArrayLike]:
    """Run an equation; it rounds by itself, whatever is compiled around it.

    Args:
      eqn: the equation.
      values: its operands.
      params: other parameters than its own, as `bind` takes them.
    """
    params = eqn.primitive.get_bind_params(eqn.params) if params is None else params
    compute = partial(eqn.primitive.bind, **params)
    return alone(eqn.primitive.name, _dtype(eqn), compute, varying_as_traced(eqn, values))


def varying_as_traced(eqn: core.JaxprEqn, values: Sequence[ArrayLike]) -> list[ArrayLike]:
    """Under `shard_map`, let operands vary over the mesh axes that the equation asks for.

    JAX does so in operations of their own; those of constants are not in the graph.
    """
    return [_varying(value, v) for value, v in zip(values, eqn.invars, strict=True)]


def _varying(value: ArrayLike, traced: core.Var | core.Literal) -> ArrayLike:
    asked = _axes(traced.aval)
    axes = asked and asked - _axes(jax.typeof(value))
    return lax.pcast(value, tuple(axes), to="varying") if axes else value


def _axes(aval: object) -> frozenset:
    """Return the mesh axes that an array varies over."""
    return aval.manual_axis_type.varying if isinstance(aval, ShapedArray) else frozenset()


def run_node(node: Node, values: Sequence[ArrayLike], bind: Bind) -> list[ArrayLike]:
    """Run what a node was captured as, part by part."""
    env: dict[Operand, ArrayLike] = dict(zip(node.inputs, values, strict=True))
    for part in node.parts or (node,):
        operands = [
            v.value if isinstance(v, Constant) and v not in env else env[v] for v in part.inputs
        ]
        env.update(zip(part.outputs, _run_eqn(part.eqn, operands, bind), strict=True))
    return [env[v] for v in node.outputs]


def rounded(node: Node, values: Sequence[ArrayLike]) -> list[jax.Array]:
    """Run a node so that what it returns does not depend on what is compiled around it.

    Every sum, product and quotient rounds by itself: none is contracted to a fused multiply-add,
    no quotient becomes a product with the inverse. So a model's own float arithmetic has one result
    in evaluation and in the integer model, where half of all pixels may lie on ties of a grid.

    Args:
      node: any, without effects.
      values: one for each of its inputs.
    """
    return [jnp.asarray(x) for x in run_node(node, values, results)]


def _dtype(eqn: core.JaxprEqn) -> np.dtype | None:
    return shape_of(eqn.outvars[0]).dtype if eqn.outvars else None


# Elementwise functions ---------------------------------------------------------------------------


def _bind_pointwise(eqn: core.JaxprEqn, values: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
    if eqn.primitive.name in ("broadcast_in_dim", "reshape"):
        return (values[0],)
    arrays = [jnp.reshape(v, ()) if np.size(v) == 1 else jnp.asarray(v) for v in values]
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    arrays = _equally_varying([jnp.broadcast_to(a, shape) for a in arrays])
    # Nothing is rewritten as a pair, `exp(a) * exp(b)` for instance.
    return [lax.optimization_barrier(v) for v in results(eqn, arrays)]


def _equally_varying(arrays: list[jax.Array]) -> list[jax.Array]:
    """Under `shard_map`, let all arrays vary over the mesh axes that any of them varies over.

    A selection between equals takes the axes of its condition along, and compilers drop it.
    """
    if len(arrays) < 2 or not any(isinstance(a, Tracer) for a in arrays):
        return arrays
    conditions = [lax.ne(a, a) for a in arrays]
    return [reduce(lambda x, c: lax.select(c, x, x), conditions, a) for a in arrays]


def pointwise(node: Node, values: Sequence[ArrayLike]) -> jax.Array:
    """Compute an elementwise node on a first operand of any shape.

    Every operation rounds by itself: the results are the same with and without jit.

    Args:
      node: of kind "elementwise" or "clamp".
      values: one for each of its inputs; those behind the first hold one number, maybe often.
    """
    first, *rest = values
    values = [first, *(jnp.ravel(x)[0] for x in rest)]
    (result,) = run_node(node, values, _bind_pointwise)
    return jnp.asarray(result)


# Another batch size ------------------------------------------------------------------------------


def scales_with_batch(node: Node) -> bool:
    """Whether `at_batch` can run the node: it holds no loop or branch of its own."""
    return all(is_plain(part.eqn) for part in node.parts or (node,))


def is_plain(eqn: core.JaxprEqn) -> bool:
    """Whether an equation holds no loop or branch, at any depth."""
    closed = _called(eqn)
    if closed is not None:
        return all(map(is_plain, closed.jaxpr.eqns))
    return not list(core.jaxprs_in_params(eqn.params))


def constants(node: Node) -> list[ArrayLike]:
    """Return the constants that a node's operations hold, at any depth."""
    found = []
    for part in node.parts or (node,):
        found += [v.value for v in part.inputs if isinstance(v, Constant)]
        found += _constants_of(part.eqn)
    return found


def _constants_of(eqn: core.JaxprEqn) -> list[ArrayLike]:
    found = [v.val for v in eqn.invars if isinstance(v, core.Literal)]
    for value in jax.tree.leaves(list(eqn.params.values())):
        if isinstance(value, core.ClosedJaxpr):
            found += value.consts
    for sub in core.jaxprs_in_params(eqn.params):
        for inner in sub.eqns:
            found += _constants_of(inner)
    return found


def _rescaled(value: object, old: int, new: int) -> object:
    if type(value) is int and value and value % old == 0:
        return value // old * new
    if type(value) is tuple:
        return tuple(_rescaled(v, old, new) for v in value)
    return value


def at_batch(node: Node, values: Sequence[ArrayLike], old: int, new: int) -> Sequence[ArrayLike]:
    """Run a node that was captured with batches of `old` on batches of `new`.

    Args:
      node: one for which `scales_with_batch`.
      values: one for each of its inputs.
      old: a batch size that divides no other length in the model.
      new: the batch size of `values`.
    """

    def bind(eqn: core.JaxprEqn, values: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
        return results_at_batch(eqn, values, old, new)

    return run_node(node, values, bind)


def results_at_batch(
    eqn: core.JaxprEqn, values: Sequence[ArrayLike], old: int, new: int
) -> Sequence[ArrayLike]:
    """Run an equation that was captured with batches of `old` on batches of `new`."""
    params = eqn.primitive.get_bind_params(eqn.params)
    return results(eqn, values, {k: _rescaled(v, old, new) for k, v in params.items()})
