"""Operations on real values as data: JAX's own primitives, by name, with plain parameters.

What a primitive computes is what JAX computes with it in evaluation, bit for bit. Its operands are
tensors of the program: real values, codes, which are dequantized, integers and truth values.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from simqat_jax.ir import replay
from simqat_jax.ir.graph import gathered_axis, shape_of
from simqat_jax.ir.program import Context, Op, Shape, Tensor

T = TypeVar("T")
_PREFIX = "lax."
Dims = Callable[[Sequence[int]], Shape]
"""Writes lengths so that -k stands for k times the batch size."""
Params = dict[str, Any]
"""Parameters of a primitive as JSON holds them."""


class UnknownPrimitive(Exception):
    """A primitive that is none of those here, or one with parameters that are not."""


def real(tensor: Tensor, x: jax.Array) -> jax.Array:
    """Return the real values of a tensor: of stored codes, or as they are."""
    if tensor.grid is None:
        return x
    return tensor.grid.dequantize(tensor.grid.codes(x)).astype(tensor.dtype)


# What each computes ------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., jax.Array]] = {
    **{
        name: getattr(lax, name)
        for name in (
            "add sub mul div rem pow max min neg abs sign floor ceil exp exp2 log log1p expm1 tanh "
            "logistic sqrt rsqrt cbrt sin cos tan asin acos atan atan2 sinh cosh asinh acosh atanh "
            "erf erfc erf_inv square is_finite nextafter eq ne lt le gt ge select_n clamp"
        ).split()
    },
    **{name: getattr(lax, f"bitwise_{name}") for name in ("and", "or", "xor", "not")},
}


def by_squares(x: T, y: int, multiply: Callable[[T, T], T]) -> T:
    """Return `x` to the power of a whole number above 0, of products in JAX's order."""
    result, square = None, x
    while y:
        if y & 1:
            result = square if result is None else multiply(result, square)
        y >>= 1
        square = multiply(square, square) if y else square
    assert result is not None
    return result


def _round(c: Context, x: jax.Array, *, method: str) -> jax.Array:
    del c
    return lax.round(x, lax.RoundingMethod[method])


def _gather(c: Context, x: jax.Array, indices: jax.Array, *, axis: int, mode: str) -> jax.Array:
    lead = indices.ndim - 1
    offset = (*range(axis), *range(axis + lead, x.ndim - 1 + lead))
    numbers = lax.GatherDimensionNumbers(
        offset_dims=offset, collapsed_slice_dims=(axis,), start_index_map=(axis,)
    )
    sizes = tuple(1 if k == axis else d for k, d in enumerate(x.shape))
    del c
    return lax.gather(x, indices, numbers, sizes, mode=lax.GatherScatterMode[mode])


def _reduction(
    combine: Callable[..., jax.Array], start: Callable[[np.dtype], Any]
) -> Callable[..., jax.Array]:
    def reduce(c: Context, x: jax.Array, *, axes: Sequence[int]) -> jax.Array:
        del c
        return lax.reduce(x, np.asarray(start(x.dtype), x.dtype), combine, axes)

    return reduce


def _end(dtype: np.dtype, sign: int) -> Any:
    """Return the lowest (-1) or highest (1) value of a type."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return sign > 0
    if jnp.issubdtype(dtype, jnp.floating):
        return sign * np.inf
    return jnp.iinfo(dtype).max if sign > 0 else jnp.iinfo(dtype).min


def _dot_general(
    c: Context, a: jax.Array, b: jax.Array, *, contract: Any, batch: Any, precision: Any
) -> jax.Array:
    return lax.dot_general(
        a,
        b,
        (contract, batch),
        precision=precision,
        preferred_element_type=jnp.dtype(c.outputs[0].dtype),
    )


def _conv(
    c: Context,
    x: jax.Array,
    kernel: jax.Array,
    *,
    layout: Any,
    strides: Any,
    padding: Any,
    input_dilation: Any,
    kernel_dilation: Any,
    groups: int,
    precision: Any,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        lax.ConvDimensionNumbers(*layout),
        groups,
        precision=precision,
        preferred_element_type=jnp.dtype(c.outputs[0].dtype),
    )


_COMPUTES: dict[str, Callable[..., Any]] = {
    **{name: lambda c, *values, f=function: f(*values) for name, function in _FUNCTIONS.items()},
    "integer_pow": lambda c, x, y: lax.integer_pow(x, y),
    "round": _round,
    "convert_element_type": lambda c, x: lax.convert_element_type(x, jnp.dtype(c.outputs[0].dtype)),
    # Moves
    "reshape": lambda c, x: lax.reshape(x, c.shape(c.outputs[0].shape)),
    "broadcast_in_dim": lambda c, x, dimensions: lax.broadcast_in_dim(
        x, c.shape(c.outputs[0].shape), dimensions
    ),
    "tile": lambda c, x, repeats: jnp.tile(x, repeats),
    "transpose": lambda c, x, permutation: lax.transpose(x, permutation),
    "rev": lambda c, x, dimensions: lax.rev(x, dimensions),
    "slice": lambda c, x, start, limit, strides: lax.slice(x, start, c.shape(limit), strides),
    "concatenate": lambda c, *xs, axis: lax.concatenate(xs, axis),
    "pad": lambda c, x, value, padding: lax.pad(x, value, padding),
    "gather": _gather,
    # Along axes
    "reduce_sum": _reduction(lax.add, lambda dtype: 0),
    "reduce_prod": _reduction(lax.mul, lambda dtype: 1),
    "reduce_max": _reduction(lax.max, lambda dtype: _end(dtype, -1)),
    "reduce_min": _reduction(lax.min, lambda dtype: _end(dtype, 1)),
    "reduce_and": _reduction(lax.bitwise_and, lambda dtype: True),
    "reduce_or": _reduction(lax.bitwise_or, lambda dtype: False),
    "argmax": lambda c, x, axis: lax.argmax(x, axis, jnp.dtype(c.outputs[0].dtype).type),
    "argmin": lambda c, x, axis: lax.argmin(x, axis, jnp.dtype(c.outputs[0].dtype).type),
    "cumsum": lambda c, x, axis, reverse: lax.cumsum(x, axis, reverse),
    "sort": lambda c, x, axis: lax.sort(x, dimension=axis),
    "top_k": lambda c, x, k, axis: lax.top_k(x, k, axis=axis),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
ELEMENTWISE = frozenset((*_FUNCTIONS, "integer_pow", "round", "convert_element_type"))
"""Those that compute each element by itself; their operands broadcast."""
_SAME = {
    **dict.fromkeys(("squeeze", "expand_dims", "copy", "stop_gradient", "name"), "reshape"),
    "sharding_constraint": "reshape",
    "add_any": "add",
}
"""Those that are another by another name; a reshape is told by its output."""

# Parameters --------------------------------------------------------------------------------------


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, values))


def _reshape_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    del dims
    if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
        raise UnknownPrimitive("reshape in another order of axes")
    return {}


def _axes(eqn: core.JaxprEqn, dims: Dims) -> Params:
    del dims
    return {"axes": _ints(eqn.params["axes"])}


def _one_axis(eqn: core.JaxprEqn, dims: Dims) -> Params:
    (axis,) = _axes(eqn, dims)["axes"]
    return {"axis": axis}


def _slice_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    params = eqn.params
    start = _ints(params["start_indices"])
    strides = _ints(params["strides"] or (1,) * len(start))
    return {"start": start, "limit": dims(params["limit_indices"]), "strides": strides}


def _gather_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    """Return the parameters of a gather along one axis."""
    del dims
    axis, mode, fill = gathered_axis(eqn), eqn.params["mode"], eqn.params["fill_value"]
    fills = mode == lax.GatherScatterMode.FILL_OR_DROP
    if axis is None and len(eqn.params["dimension_numbers"].start_index_map) != 1:
        raise UnknownPrimitive("gather along several axes")
    if axis is None or (fills and fill is not None and not np.isnan(fill)):
        raise UnknownPrimitive("gather of parts")
    return {"axis": axis, "mode": mode.name}


def _sort_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    del dims
    if len(eqn.invars) > 1:
        raise UnknownPrimitive("sort by keys")
    return {"axis": int(eqn.params["dimension"])}


def _precision(eqn: core.JaxprEqn) -> tuple[str, ...] | None:
    precision = eqn.params["precision"]
    if precision is not None and not all(isinstance(p, lax.Precision) for p in precision):
        raise UnknownPrimitive(f"{eqn.primitive.name} with an algorithm of its own")
    return None if precision is None else tuple(p.name.lower() for p in precision)


def _dot_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    del dims
    contract, batch = eqn.params["dimension_numbers"]
    return {
        "contract": tuple(map(_ints, contract)),
        "batch": tuple(map(_ints, batch)),
        "precision": _precision(eqn),
    }


def _conv_params(eqn: core.JaxprEqn, dims: Dims) -> Params:
    del dims
    params = eqn.params
    if params["batch_group_count"] != 1:
        raise UnknownPrimitive("conv_general_dilated with groups of the batch")
    return {
        "layout": tuple(map(_ints, params["dimension_numbers"])),
        "strides": _ints(params["window_strides"]),
        "padding": tuple(map(_ints, params["padding"])),
        "input_dilation": _ints(params["lhs_dilation"]),
        "kernel_dilation": _ints(params["rhs_dilation"]),
        "groups": int(params["feature_group_count"]),
        "precision": _precision(eqn),
    }


_ENCODERS: dict[str, Callable[[core.JaxprEqn, Dims], Params]] = {
    "reshape": _reshape_params,
    "integer_pow": lambda eqn, dims: {"y": int(eqn.params["y"])},
    "round": lambda eqn, dims: {"method": lax.RoundingMethod(eqn.params["rounding_method"]).name},
    "broadcast_in_dim": lambda eqn, dims: {"dimensions": _ints(eqn.params["broadcast_dimensions"])},
    "tile": lambda eqn, dims: {"repeats": _ints(eqn.params["reps"])},
    "transpose": lambda eqn, dims: {"permutation": _ints(eqn.params["permutation"])},
    "rev": lambda eqn, dims: {"dimensions": _ints(eqn.params["dimensions"])},
    "slice": _slice_params,
    "concatenate": lambda eqn, dims: {"axis": int(eqn.params["dimension"])},
    "pad": lambda eqn, dims: {"padding": tuple(map(_ints, eqn.params["padding_config"]))},
    "gather": _gather_params,
    **dict.fromkeys((name for name in _COMPUTES if name.startswith("reduce_")), _axes),
    "argmax": _one_axis,
    "argmin": _one_axis,
    "cumsum": lambda eqn, dims: {
        "axis": int(eqn.params["axis"]),
        "reverse": bool(eqn.params["reverse"]),
    },
    "sort": _sort_params,
    "top_k": lambda eqn, dims: {
        "k": int(eqn.params["k"]),
        "axis": int(eqn.params.get("axis", len(shape_of(eqn.invars[0]).shape) - 1)),
    },
    "dot_general": _dot_params,
    "conv_general_dilated": _conv_params,
}


# The operation of a program ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Primitive(Op):
    """A primitive of JAX on real values, integers or truth values.

    Attributes:
      params: its parameters, as far as they are not told by its output.
    """

    kinds = tuple(_PREFIX + name for name in _COMPUTES)
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """The primitive's name in JAX."""
        return self.kind.removeprefix(_PREFIX)

    @classmethod
    def of(
        cls, name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...], params: Params
    ) -> "Primitive":
        """Return the primitive of a name in JAX."""
        kind = _PREFIX + name
        return cls(kind=kind, path=path, inputs=inputs, outputs=outputs, params=params)

    @property
    def computes_reals(self) -> bool:
        return not replay.moves(self.name)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        values = [real(tensor, x) for tensor, x in zip(c.inputs, inputs, strict=True)]
        if self.name in ELEMENTWISE:
            shape = c.shape(c.outputs[0].shape)
            values = [jnp.broadcast_to(x, shape) for x in values]

        def compute(*values: jax.Array) -> Any:
            return _COMPUTES[self.name](c, *values, **self.params)

        results = replay.alone(self.name, jnp.dtype(c.outputs[0].dtype), compute, values)
        return list(map(jnp.asarray, results))


def encoded(eqn: core.JaxprEqn, dims: Dims) -> tuple[str, Params]:
    """Return the name and the parameters of the Primitive that an equation is.

    Args:
      eqn: an equation of a jaxpr.
      dims: writes lengths of the program.

    Raises:
      UnknownPrimitive: there is none.
    """
    name = eqn.primitive.name
    name = _SAME.get(name, name)
    if name not in _COMPUTES:
        raise UnknownPrimitive(name)
    encode = _ENCODERS.get(name)
    return name, encode(eqn, dims) if encode else {}


OPERATIONS: dict[type, Any] = {}
PROGRAM_OPERATIONS = (Primitive,)
