"""Write primitives on real values as ONNX nodes.

Sums, products, quotients, comparisons, moves and integers are exact in ONNX Runtime.
"""

from collections.abc import Callable, Mapping

import numpy as np

from simqat_jax.ir.program import Program
from simqat_jax.ops.primitives import Primitive, by_squares
from simqat_jax.targets.onnx import along_axes
from simqat_jax.targets.onnx.at import At, real_values
from simqat_jax.targets.onnx.writer import Writer, quotient
from simqat_jax.targets.refusals import check_types, refuse, refuse_primitive

_UNARY = {
    **{name: name.capitalize() for name in "neg abs sign floor ceil exp log tanh sqrt".split()},
    **{name: name.capitalize() for name in "sin cos tan asin acos atan sinh cosh".split()},
    **{name: name.capitalize() for name in "asinh acosh atanh erf".split()},
    "logistic": "Sigmoid",
}
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "pow": "Pow"}
_LOGIC = {"and": ("And", "BitwiseAnd"), "or": ("Or", "BitwiseOr"), "xor": ("Xor", "BitwiseXor")}
_COMPARE = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater"}
_COMPARE |= {"ge": "GreaterOrEqual"}
_LAST = np.iinfo(np.int64).max


def write(w: Writer, op: Primitive) -> None:
    """Write one primitive."""
    made = WRITERS[op.name](At(w, op), *(real_values(w, i) for i in op.inputs))
    for i, name in zip(op.outputs, [made] if isinstance(made, str) else made, strict=True):
        w.put(i, name)


def check(program: Program, op: Primitive) -> None:
    """Raise RefusedError for a primitive that ONNX Runtime does not compute."""
    if op.name not in WRITERS:
        refuse_primitive(program, op, f"ONNX has no {op.name}")
    check_types(program, op)


# Elementwise -------------------------------------------------------------------------------------


def _unary(at: At, x: str) -> str:
    return at.node(_UNARY[at.op.name], x)


def _binary(at: At, a: str, b: str) -> str:
    return at.node(_BINARY[at.op.name], a, b)


def _div(at: At, a: str, b: str) -> str:
    numerator = at.inputs[0]
    if numerator.value is not None and numerator.dtype == "float32" and numerator.value.size == 1:
        return quotient(at.w, numerator.value, b, at.op.path)
    return at.node("Div", a, b)


def _rem(at: At, a: str, b: str) -> str:
    return at.node("Mod", a, b, fmod=1)


def _extreme(at: At, a: str, b: str) -> str:
    if at.is_bool:
        return at.node("Or" if at.op.name == "max" else "And", a, b)
    return at.node("Max" if at.op.name == "max" else "Min", a, b)


def _logic(at: At, a: str, b: str) -> str:
    return at.node(_LOGIC[at.op.name][0 if at.is_bool else 1], a, b)


def _not(at: At, x: str) -> str:
    return at.node("Not" if at.is_bool else "BitwiseNot", x)


def _compare(at: At, a: str, b: str) -> str:
    if at.op.name == "ne":
        return at.node("Not", at.node("Equal", a, b))
    if at.is_bool and at.op.name != "eq":
        a, b = at.cast(a, "int32"), at.cast(b, "int32")
    return at.node(_COMPARE[at.op.name], a, b)


def _select(at: At, which: str, *cases: str) -> str:
    if len(cases) != 2:
        at.refuse(f"it selects one of {len(cases)} tensors")
    which = which if at.is_bool else at.cast(which, "bool")
    return at.node("Where", which, cases[1], cases[0])


def _clamp(at: At, lo: str, x: str, hi: str) -> str:
    return at.node("Min", at.node("Max", x, lo), hi)


def _square(at: At, x: str) -> str:
    return at.node("Mul", x, x)


def _integer_pow(at: At, x: str) -> str:
    y = at.params["y"]
    if not y:
        return at.node("Pow", x, at.number(0, at.inputs[0].dtype))
    power = by_squares(x, abs(y), lambda a, b: at.node("Mul", a, b))
    return power if y > 0 else quotient(at.w, 1, power, at.op.path)


def _round(at: At, x: str) -> str:
    if at.params["method"] != "TO_NEAREST_EVEN":
        at.refuse("it rounds halves away from zero")
    return at.node("Round", x)


def _convert(at: At, x: str) -> str:
    return at.cast(x, at.output.dtype)


def _rsqrt(at: At, x: str) -> str:
    return quotient(at.w, 1, at.node("Sqrt", x), at.op.path)


def _cbrt(at: At, x: str) -> str:
    root = at.node("Pow", at.node("Abs", x), at.number(1 / 3))
    return at.node("Mul", at.node("Sign", x), root)


def _is_finite(at: At, x: str) -> str:
    return at.node("Equal", at.node("Sub", x, x), at.number(0))


# Moves -------------------------------------------------------------------------------------------


def _reshape(at: At, x: str) -> str:
    if at.inputs[0].shape == at.output.shape:
        return x
    return at.reshaped(x, at.output.shape)


def _broadcast(at: At, x: str) -> str:
    source, target = at.inputs[0].shape, at.output.shape
    aligned = [1] * len(target)
    for axis, length in zip(at.params["dimensions"], source, strict=True):
        aligned[axis] = length
    if tuple(aligned) != source:
        x = at.reshaped(x, tuple(aligned))
    if tuple(aligned) == target:
        return x
    repeated = [a for a, b in zip(aligned, target, strict=True) if b < 0 and a != b]
    if not repeated:  # 1: as long as it is
        return at.node("Expand", x, at.ints([1 if d < 0 else d for d in target]))
    lengths = [_length(at, d) if d < 0 else at.ints([d]) for d in target]
    return at.node("Expand", x, at.node("Concat", *lengths, axis=0))


def _length(at: At, dim: int) -> str:
    """Return a length that is a multiple of the batch size, read off an input of the model."""
    for i in at.w.model.inputs:
        for axis, have in enumerate(at.w.model.tensors[i].shape):
            if have < 0 and dim % have == 0:
                length = at.node("Shape", at.w.get(i), start=axis, end=axis + 1)
                return at.node("Mul", length, at.ints([dim // have]))
    refuse(at.op, "no input of the model tells the batch size", "Repeat values outside of it.")


def _tile(at: At, x: str) -> str:
    return at.node("Tile", x, at.ints(at.params["repeats"]))


def _transpose(at: At, x: str) -> str:
    return at.node("Transpose", x, perm=at.params["permutation"])


def _reverse(at: At, x: str) -> str:
    axes = at.params["dimensions"]
    count = len(axes)
    bounds = ([-1] * count, [np.iinfo(np.int64).min] * count, axes, [-1] * count)
    return at.node("Slice", x, *map(at.ints, bounds))


def _slice(at: At, x: str) -> str:
    pairs = list(zip(at.params["limit"], at.inputs[0].shape, strict=True))
    if any(b < 0 and b != d for b, d in pairs):
        refuse(at.op, "it cuts the batch at a fraction of it", "Cut it outside of the model.")
    limit = [_LAST if b < 0 else b for b, _ in pairs]
    axes = list(range(len(limit)))
    return at.node(
        "Slice", x, *map(at.ints, (at.params["start"], limit, axes, at.params["strides"]))
    )


def _concatenate(at: At, *xs: str) -> str:
    return at.node("Concat", *xs, axis=at.params["axis"])


def _pad(at: At, x: str, value: str) -> str:
    padding = at.params["padding"]
    if any(inner for *_, inner in padding):
        at.refuse("it pads between elements")
    return at.node("Pad", x, at.ints([p[end] for end in (0, 1) for p in padding]), value)


def _gather(at: At, x: str, indices: str) -> str:
    indices = at.node("Squeeze", at.cast(indices, "int32"), at.ints([-1]))
    axis = at.params["axis"]
    if at.params["mode"] == "CLIP":
        ends = (0, at.inputs[0].shape[axis] - 1)
        indices = at.node("Clip", indices, *(at.number(v, "int32") for v in ends))
    return at.node("Gather", x, indices, axis=axis)


WRITERS: Mapping[str, Callable[..., str | list[str]]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys((*_COMPARE, "ne"), _compare),
    **dict.fromkeys(("max", "min"), _extreme),
    "div": _div,
    "rem": _rem,
    "not": _not,
    "select_n": _select,
    "clamp": _clamp,
    "square": _square,
    "integer_pow": _integer_pow,
    "round": _round,
    "convert_element_type": _convert,
    "rsqrt": _rsqrt,
    "cbrt": _cbrt,
    "is_finite": _is_finite,
    "exp2": lambda at, x: at.node("Pow", at.number(2), x),
    "log1p": lambda at, x: at.node("Log", at.node("Add", x, at.number(1))),
    "expm1": lambda at, x: at.node("Sub", at.node("Exp", x), at.number(1)),
    "erfc": lambda at, x: at.node("Sub", at.number(1), at.node("Erf", x)),
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "transpose": _transpose,
    "rev": _reverse,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    "gather": _gather,
    **along_axes.WRITERS,
}
"""What writes each primitive that this runtime has."""
