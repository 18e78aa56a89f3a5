"""Write primitives on real values as TFLite operators.

Sums, products, quotients, comparisons, moves and integers are exact in LiteRT; roots, exponentials
and sums along axes are not.
"""

from collections.abc import Callable, Mapping, Sequence

from simqat_jax.ir.program import Program, Shape
from simqat_jax.ops.primitives import Primitive, by_squares
from simqat_jax.targets.refusals import check_types, refuse, refuse_primitive
from simqat_jax.targets.tflite import along_axes
from simqat_jax.targets.tflite.at import At
from simqat_jax.targets.tflite.subgraph import Plain
from simqat_jax.targets.tflite.writer import Writer

_UNARY = {name: name.upper() for name in "neg abs sign floor ceil exp log tanh logistic".split()}
_UNARY |= {name: name.upper() for name in "sqrt rsqrt sin cos".split()}
_BINARY = {name: name.upper() for name in "add sub mul div pow atan2".split()}
_COMPARE = {"eq": "EQUAL", "ne": "NOT_EQUAL", "lt": "LESS", "le": "LESS_EQUAL", "gt": "GREATER"}
_COMPARE |= {"ge": "GREATER_EQUAL"}
_LOGIC = {"and": "LOGICAL_AND", "or": "LOGICAL_OR", "xor": "NOT_EQUAL"}

VERSIONS = {
    **dict.fromkeys((*_UNARY.values(), "POW", "ATAN2", "SELECT_V2", "BITWISE_XOR"), (None, 1)),
    **dict.fromkeys(_COMPARE.values(), (None, 1)),
    **dict.fromkeys(("LOGICAL_AND", "LOGICAL_OR", "LOGICAL_NOT"), (None, 1)),
    **along_axes.VERSIONS,
    "BROADCAST_TO": ("BroadcastToOptions", 2),
    "SHAPE": ("ShapeOptions", 1),
}
"""The options and the version of each operator that only primitives need."""


def write(w: Writer, op: Primitive) -> None:
    """Write one primitive."""
    made = WRITERS[op.name](At(w, op), *map(w.real, op.inputs))
    w.reals.update(zip(op.outputs, [made] if isinstance(made, Plain) else made, strict=True))


def check(program: Program, op: Primitive) -> None:
    """Raise RefusedError for a primitive that LiteRT does not compute."""
    if op.name not in WRITERS:
        refuse_primitive(program, op, f"TFLite has no {op.name}")
    check_types(program, op)


# Elementwise -------------------------------------------------------------------------------------


def _unary(at: At, x: Plain) -> Plain:
    return at.make(_UNARY[at.op.name], x)


def _binary(at: At, a: Plain, b: Plain) -> Plain:
    return at.make(_BINARY[at.op.name], a, at.cast(b, a.dtype))


def _rem(at: At, a: Plain, b: Plain) -> Plain:
    if a.dtype != "int32":
        at.refuse("TFLite has no remainder of real numbers")
    return at.make("SUB", a, at.make("MUL", at.make("DIV", a, b), b))


def _extreme(at: At, a: Plain, b: Plain) -> Plain:
    names = ("LOGICAL_OR", "LOGICAL_AND") if a.dtype == "bool" else ("MAXIMUM", "MINIMUM")
    return at.make(names[at.op.name == "min"], a, b)


def _logic(at: At, a: Plain, b: Plain) -> Plain:
    if a.dtype == "bool":
        return at.make(_LOGIC[at.op.name], a, b)
    if at.op.name != "xor":
        at.refuse("TFLite joins no bits of integers")
    return at.make("BITWISE_XOR", a, b)


def _not(at: At, x: Plain) -> Plain:
    if x.dtype == "bool":
        return at.make("LOGICAL_NOT", x)
    return at.make("SUB", at.ints(-1), x)


def _compare(at: At, a: Plain, b: Plain) -> Plain:
    if a.dtype == "bool":
        a, b = at.cast(a, "int32"), at.cast(b, "int32")
    return at.make(_COMPARE[at.op.name], a, b)


def _select(at: At, which: Plain, *cases: Plain) -> Plain:
    if len(cases) != 2:
        at.refuse(f"it selects one of {len(cases)} tensors")
    return at.make("SELECT_V2", at.cast(which, "bool"), cases[1], cases[0])


def _clamp(at: At, lo: Plain, x: Plain, hi: Plain) -> Plain:
    return at.make("MINIMUM", at.make("MAXIMUM", x, lo), hi)


def _integer_pow(at: At, x: Plain) -> Plain:
    y = at.params["y"]
    if not y:
        return at.make("POW", x, at.number(0, x.dtype))
    power = by_squares(x, abs(y), lambda a, b: at.make("MUL", a, b))
    return power if y > 0 else at.make("DIV", at.number(1), power)


def _round(at: At, x: Plain) -> Plain:
    if at.params["method"] != "TO_NEAREST_EVEN":
        at.refuse("it rounds halves away from zero")
    return at.make("ROUND", x)


def _convert(at: At, x: Plain) -> Plain:
    return at.cast(x, at.output().dtype)


def _cbrt(at: At, x: Plain) -> Plain:
    root = at.make("POW", at.make("ABS", x), at.number(1 / 3))
    return at.make("MUL", at.make("SIGN", x), root)


def _is_finite(at: At, x: Plain) -> Plain:
    zero = at.make("SUB", x, x, shape=x.shape, dtype=x.dtype)
    return at.make("EQUAL", zero, at.number(0))


# Moves -------------------------------------------------------------------------------------------


def _reshape(at: At, x: Plain) -> Plain:
    return at.reshaped(x, at.output().shape)


def _broadcast(at: At, x: Plain) -> Plain:
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


def _lengths(at: At, shape: Shape) -> Plain:
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
    x = at.w.values.get(i) or at.w.reals[i]
    whole = at.make(
        "SHAPE", x, shape=(len(x.shape),), dtype="int32", outType=at.w.schema.TensorType.INT32
    )
    batch = at.w.plain(at.op.path, (1,), "int32")
    at.w.strided_slice(whole, (axis,), (axis + 1,), (1,), batch)
    parts = [batch if d < 0 else at.ints([d]) for d in shape]
    return at.make("CONCATENATION", *parts, shape=(len(shape),), dtype="int32", axis=0)


def _tile(at: At, x: Plain) -> Plain:
    return at.make("TILE", x, at.ints(at.params["repeats"]))


def _transpose(at: At, x: Plain) -> Plain:
    return at.transposed(x, at.params["permutation"])


def _reverse(at: At, x: Plain) -> Plain:
    for axis in at.params["dimensions"]:
        x = at.make("REVERSE_V2", x, at.ints([axis]))
    return x


def _slice(at: At, x: Plain) -> Plain:
    limit = [None if b == d else b for b, d in zip(at.params["limit"], x.shape, strict=True)]
    if any(b is not None and b < 0 for b in limit):
        refuse(at.op, "it cuts the batch at a fraction of it", "Cut it outside of the model.")
    made = at.w.plain(at.op.path, at.output().shape, x.dtype)
    at.w.strided_slice(x, at.params["start"], limit, at.params["strides"], made)
    return made


def _concatenate(at: At, *xs: Plain) -> Plain:
    return at.make("CONCATENATION", *xs, axis=at.params["axis"])


def _pad(at: At, x: Plain, value: Plain) -> Plain:
    padding = at.params["padding"]
    if any(inner for *_, inner in padding):
        at.refuse("it pads between elements")
    if any(end < 0 for ends in padding for end in ends):
        at.refuse("it pads by less than nothing")
    ends = at.ints([(lo, hi) for lo, hi, _ in padding])
    return at.make("PADV2", x, ends, value)


def _gather(at: At, x: Plain, indices: Plain) -> Plain:
    indices = at.cast(at.reshaped(indices, indices.shape[:-1]), "int32")
    axis = at.params["axis"]
    if at.params["mode"] == "CLIP":
        given = {"shape": indices.shape, "dtype": indices.dtype}
        indices = at.make("MAXIMUM", indices, at.ints(0), **given)
        indices = at.make("MINIMUM", indices, at.ints(x.shape[axis] - 1), **given)
    return at.make("GATHER", x, indices, axis=axis, batchDims=0)


WRITERS: Mapping[str, Callable[..., Plain | Sequence[Plain]]] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BINARY, _binary),
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys(_COMPARE, _compare),
    **dict.fromkeys(("max", "min"), _extreme),
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
    **along_axes.WRITERS,
}
"""What writes each primitive that this runtime has."""
