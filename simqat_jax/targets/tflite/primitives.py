"""Write primitives on real values as TFLite operators.

Sums, products, quotients, comparisons, moves and integers are exact in LiteRT; roots, exponentials
and sums along axes are not.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from simqat_jax.ir.program import Program, Shape, Tensor
from simqat_jax.ops.primitives import Primitive
from simqat_jax.targets.refusals import check_types, refuse, refuse_primitive
from simqat_jax.targets.tflite.subgraph import Plain
from simqat_jax.targets.tflite.writer import Writer

_UNARY = {name: name.upper() for name in "neg abs sign floor ceil exp log tanh logistic".split()}
_UNARY |= {name: name.upper() for name in "sqrt rsqrt sin cos".split()}
_BINARY = {name: name.upper() for name in "add sub mul div pow atan2".split()}
_COMPARE = {"eq": "EQUAL", "ne": "NOT_EQUAL", "lt": "LESS", "le": "LESS_EQUAL", "gt": "GREATER"}
_COMPARE |= {"ge": "GREATER_EQUAL"}
_LOGIC = {"and": "LOGICAL_AND", "or": "LOGICAL_OR", "xor": "NOT_EQUAL"}
_REDUCE = {"reduce_sum": "SUM", "reduce_prod": "REDUCE_PROD", "reduce_max": "REDUCE_MAX"}
_REDUCE |= {"reduce_min": "REDUCE_MIN", "reduce_and": "REDUCE_ALL", "reduce_or": "REDUCE_ANY"}

VERSIONS = {
    **dict.fromkeys((*_UNARY.values(), "POW", "ATAN2", "SELECT_V2", "BITWISE_XOR"), (None, 1)),
    **dict.fromkeys(_COMPARE.values(), (None, 1)),
    **dict.fromkeys(("LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT", "TOPK_V2"), (None, 1)),
    **dict.fromkeys(("SUM", "REDUCE_PROD", "REDUCE_ALL", "REDUCE_ANY"), ("ReducerOptions", 1)),
    "ARG_MAX": ("ArgMaxOptions", 1),
    "ARG_MIN": ("ArgMinOptions", 1),
    "BATCH_MATMUL": ("BatchMatMulOptions", 1),
    "BROADCAST_TO": ("BroadcastToOptions", 2),
    "SHAPE": ("ShapeOptions", 1),
    "CUMSUM": ("CumsumOptions", 1),
}
"""The options and the version of each operator that only primitives need."""


@dataclasses.dataclass(frozen=True)
class _At:
    """A primitive that is being written."""

    w: Writer
    op: Primitive

    @property
    def params(self) -> Mapping[str, Any]:
        return self.op.params

    def output(self, position: int = 0) -> Tensor:
        return self.w.source.tensors[self.op.outputs[position]]

    def make(
        self, name: str, *inputs: Plain, shape: Shape | None = None, dtype: str = "", **options: Any
    ) -> Plain:
        """Add an operator; by default it makes a tensor like the primitive's output."""
        shape = self.output().shape if shape is None else shape
        made = self.w.plain(self.op.path, shape, dtype or self.output().dtype)
        self.w.emit(name, [x.index for x in inputs], made.index, **options)
        return made

    def number(self, value: ArrayLike, dtype: str = "float32") -> Plain:
        value = np.asarray(value, dtype)
        return Plain(self.w.constant(value, value.dtype), value.shape, dtype)

    def ints(self, values: ArrayLike) -> Plain:
        return self.number(values, "int32")

    def reshaped(self, x: Plain, shape: Sequence[int]) -> Plain:
        if tuple(shape) == x.shape:
            return x
        if sum(d < 0 for d in shape) > 1:
            refuse(
                self.op,
                "more than one of its lengths depends on the batch size",
                "Reshape to others.",
            )
        target = np.maximum(np.asarray(shape, np.int32), -1)
        return self.make("RESHAPE", x, shape=tuple(shape), dtype=x.dtype, newShape=target)

    def transposed(self, x: Plain, order: Sequence[int]) -> Plain:
        if list(order) == sorted(order):
            return x
        shape = tuple(x.shape[k] for k in order)
        return self.make("TRANSPOSE", x, self.ints(order), shape=shape, dtype=x.dtype)

    def cast(self, x: Plain, dtype: str) -> Plain:
        if x.dtype == dtype:
            return x
        made = self.w.plain(self.op.path, x.shape, dtype)
        types = {
            k: self.w.tensors[v.index].type for k, v in (("inDataType", x), ("outDataType", made))
        }
        self.w.emit("CAST", [x.index], made.index, **types)
        return made


def write(w: Writer, op: Primitive) -> None:
    """Write one primitive."""
    made = WRITERS[op.name](_At(w, op), *map(w.real, op.inputs))
    w.reals.update(zip(op.outputs, [made] if isinstance(made, Plain) else made, strict=True))


def check(program: Program, op: Primitive) -> None:
    """Raise RefusedError for a primitive that LiteRT does not compute."""
    if op.name not in WRITERS:
        refuse_primitive(program, op, f"TFLite has no {op.name}")
    check_types(program, op)


def _refuse(at: _At, problem: str) -> NoReturn:
    refuse_primitive(at.w.source, at.op, problem)


# Elementwise -------------------------------------------------------------------------------------


def _unary(at: _At, x: Plain) -> Plain:
    return at.make(_UNARY[at.op.name], x)


def _binary(at: _At, a: Plain, b: Plain) -> Plain:
    return at.make(_BINARY[at.op.name], a, at.cast(b, a.dtype))


def _rem(at: _At, a: Plain, b: Plain) -> Plain:
    if a.dtype != "int32":
        _refuse(at, "TFLite has no remainder of real numbers")
    return at.make("SUB", a, at.make("MUL", at.make("DIV", a, b), b))


def _extreme(at: _At, a: Plain, b: Plain) -> Plain:
    names = ("LOGICAL_OR", "LOGICAL_AND") if a.dtype == "bool" else ("MAXIMUM", "MINIMUM")
    return at.make(names[at.op.name == "min"], a, b)


def _logic(at: _At, a: Plain, b: Plain) -> Plain:
    if a.dtype == "bool":
        return at.make(_LOGIC[at.op.name], a, b)
    if at.op.name != "xor":
        _refuse(at, "TFLite joins no bits of integers")
    return at.make("BITWISE_XOR", a, b)


def _not(at: _At, x: Plain) -> Plain:
    if x.dtype == "bool":
        return at.make("LOGICAL_NOT", x)
    return at.make("SUB", at.ints(-1), x)


def _compare(at: _At, a: Plain, b: Plain) -> Plain:
    if a.dtype == "bool":
        a, b = at.cast(a, "int32"), at.cast(b, "int32")
    return at.make(_COMPARE[at.op.name], a, b)


def _select(at: _At, which: Plain, *cases: Plain) -> Plain:
    if len(cases) != 2:
        _refuse(at, f"it selects one of {len(cases)} tensors")
    return at.make("SELECT_V2", at.cast(which, "bool"), cases[1], cases[0])


def _clamp(at: _At, lo: Plain, x: Plain, hi: Plain) -> Plain:
    return at.make("MINIMUM", at.make("MAXIMUM", x, lo), hi)


def _integer_pow(at: _At, x: Plain) -> Plain:
    """Multiply as JAX does: by squares of squares."""
    y, result, square = abs(at.params["y"]), None, x
    if not y:
        return at.make("POW", x, at.number(0, x.dtype))
    while y:
        if y & 1:
            result = square if result is None else at.make("MUL", result, square)
        y >>= 1
        square = at.make("MUL", square, square) if y else square
    assert result is not None
    return result if at.params["y"] > 0 else at.make("DIV", at.number(1), result)


def _round(at: _At, x: Plain) -> Plain:
    if at.params["method"] != "TO_NEAREST_EVEN":
        _refuse(at, "it rounds halves away from zero")
    return at.make("ROUND", x)


def _convert(at: _At, x: Plain) -> Plain:
    return at.cast(x, at.output().dtype)


def _cbrt(at: _At, x: Plain) -> Plain:
    root = at.make("POW", at.make("ABS", x), at.number(1 / 3))
    return at.make("MUL", at.make("SIGN", x), root)


def _is_finite(at: _At, x: Plain) -> Plain:
    zero = at.make("SUB", x, x, shape=x.shape, dtype=x.dtype)
    return at.make("EQUAL", zero, at.number(0))


# Moves -------------------------------------------------------------------------------------------


def _reshape(at: _At, x: Plain) -> Plain:
    return at.reshaped(x, at.output().shape)


def _broadcast(at: _At, x: Plain) -> Plain:
    target = at.output().shape
    lengths = dict(zip(at.params["dimensions"], x.shape, strict=True))
    thin = at.reshaped(x, [lengths.get(k, 1) for k in range(len(target))])
    pairs = list(zip(thin.shape, target, strict=True))
    if thin.shape == target:
        return thin
    if any(a != b and b < 0 for a, b in pairs):
        return at.make("BROADCAST_TO", thin, _lengths(at, target))
    repeats = at.ints([1 if a == b else b for a, b in pairs])
    return at.make("TILE", thin, repeats)


def _lengths(at: _At, shape: Shape) -> Plain:
    """Return a shape as a tensor, with the batch size read off an input of the model."""
    inputs = [at.w.source.tensors[i] for i in at.w.source.inputs]
    places = (
        (i, axis)
        for i, t in zip(at.w.source.inputs, inputs, strict=True)
        for axis, d in enumerate(t.shape)
        if d == -1
    )
    i, axis = next(places, (None, 0))
    if i is None or any(d < -1 for d in shape):
        refuse(at.op, "no input of the model tells the batch size", "Repeat values outside of it.")
    x = at.w.real(i)
    whole = at.make(
        "SHAPE", x, shape=(len(x.shape),), dtype="int32", outType=at.w.schema.TensorType.INT32
    )
    batch = at.w.plain(at.op.path, (1,), "int32")
    at.w.strided_slice(whole, (axis,), (axis + 1,), (1,), batch)
    parts = [batch if d < 0 else at.ints([d]) for d in shape]
    return at.make("CONCATENATION", *parts, shape=(len(shape),), dtype="int32", axis=0)


def _tile(at: _At, x: Plain) -> Plain:
    return at.make("TILE", x, at.ints(at.params["repeats"]))


def _transpose(at: _At, x: Plain) -> Plain:
    return at.transposed(x, at.params["permutation"])


def _reverse(at: _At, x: Plain) -> Plain:
    for axis in at.params["dimensions"]:
        x = at.make("REVERSE_V2", x, at.ints([axis]))
    return x


def _slice(at: _At, x: Plain) -> Plain:
    limit = [None if b == d else b for b, d in zip(at.params["limit"], x.shape, strict=True)]
    if any(b is not None and b < 0 for b in limit):
        refuse(at.op, "it cuts the batch at a fraction of it", "Cut it outside of the model.")
    made = at.w.plain(at.op.path, at.output().shape, x.dtype)
    at.w.strided_slice(x, at.params["start"], limit, at.params["strides"], made)
    return made


def _concatenate(at: _At, *xs: Plain) -> Plain:
    return at.make("CONCATENATION", *xs, axis=at.params["axis"])


def _pad(at: _At, x: Plain, value: Plain) -> Plain:
    padding = at.params["padding"]
    if any(inner for *_, inner in padding):
        _refuse(at, "it pads between elements")
    if any(end < 0 for ends in padding for end in ends):
        _refuse(at, "it pads by less than nothing")
    ends = at.ints([(lo, hi) for lo, hi, _ in padding])
    return at.make("PADV2", x, ends, value)


def _gather(at: _At, x: Plain, indices: Plain) -> Plain:
    indices = at.reshaped(indices, indices.shape[:-1])
    axis = at.params["axis"]
    if at.params["mode"] == "CLIP":
        given = {"shape": indices.shape, "dtype": indices.dtype}
        indices = at.make("MAXIMUM", indices, at.ints(0), **given)
        indices = at.make("MINIMUM", indices, at.ints(x.shape[axis] - 1), **given)
    return at.make("GATHER", x, indices, axis=axis, batchDims=0)


# Along axes --------------------------------------------------------------------------------------


def _reduce(at: _At, x: Plain) -> Plain:
    if (x.dtype == "bool") != (at.op.name in ("reduce_and", "reduce_or")):
        _refuse(at, f"TFLite has no such reduction of {x.dtype}")
    return at.make(_REDUCE[at.op.name], x, at.ints(at.params["axes"]), keepDims=False)


def _arg(at: _At, x: Plain) -> Plain:
    name = "ARG_MAX" if at.op.name == "argmax" else "ARG_MIN"
    kind = at.w.schema.TensorType.INT32
    made = at.make(name, x, at.ints(at.params["axis"]), dtype="int32", outputType=kind)
    return at.cast(made, at.output().dtype)


def _cumsum(at: _At, x: Plain) -> Plain:
    given = {"exclusive": False, "reverse": at.params["reverse"]}
    return at.make("CUMSUM", x, at.ints(at.params["axis"]), **given)


def _top(at: _At, x: Plain, count: int) -> tuple[Plain, Plain]:
    """Return the largest along the last axis, descending, and their places."""
    shape = (*x.shape[:-1], count)
    values, places = (at.w.plain(at.op.path, shape, d) for d in (x.dtype, "int32"))
    inputs = [x.index, at.ints(count).index]
    at.w.emit("TOPK_V2", inputs, [values.index, places.index])
    return values, places


def _swapped(x: Plain, axis: int) -> list[int]:
    """Return the order of axes in which one is the last, and the last there."""
    order = list(range(len(x.shape)))
    order[axis], order[-1] = order[-1], order[axis]
    return order


def _sort(at: _At, x: Plain) -> Plain:
    order = _swapped(x, at.params["axis"])
    x = at.transposed(x, order)
    if x.shape[-1] < 0:
        refuse(at.op, "it sorts the batch", "Sort it outside of the model.")
    falling, _ = _top(at, x, x.shape[-1])
    last = at.ints([len(x.shape) - 1])
    return at.transposed(at.make("REVERSE_V2", falling, last, shape=x.shape), order)


def _top_k(at: _At, x: Plain) -> list[Plain]:
    order = _swapped(x, at.params["axis"])
    return [at.transposed(y, order) for y in _top(at, at.transposed(x, order), at.params["k"])]


def _dot_general(at: _At, a: Plain, b: Plain) -> Plain:
    """Bring both to (batch ..., rows, columns), multiply, and bring the product to its shape."""
    if a.dtype != "float32" or at.output().dtype != "float32":
        _refuse(at, f"TFLite multiplies no matrices of {a.dtype}")
    batch = at.params["batch"]
    contract = at.params["contract"]
    free = [
        [k for k in range(len(x.shape)) if k not in batch[p] and k not in contract[p]]
        for p, x in enumerate((a, b))
    ]
    orders = (*batch[0], *free[0], *contract[0]), (*batch[1], *contract[1], *free[1])
    lead = [a.shape[k] for k in batch[0]]
    depth = _product(at, [a.shape[k] for k in contract[0]])
    rows, columns = (
        _product(at, [x.shape[k] for k in axes]) for x, axes in zip((a, b), free, strict=True)
    )
    left = at.reshaped(at.transposed(a, orders[0]), (*lead, rows, depth))
    right = at.reshaped(at.transposed(b, orders[1]), (*lead, depth, columns))
    if rows < 0 and columns < 0:
        _refuse(at, "it multiplies one batch by another")
    shape = (*lead, rows, columns)
    return at.reshaped(at.make("BATCH_MATMUL", left, right, shape=shape), at.output().shape)


def _product(at: _At, lengths: Sequence[int]) -> int:
    """Return a product of lengths, -k for k times the batch size."""
    if sum(d < 0 for d in lengths) > 1:
        _refuse(at, "it multiplies one batch by another")
    return math.prod(lengths)


def _kernel(at: _At, depthwise: bool) -> Plain:
    """Return a convolution's kernel: (out, rows, columns, in), or (1, rows, columns, out)."""
    _, weights, _ = at.params["layout"]
    kernel = at.w.source.tensors[at.op.inputs[1]].value
    if kernel is None:
        _refuse(at, "TFLite convolves with constant kernels")
    kernel = kernel.transpose(weights[0], *weights[2:], weights[1])
    kernel = kernel.reshape(len(kernel), *(1,) * (4 - kernel.ndim), *kernel.shape[1:])
    return at.number(kernel.transpose(3, 1, 2, 0) if depthwise else kernel)


def _conv(at: _At, x: Plain, _: Plain) -> Plain:
    """Convolve with channels last, and one axis as two."""
    given, (data, _, result) = at.params, at.params["layout"]
    strides, dilation, padding = (given[k] for k in ("strides", "kernel_dilation", "padding"))
    if len(strides) > 2 or any(d != 1 for d in given["input_dilation"]):
        _refuse(at, "TFLite convolves over one or two axes, and dilates no input")
    if any(v < 0 for p in padding for v in p):
        _refuse(at, "it cuts its input")
    x = at.transposed(x, (data[0], *data[2:], data[1]))
    if any(v for p in padding for v in p):
        ends = ((0, 0), *padding, (0, 0))
        shape = tuple(d + sum(p) if d >= 0 else d for d, p in zip(x.shape, ends, strict=True))
        x = at.make("PAD", x, at.ints(ends), shape=shape)
    if len(strides) < 2:
        x = at.reshaped(x, (x.shape[0], 1, *x.shape[1:]))
        strides, dilation = (1, *strides), (1, *dilation)
    options = {"strideH": strides[0], "strideW": strides[1], "padding": at.w.schema.Padding.VALID}
    options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}
    order = (result[0], *result[2:], result[1])
    last = tuple(at.output().shape[k] for k in order)
    planar = last if len(last) == 4 else (last[0], 1, *last[1:])
    depthwise = 1 < given["groups"] == x.shape[-1]
    name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    if depthwise:
        options["depthMultiplier"] = planar[-1] // given["groups"]
    bias = at.number(np.zeros(planar[-1]))
    made = at.make(name, x, _kernel(at, depthwise), bias, shape=planar, **options)
    return at.transposed(at.reshaped(made, last), [int(k) for k in np.argsort(order)])


WRITERS: Mapping[str, Callable[..., Plain | Sequence[Plain]]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys(_COMPARE, _compare),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("argmax", "argmin"), _arg),
    "rem": _rem,
    "not": _not,
    "select_n": _select,
    "clamp": _clamp,
    "square": lambda at, x: at.make("MUL", x, x),
    "integer_pow": _integer_pow,
    "round": _round,
    "convert_element_type": _convert,
    "cbrt": _cbrt,
    "is_finite": _is_finite,
    "exp2": lambda at, x: at.make("POW", at.number(2), x),
    "log1p": lambda at, x: at.make("LOG", at.make("ADD", x, at.number(1))),
    "expm1": lambda at, x: at.make("SUB", at.make("EXP", x), at.number(1)),
    "tan": lambda at, x: at.make("DIV", at.make("SIN", x), at.make("COS", x)),
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "gather": _gather,
    "cumsum": _cumsum,
    "sort": _sort,
    "top_k": _top_k,
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
}
"""What writes each primitive that this runtime has."""
