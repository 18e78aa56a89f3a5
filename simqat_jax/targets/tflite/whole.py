"""Operations on whole numbers in float, of TFLite operators with one result: norms, softmax.

Codes less their zero point are whole numbers: the same bytes under a scale of 1, dequantized. They
stay in float where nothing else reads them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from simqat_jax.ir.program import Op, Tensor, grid_of
from simqat_jax.numerics import softmax as numbers
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.norms import STEPS, heron_start, reciprocal_count
from simqat_jax.ops.arithmetic import Sum
from simqat_jax.ops.masked import CountedSum
from simqat_jax.ops.matmul import LookUp, Multiplied
from simqat_jax.ops.norms import Normalize, OfStatistics
from simqat_jax.ops.softmax import LogSoftmaxOfCodes, OfExponentialsOfCodes, SoftmaxOfCodes
from simqat_jax.ops.spreads import SpreadOfCodes
from simqat_jax.targets.tflite.subgraph import Codes, reshape_target
from simqat_jax.targets.tflite.writer import Writer

_EXACT = 2**24
_FAR = 512
"""Centered codes so far from zero are clipped on any grid."""
Shape = tuple[int, ...]


class _Whole:
    """Writes one operation, on whole numbers."""

    def __init__(self, w: Writer, op: Op):
        self.w, self.op = w, op

    def __call__(
        self, kind: str, shape: Sequence[int], *inputs: int | ArrayLike, **options: Any
    ) -> int:
        """Add an operator; what is no number of a tensor is a constant."""
        numbers = [v if isinstance(v, int) else self.w.constant(v, np.float32) for v in inputs]
        result = self.w.tensor(None, shape, np.float32)
        self.w.emit(kind, numbers, result, **options)
        return result

    def int32(self, kind: str, shape: Sequence[int], x: int, y: int) -> int:
        """Add an operator on integers."""
        result = self.w.tensor(None, shape, np.int32)
        self.w.emit(kind, [x, y], result)
        return result

    def sum(self, shape: Shape, x: int, axes: Sequence[int]) -> int:
        kept = _thin(shape, axes)
        return self("SUM", kept, x, self.w.constant(axes), keepDims=True)

    def finish(self, x: int, clamp: Sequence[int], y: Codes | None) -> None:
        """Round numbers in units of an output code, and clip them; `y` None: they stay whole."""
        w, i = self.w, self.op.outputs[0]
        tensor = w.source.tensors[i]
        grid, shape = grid_of(tensor), tensor.shape
        free = (grid.offset - 128, grid.offset + 127) if y else ()  # where QUANTIZE ends
        if y is None or tuple(clamp) != free:
            x = self("ROUND", shape, x)
            for kind, end in zip(("MAXIMUM", "MINIMUM"), clamp, strict=True):
                if end not in free:
                    x = self(kind, shape, x, np.float32(end - grid.zero_point))
        if y is None:
            w.wholes[i] = x
            return
        codes = w.tensor(None, shape, np.int8, 1.0, grid.stored_zero)
        w.emit("QUANTIZE", [x], codes)
        w.emit("RESHAPE", [codes], y.index, newShape=reshape_target(shape))


def normalize(w: Writer, op: Normalize, *tensors: Codes | None) -> None:
    """Write a norm, see `numerics.norms`."""
    at, tensor = _Whole(w, op), w.source.tensors[op.inputs[0]]
    x, shape = w.whole(op.inputs[0]), op.grouped(tensor.shape)
    if op.groups:
        x = w.reshaped(x, shape)
    thin = _thin(shape, op.axes)
    x, variance = _centered(at, op, x, tensor)
    deviation = _deviation(at, op, thin, variance)
    x = at("MUL", shape, x, at("DIV", thin, np.float32(1), deviation))
    if op.groups:
        x, shape = w.reshaped(x, tensor.shape), tensor.shape
    x = at("MUL", shape, x, op.arrays["scale"])
    if "shift" in op.arrays:
        x = at("ADD", shape, x, op.arrays["shift"])
    at.finish(x, op.clamp, tensors[-1])


def spread(w: Writer, op: SpreadOfCodes, *tensors: Codes | None) -> None:
    """Write a deviation or variance, see `numerics.norms`."""
    at, tensor = _Whole(w, op), w.source.tensors[op.inputs[0]]
    thin = _thin(tensor.shape, op.axes)
    _, y = _centered(at, op, w.whole(op.inputs[0]), tensor)
    y = _deviation(at, op, thin, y) if op.rooted else y
    y = at("MUL", thin, y, np.float32(op.arrays["multiplier"]))
    at.finish(w.reshaped(y, w.source.tensors[op.outputs[0]].shape), op.clamp, tensors[-1])


def _thin(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(1 if a in axes else d for a, d in enumerate(shape))


def _centered(at: _Whole, op: OfStatistics, x: int, tensor: Tensor) -> tuple[int, int]:
    """Return whole numbers less their mean, where it is subtracted, and their variance."""
    shape, axes = op.grouped(tensor.shape), op.axes
    thin, part = _thin(shape, axes), reciprocal_count(op.count(tensor.shape))
    largest, rest = op.largest_sum(tensor.shape, grid_of(tensor)), None
    if op.centered:
        near = at("ROUND", thin, at("MUL", thin, at.sum(shape, x, axes), part))
        x = at("SUB", shape, x, near)
        rest = at("MUL", thin, at.sum(shape, x, axes), part)
    squares = _sum_of_wholes(at, shape, at("MUL", shape, x, x), axes, largest)
    variance = at("MUL", thin, squares, part)
    if rest is None:
        return x, variance
    square = at("MUL", thin, rest, rest)
    return at("SUB", shape, x, rest), at("SUB", thin, variance, square)


def _deviation(at: _Whole, op: OfStatistics, shape: Shape, variance: int) -> int:
    y = _root(at, shape, variance, np.float32(op.epsilon))
    y = at("MAXIMUM", shape, y, np.float32(op.least)) if op.least else y
    return at("ADD", shape, y, np.float32(op.offset)) if op.offset else y


def _sum_of_wholes(at: _Whole, shape: Shape, x: int, axes: Sequence[int], largest: float) -> int:
    """Add whole numbers exactly, and round once; `largest`: what they may add up to.

    What float32 does not hold is added in two digits, each of which it holds.
    """
    if largest <= _EXACT:
        return at.sum(shape, x, axes)
    digit = np.float32(256)
    high = at("FLOOR", shape, at("MUL", shape, x, np.float32(1) / digit))
    low = at("SUB", shape, x, at("MUL", shape, high, digit))
    thin = _thin(shape, axes)
    upper = at("MUL", thin, at.sum(shape, high, axes), digit)
    return at("ADD", thin, upper, at.sum(shape, low, axes))


def _root(at: _Whole, shape: Shape, variance: int, epsilon: np.float32) -> int:
    """Take a square root as `numerics.norms.heron` does."""
    start = np.float32(heron_start(epsilon))
    variance = at("ADD", shape, variance, epsilon)
    root: int | np.float32 = start
    for _ in range(STEPS):
        quotient = at("DIV", shape, variance, root)
        root = at("MUL", shape, at("ADD", shape, quotient, root), np.float32(0.5))
    assert isinstance(root, int)
    return root


def softmax(w: Writer, op: SoftmaxOfCodes, *tensors: Codes | None) -> None:
    """Write a softmax, see `numerics.softmax`."""
    at, known = _Whole(w, op), w.source.tensors
    source, target = known[op.inputs[0]], grid_of(known[op.outputs[0]])
    shape, axes, scale = source.shape, op.axes, np.float32(grid_of(source).scale)
    thin = _thin(shape, axes)
    below = _below(at, shape, _masked(at, op, shape, scale, target), axes)
    e = _exponentials(at, shape, below, scale, numbers.unit(numbers.terms(shape, axes)))
    each = at("DIV", thin, np.float32(1) / np.float32(target.scale), at.sum(shape, e, axes))
    at.finish(at("MUL", shape, e, each), (target.qmin, target.qmax), tensors[-1])


def _below(at: _Whole, shape: Shape, x: int, axes: Sequence[int]) -> int:
    """Return how far numbers are below the highest along axes."""
    thin = _thin(shape, axes)
    return at("SUB", shape, at("REDUCE_MAX", thin, x, at.w.constant(axes), keepDims=True), x)


def _exponentials(at: _Whole, shape: Shape, below: int, scale: np.float32, largest: int) -> int:
    a0, a2, a3 = numbers.polynomial(largest)
    part = np.float32(0.5**numbers.SQUARINGS)
    x = at("MUL", shape, below, scale * part)
    x = at("MINIMUM", shape, x, np.float32(numbers.FARTHEST) * part)
    h = at("SUB", shape, a2, at("MUL", shape, x, a3))
    h = at("SUB", shape, a0, at("MUL", shape, x, h))
    p = at("SUB", shape, a0, at("MUL", shape, x, h))
    for _ in range(numbers.SQUARINGS):
        p = at("MUL", shape, p, p)
    return at("ROUND", shape, p)


def log_softmax(w: Writer, op: LogSoftmaxOfCodes, *tensors: Codes | None) -> None:
    """Write the logarithm of a softmax, see `numerics.softmax`."""
    at, known = _Whole(w, op), w.source.tensors
    source, target = known[op.inputs[0]], grid_of(known[op.outputs[0]])
    shape, axes, scale = source.shape, op.axes, np.float32(grid_of(source).scale)
    thin = _thin(shape, axes)
    out_scale, largest = np.float32(target.scale), numbers.fine_unit(numbers.terms(shape, axes))
    below = _below(at, shape, _masked(at, op, shape, scale, target), axes)
    e = _exponentials(at, shape, below, scale, largest)
    total = _sum_of_wholes(at, shape, e, axes, 2.0**30)
    m = at("MUL", thin, total, np.float32(1 / largest))
    shift = at("DIV", thin, _logarithm(at, thin, m), out_scale)
    scores = at("MUL", shape, below, -scale / out_scale)
    x = at("SUB", shape, scores, shift)
    at.finish(x, (target.qmin, target.qmax), tensors[-1])


def _logarithm(at: _Whole, shape: Shape, m: int) -> int:
    one = np.float32(1)
    halved: int | np.float32 = np.float32(0.5)
    for k in numbers.HALVINGS:
        part = np.float32(0.5**k)
        much = at("MINIMUM", shape, at("FLOOR", shape, at("MUL", shape, m, part)), one)
        m = at("MUL", shape, m, at("SUB", shape, one, at("MUL", shape, much, one - part)))
        halved = at("ADD", shape, at("MUL", shape, much, np.float32(k)), halved)
    root, log2, (first, *others) = numbers.LOGARITHM
    t = at("DIV", shape, at("SUB", shape, m, root), at("ADD", shape, m, root))
    square, series = at("MUL", shape, t, t), first
    for coefficient in others:
        series = at("ADD", shape, at("MUL", shape, square, series), coefficient)
    return at("ADD", shape, at("MUL", shape, halved, log2), at("MUL", shape, t, series))


def _masked(at: _Whole, op: OfExponentialsOfCodes, shape: Shape, scale: np.float32, y: Grid) -> int:
    """Return whole numbers, the lowest where a mask, if there is one, leaves none."""
    x = at.w.whole(op.inputs[0])
    if len(op.inputs) == 1:
        return x
    lowest = np.float32(numbers.lowest(scale, op.reach(y)))
    mask = at.w.source.tensors[op.inputs[1]].value
    if mask is not None:  # every code is less than 256
        return at("MINIMUM", shape, x, np.where(mask == op.keeps, np.float32(256), lowest))
    cases = (x, lowest) if op.keeps else (lowest, x)
    return at("SELECT_V2", shape, at.w.real(op.inputs[1]).index, *cases)


def multiplied(w: Writer, op: Multiplied, *tensors: Codes | None) -> None:
    """Write a product of two tensors as one of whole numbers, whose sums float32 holds.

    Longer sums are taken in parts.
    """
    at = _Whole(w, op)
    (a, b), (left, right) = map(w.whole, op.inputs), [w.source.tensors[i] for i in op.inputs]
    terms, shape = left.shape[2], w.source.tensors[op.outputs[0]].shape
    longest = _EXACT // (grid_of(left).largest * grid_of(right).largest)
    starts = range(0, terms, longest)
    sums = []
    for start in starts:
        end = min(start + longest, terms)
        x, y = a, b
        if len(starts) > 1:
            x = _part(at, a, (*left.shape[:2], end - start), 2, start)
            y = _part(at, b, (right.shape[0], end - start, right.shape[2]), 1, start)
        sums.append(at("BATCH_MATMUL", shape, x, y, adjX=False, adjY=False))
    real = _total(at, shape, sums)
    at.finish(at("MUL", shape, real, np.float32(op.arrays["multiplier"])), op.clamp, tensors[-1])


def _part(at: _Whole, x: int, shape: Shape, axis: int, start: int) -> int:
    """Return a part of one axis of a tensor of three, of this shape."""
    begin = [start if k == axis else 0 for k in range(3)]
    sizes = [d if k == axis else -1 for k, d in enumerate(shape)]
    return at("SLICE", shape, x, at.w.constant(begin), at.w.constant(sizes))


def _total(at: _Whole, shape: Shape, sums: Sequence[int]) -> int:
    """Add whole numbers, and round once: of more than two in int32."""
    if len(sums) <= 2:
        return sums[0] if len(sums) == 1 else at("ADD", shape, *sums)
    total, *rest = (at.w.cast(part, shape, np.int32) for part in sums)
    for part in rest:
        total = at.int32("ADD", shape, total, part)
    return at.w.cast(total, shape, np.float32)


def added(w: Writer, op: Sum, y: Codes) -> None:
    """Write a sum of tensors whose scales differ widely, see `numerics.rounding.xnnpack`."""
    at, (*multipliers, shift) = _Whole(w, op), map(int, op.multipliers)
    terms = []
    for i, multiplier in zip(op.inputs, multipliers, strict=True):
        shape = w.source.tensors[i].shape
        whole = w.cast(w.whole(i), shape, np.int32)
        terms.append(at.int32("MUL", shape, whole, w.constant(multiplier)))
    shape = w.source.tensors[op.outputs[0]].shape
    total = at.int32("ADD", shape, *terms)
    total = at.int32("ADD", shape, total, w.constant(1 << (shift - 1)))
    total = at.int32("FLOOR_DIV", shape, total, w.constant(1 << shift))
    for kind, end in (("MAXIMUM", -_FAR), ("MINIMUM", _FAR)):
        total = at.int32(kind, shape, total, w.constant(end))
    at.finish(w.cast(total, shape, np.float32), op.clamp, y)


def counted_sum(w: Writer, op: CountedSum, *tensors: Codes | None) -> None:
    """Write sums, each times what a table holds at a count."""
    at, tensor = _Whole(w, op), w.source.tensors[op.inputs[0]]
    largest = grid_of(tensor).largest * math.prod(tensor.shape[a] for a in op.axes)
    sums = w.whole(op.inputs[0])
    if op.axes:
        sums = _sum_of_wholes(at, tensor.shape, sums, op.axes, largest)
    shape = w.source.tensors[op.outputs[0]].shape
    counts = w.real(op.inputs[1])
    factors = w.tensor(None, counts.shape, np.float32)
    table = w.constant(op.arrays["multiplier"], np.float32)
    w.emit("GATHER", [table, counts.index], factors, axis=0, batchDims=0)
    at.finish(at("MUL", shape, w.reshaped(sums, shape), factors), op.clamp, tensors[-1])


def look_up(w: Writer, op: LookUp, _: Codes | None, y: Codes) -> None:
    """Gather rows of codes."""
    table = w.code_constant(op.arrays["table"], y.grid)
    shape = w.source.tensors[op.inputs[0]].shape[:-1]
    picked = w.tensor(None, shape, np.int32)
    w.emit("RESHAPE", [w.real(op.inputs[0]).index], picked, newShape=reshape_target(shape))
    if op.clips:
        at = _Whole(w, op)
        for kind, end in (("MAXIMUM", 0), ("MINIMUM", len(op.arrays["table"]) - 1)):
            picked = at.int32(kind, shape, picked, w.constant(end))
    w.emit("GATHER", [table.index, picked], y.index, axis=0, batchDims=0)
