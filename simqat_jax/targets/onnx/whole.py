"""Operations on whole numbers in float, of ONNX operators with one result: norms, softmax.

Codes less their zero point are whole numbers: dequantized with a scale of 1.
"""

import numpy as np

from simqat_jax.ir.program import Tensor
from simqat_jax.numerics import softmax as numbers
from simqat_jax.numerics.norms import reciprocal_count
from simqat_jax.ops.matmul import LookUp, Multiplied
from simqat_jax.ops.norms import Normalize, OfStatistics
from simqat_jax.ops.softmax import LogSoftmaxOfCodes, OfExponentialsOfCodes, SoftmaxOfCodes
from simqat_jax.ops.spreads import SpreadOfCodes
from simqat_jax.targets.onnx.writer import LAST, Writer, looked_up, quotient

_EXACT = 2**24
_MASKED = 256
"""So far below the highest code, a number is masked, and its exponential is zero."""


class _Whole:
    """Writes one operation, on whole numbers."""

    def __init__(self, w: Writer, path: str):
        self.w, self.path = w, path

    def __call__(self, kind: str, *inputs: str | np.ndarray | np.generic, **attributes: int) -> str:
        """Add a node; arrays among its inputs are constants."""
        names = [
            v if isinstance(v, str) else self.w.initializer(np.asarray(v), self.path)
            for v in inputs
        ]
        return self.w.node(kind, names, self.path, **attributes)

    def input(self, i: int) -> str:
        """Return the codes of a tensor, less the zero point."""
        return self("DequantizeLinear", self.w.get(i), np.float32(1), self.zero(i))

    def zero(self, i: int) -> np.ndarray:
        """Return the zero point of a tensor as it is stored."""
        grid = self.w.grid(self.w.model.tensors[i])
        return np.asarray(grid.zero_point + grid.unsigned_offset, np.uint8)

    def finish(self, i: int, x: str, clamp: tuple[int, int] | None = None) -> None:
        """Round numbers in units of a code, add the zero point and clip them."""
        codes = self("QuantizeLinear", x, np.float32(1), self.zero(i))
        tensor = self.w.model.tensors[i]
        grid = self.w.grid(tensor)
        self.w.put(i, self.w.clip(codes, tensor, clamp or (grid.qmin, grid.qmax)))

    def sum(self, x: str, axes: tuple[int, ...]) -> str:
        return self("ReduceSum", x, np.asarray(axes, np.int64), keepdims=1)

    def sum_of_squares(self, x: str, axes: tuple[int, ...], largest: float) -> str:
        """Add squares exactly, and round once; `largest`: what they may add up to."""
        if largest <= _EXACT:
            return self.sum(self("Mul", x, x), axes)
        types = self.w.onnx.TensorProto
        whole = self("Cast", x, to=types.INT32)
        return self("Cast", self.sum(self("Mul", whole, whole), axes), to=types.FLOAT)


def normalize(w: Writer, op: Normalize) -> None:
    """Write a norm, see `numerics.norms`."""
    at, tensor = _Whole(w, op.path), w.model.tensors[op.inputs[0]]
    x, grouped = at.input(op.inputs[0]), op.grouped(tensor.shape)
    if op.groups:
        x = at("Reshape", x, np.asarray([max(d, -1) for d in grouped], np.int64))
    x, variance = _centered(at, op, x, tensor)
    x = at("Mul", x, quotient(w, 1, _deviation(at, op, variance), op.path))
    if op.groups:
        x = at("Reshape", x, np.asarray([max(d, -1) for d in tensor.shape], np.int64))
    x = at("Mul", x, op.arrays["scale"])
    if "shift" in op.arrays:
        x = at("Add", x, op.arrays["shift"])
    at.finish(op.outputs[0], x, op.clamp)


def spread(w: Writer, op: SpreadOfCodes) -> None:
    """Write a deviation or variance, see `numerics.norms`."""
    at, shape = _Whole(w, op.path), w.model.tensors[op.outputs[0]].shape
    x = at.input(op.inputs[0])
    _, y = _centered(at, op, x, w.model.tensors[op.inputs[0]])
    y = at("Mul", _deviation(at, op, y) if op.rooted else y, op.arrays["multiplier"])
    y = at("Reshape", y, np.asarray([max(d, -1) for d in shape], np.int64))
    at.finish(op.outputs[0], y, op.clamp)


def _centered(at: _Whole, op: OfStatistics, x: str, tensor: Tensor) -> tuple[str, str]:
    """Return whole numbers less their mean, where it is subtracted, and their variance."""
    part = reciprocal_count(op.count(tensor.shape))
    largest = op.largest_sum(tensor.shape, at.w.grid(tensor))
    if not op.centered:
        return x, at("Mul", at.sum_of_squares(x, op.axes, largest), part)
    x = at("Sub", x, at("Round", at("Mul", at.sum(x, op.axes), part)))
    rest = at("Mul", at.sum(x, op.axes), part)
    square = at("Mul", at.sum_of_squares(x, op.axes, largest), part)
    return at("Sub", x, rest), at("Sub", square, at("Mul", rest, rest))


def _deviation(at: _Whole, op: OfStatistics, variance: str) -> str:
    y = at("Sqrt", at("Add", variance, np.float32(op.epsilon)))
    y = at("Max", y, np.float32(op.least)) if op.least else y
    return at("Add", y, np.float32(op.offset)) if op.offset else y


def softmax(w: Writer, op: SoftmaxOfCodes) -> None:
    """Write a softmax, see `numerics.softmax`."""
    at, tensors = _Whole(w, op.path), w.model.tensors
    source, target = tensors[op.inputs[0]], tensors[op.outputs[0]]
    scale, axes = np.float32(w.grid(source).scale), op.axes
    types = w.onnx.TensorProto
    x = at("Cast", w.get(op.inputs[0]), to=types.INT32)
    if len(op.inputs) > 1:
        x = _masked(at, op, x, -_MASKED)
    below = at("Sub", at("ReduceMax", x, np.asarray(axes, np.int64), keepdims=1), x)
    if len(op.inputs) > 1:
        below = at("Min", below, np.int32(_MASKED))
    table = numbers.table(scale, numbers.unit(numbers.terms(source.shape, axes)))
    e = looked_up(w, _with_masked(table), below, [max(d, -1) for d in source.shape], op.path)
    each = np.float32(1) / np.float32(w.grid(target).scale)
    at.finish(op.outputs[0], at("Mul", e, quotient(w, each, at.sum(e, axes), op.path)))


def log_softmax(w: Writer, op: LogSoftmaxOfCodes) -> None:
    """Write the logarithm of a softmax, see `numerics.softmax`."""
    at, tensors = _Whole(w, op.path), w.model.tensors
    source, types = tensors[op.inputs[0]], w.onnx.TensorProto
    target, axes = w.grid(tensors[op.outputs[0]]), np.asarray(op.axes, np.int64)
    scale, out_scale = np.float32(w.grid(source).scale), np.float32(target.scale)
    largest = numbers.fine_unit(numbers.terms(source.shape, op.axes))
    x = at("Cast", w.get(op.inputs[0]), to=types.INT32)
    if len(op.inputs) > 1:
        x = _masked(at, op, x, int(numbers.lowest(scale, op.reach(target))))
    below = at("Sub", at("ReduceMax", x, axes, keepdims=1), x)
    near = at("Min", below, np.int32(_MASKED)) if len(op.inputs) > 1 else below
    table = _with_masked(numbers.table(scale, largest)).astype(np.int32)
    e = looked_up(w, table, near, [max(d, -1) for d in source.shape], op.path)
    total = at("Cast", at("ReduceSum", e, axes, keepdims=1), to=types.FLOAT)
    shift = at("Div", _logarithm(at, at("Mul", total, np.float32(1 / largest))), out_scale)
    scores = at("Mul", at("Cast", below, to=types.FLOAT), -scale / out_scale)
    at.finish(op.outputs[0], at("Sub", scores, shift))


def _logarithm(at: _Whole, m: str) -> str:
    one = np.float32(1)
    halved: str | np.float32 = np.float32(0.5)
    for k in numbers.HALVINGS:
        part = np.float32(0.5**k)
        much = at("Min", at("Floor", at("Mul", m, part)), one)
        m = at("Mul", m, at("Sub", one, at("Mul", much, one - part)))
        halved = at("Add", at("Mul", much, np.float32(k)), halved)
    root, log2, (series, *others) = numbers.LOGARITHM
    t = at("Div", at("Sub", m, root), at("Add", m, root))
    square, series = at("Mul", t, t), series
    for coefficient in others:
        series = at("Add", at("Mul", square, series), coefficient)
    return at("Add", at("Mul", halved, log2), at("Mul", t, series))


def _with_masked(table: np.ndarray) -> np.ndarray:
    """Return a table of exponentials with that of a masked number, zero, at its end."""
    return np.append(table, np.float32(0))


def _masked(at: _Whole, op: OfExponentialsOfCodes, x: str, below: int) -> str:
    """Put a number below all codes where a mask leaves none."""
    mask, lowest = at.w.model.tensors[op.inputs[1]], np.int32(below)
    if mask.value is not None:  # every code is less than 256
        return at("Min", x, np.where(mask.value == op.keeps, np.int32(_MASKED), lowest))
    cases = (x, lowest) if op.keeps else (lowest, x)
    return at("Where", at.w.get(op.inputs[1]), *cases)


def multiplied(w: Writer, op: Multiplied) -> None:
    """Write a product of two tensors, which ONNX Runtime fuses to QLinearMatMul."""
    a, b = (w.model.tensors[i] for i in op.inputs)
    zero = w.scale(a)[1]
    scale = w.initializer(np.float32(op.scale), op.path)
    left = w.node("DequantizeLinear", [w.get(op.inputs[0]), scale, zero], op.path)
    right = w.dequantize(w.get(op.inputs[1]), b)
    w.finish(op, w.node("MatMul", [left, right], op.path), LAST, op.clamp)


def look_up(w: Writer, op: LookUp) -> None:
    """Gather rows of codes."""
    output = w.model.tensors[op.outputs[0]]
    offset = w.grid(output).unsigned_offset
    table = (op.arrays["table"].astype(np.int32) + offset).astype(np.uint8)
    picked = w.node("Squeeze", [w.get(op.inputs[0]), w.ints([-1], op.path)], op.path)
    if op.clips:
        dtype = np.dtype(w.model.tensors[op.inputs[0]].dtype)
        ends = [w.initializer(np.asarray(v, dtype), op.path) for v in (0, len(table) - 1)]
        picked = w.node("Clip", [picked, *ends], op.path)
    w.put(op.outputs[0], w.node("Gather", [w.initializer(table, op.path), picked], op.path))
