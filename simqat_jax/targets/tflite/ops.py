"""Write the operations of a program as TFLite operators on int8 codes."""

import math
from collections.abc import Callable, Mapping

import numpy as np

from simqat_jax.ir.program import Op, Program, grid_of
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.rounding.xnnpack import XNNPACK
from simqat_jax.ops.arithmetic import Multiply, Sum
from simqat_jax.ops.batch_norm import Affine
from simqat_jax.ops.extremes import ExtremumOfCodes, PositionOfCodes
from simqat_jax.ops.floats import Quantize
from simqat_jax.ops.functions import Table
from simqat_jax.ops.masked import CountedSum, Mask, Select
from simqat_jax.ops.matmul import LookUp, Multiplied
from simqat_jax.ops.moves import (
    Broadcast,
    Clip,
    Concatenate,
    Extreme,
    MaxPool,
    Pad,
    Reshape,
    Reverse,
    Slice,
    Take,
    Transpose,
)
from simqat_jax.ops.norms import Normalize
from simqat_jax.ops.primitives import Primitive
from simqat_jax.ops.products import Conv, Dense
from simqat_jax.ops.softmax import LogSoftmaxOfCodes, SoftmaxOfCodes
from simqat_jax.ops.spreads import SpreadOfCodes
from simqat_jax.ops.sums import SumOver, SumPool
from simqat_jax.targets.refusals import OTHER_FILE, check_shape, refuse, refuse_float, refuse_wide
from simqat_jax.targets.refusals import check as check_each
from simqat_jax.targets.tflite import primitives
from simqat_jax.targets.tflite.gelu import is_gelu
from simqat_jax.targets.tflite.layers import affine, conv, convolution, dense, fully_connected
from simqat_jax.targets.tflite.subgraph import Codes, Plain, check_ratio, stored
from simqat_jax.targets.tflite.whole import (
    added,
    counted_sum,
    log_softmax,
    look_up,
    multiplied,
    normalize,
    softmax,
    spread,
)
from simqat_jax.targets.tflite.windows import (
    Window,
    check_padding,
    grown,
    in_regions,
    pad_codes,
    windowed,
)
from simqat_jax.targets.tflite.writer import Writer

VERSIONS = {
    "ADD": ("AddOptions", 2),
    "BATCH_MATMUL": ("BatchMatMulOptions", 1),
    "CAST": ("CastOptions", 1),
    "CONCATENATION": ("ConcatenationOptions", 2),
    "CONV_2D": ("Conv2DOptions", 3),
    "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", 3),
    "DEQUANTIZE": (None, 2),
    "DIV": ("DivOptions", 1),
    "FLOOR": (None, 1),
    "FLOOR_DIV": ("FloorDivOptions", 2),
    "FULLY_CONNECTED": ("FullyConnectedOptions", 5),
    "GATHER": ("GatherOptions", 2),
    "GELU": ("GeluOptions", 2),
    "MAXIMUM": ("MaximumMinimumOptions", 2),
    "MAX_POOL_2D": ("Pool2DOptions", 2),
    "MINIMUM": ("MaximumMinimumOptions", 2),
    "MUL": ("MulOptions", 2),
    "PAD": ("PadOptions", 2),
    "PADV2": ("PadV2Options", 2),
    "QUANTIZE": (None, 1),
    "REDUCE_MAX": ("ReducerOptions", 2),
    "REDUCE_MIN": ("ReducerOptions", 2),
    "RESHAPE": ("ReshapeOptions", 1),
    "REVERSE_V2": ("ReverseV2Options", 1),
    "ROUND": (None, 1),
    "SELECT_V2": (None, 1),
    "SLICE": (None, 1),
    "STRIDED_SLICE": ("StridedSliceOptions", 2),
    "SUB": ("SubOptions", 2),
    "SUM": ("ReducerOptions", 1),
    "TILE": ("TileOptions", 1),
    "TRANSPOSE": ("TransposeOptions", 2),
    **primitives.VERSIONS,
}
"""The options and the version of each operator that is written.

The functions of each operation write it from its inputs to its output, the last of their
arguments, and return what stands for the output where that is another tensor.
"""


def write_op(writer: Writer, op: Op) -> None:
    """Write one operation of a program."""
    if isinstance(op, Primitive):
        primitives.write(writer, op)
        return
    number = op.outputs[0]
    output = writer.source.tensors[number]
    target: Codes | Plain | None = None
    if output.grid is None:
        target = writer.reals[number] = writer.plain(output.name, output.shape, output.dtype)
    elif number not in writer.staying_whole:
        target = writer.codes(output.name, output.shape, grid_of(output))
    replaced = None
    if isinstance(op, Quantize):
        assert isinstance(target, Codes)
        real = writer.real(op.inputs[0])
        writer.quantize(real.index, real.shape, target)
    else:
        thin = writer.source.reads_thin
        inputs = [writer.values[i] if thin(op, i) else writer.full(i) for i in op.inputs]
        replaced = _WRITERS[type(op)](writer, op, *inputs, target)
    written = replaced or target
    if isinstance(written, Codes):
        writer.values[number] = written


def check(program: Program) -> None:
    """Raise ValueError for a program that TFLite cannot compute exactly, before it is written."""
    check_each(program.ops, lambda op: _check(program, op), "TFLite")


def _check(program: Program, op: Op) -> None:
    if not op.rounds_as(XNNPACK):
        refuse(
            op,
            "it rounds as ONNX Runtime does, which LiteRT does not",
            'Convert again with convert(..., backend="tflite").',
        )
    if isinstance(op, Primitive):
        primitives.check(program, op)
    elif type(op) not in _WRITERS and not isinstance(op, Quantize):
        refuse_float(program, op)
    refuse_wide(program, op)


# Sums --------------------------------------------------------------------------------------------


def _sum(w: Writer, op: SumOver, x: Codes, y: Codes) -> None:
    """Multiply by a column of ones: XNNPACK's MEAN does not round its ties as it does here."""
    axes = [a % len(x.shape) for a in op.axes]
    if any(x.shape[a] < 0 for a in axes):
        refuse(op, "it sums over the batch", OTHER_FILE)
    kept = [a for a in range(len(x.shape)) if a not in axes]
    count, order = math.prod(x.shape[a] for a in axes), [*kept, *axes]
    if order != sorted(order):
        moved = w.codes(f"{op.path}/moved", [x.shape[a] for a in order], x.grid)
        w.emit("TRANSPOSE", [x.index, w.constant(order)], moved.index)
        x = moved
    rows = list(x.shape[: len(kept)])
    multiplier = op.arrays["multiplier"]
    if multiplier.size > 1:
        refuse(
            op,
            "it divides each of its sums by another number",
            OTHER_FILE,
        )
    weight, scale = _ones(op, x.grid, y.grid, count, multiplier)
    sums = w.codes(f"{op.path}/sums", [*rows, 1], y.grid)
    kernel = np.full((1, count), weight)
    fully_connected(w, op, w.reshape(x, [*rows, count]), sums, kernel, np.full(1, scale))
    w.reshape(sums, y.shape, y)


def _sum_pool(w: Writer, op: SumPool, x: Codes, y: Codes) -> None:
    window, channels = _pooling(op, x), x.shape[-1]

    def add(x: Codes, y: Codes, window: Window, multiplier: np.ndarray) -> None:
        weight, scale = _ones(op, x.grid, y.grid, math.prod(window.lengths), multiplier)
        kernel = np.full((*window.lengths, 1, channels), weight)
        scales = np.full(channels, scale)
        convolution(w, op, x, y, kernel, scales, channels, window, op.clamp)

    multipliers = op.arrays["multiplier"]
    if multipliers.size == 1:
        add(x, y, window, multipliers)
    else:
        in_regions(w, op, x, y, window, multipliers, add)


def _ones(
    op: SumOver | SumPool, x: Grid, y: Grid, count: int, wanted: np.ndarray
) -> tuple[int, np.float32]:
    """Return a weight and its scale with which a layer adds up `count` codes exactly.

    Not every float32 is `f32(f32(s_x * s_w) / s_y)` for some `s_w`: another multiplier does where
    it rounds every sum that can occur to the same code.
    """
    multiplier = np.float32(wanted.item())
    zero = int(x.zero_point)
    largest = count * max(zero - x.qmin, x.qmax - zero)
    last = min(largest, int(300 / multiplier))  # beyond it every code saturates
    sums = np.arange(last + 1, dtype=np.float32)
    s_x, s_y = np.float32(x.scale), np.float32(y.scale)
    for weight in range(1, 128):
        near = np.float32(multiplier * np.float64(s_y) / s_x / weight)
        for scale in (near, *(np.nextafter(near, np.float32(end)) for end in (0, 1))):
            factor = s_x * scale / s_y
            # A few sums first: there may be millions.
            if all(
                np.array_equal(np.rint(some * weight * factor), np.rint(some * multiplier))
                for some in (sums[:: 1 + last // 4096], sums)
            ):
                return weight, scale
    refuse(
        op,
        f"no weights of TFLite's multiply its sums of {count} codes by {multiplier}",
        OTHER_FILE,
    )


# Elementwise -------------------------------------------------------------------------------------


def _add(w: Writer, op: Sum, a: Codes, b: Codes, y: Codes) -> None:
    ratios = [np.float32(v.grid.scale) / np.float32(y.grid.scale) for v in (a, b)]
    if not all(2.0**-10 <= ratio < 2.0**8 for ratio in ratios):  # what XNNPACK takes
        check_ratio(op, ratios, 0, 2.0**20)
        added(w, op, y)
        return
    name = "SUB" if op.multipliers[1] < 0 else "ADD"
    w.clamped(op, name, [a.index, b.index], y, op.clamp)


def _mul(w: Writer, op: Multiply, a: Codes, b: Codes, y: Codes) -> None:
    check_ratio(op, op.arrays["multiplier"], 2.0**-16)
    w.clamped(op, "MUL", [a.index, b.index], y, op.clamp)


def _extremum(w: Writer, op: ExtremumOfCodes, a: Codes, b: Codes, y: Codes) -> None:
    w.emit(op.kind.upper(), [a.index, b.index], y.index)


def _position(w: Writer, op: PositionOfCodes, x: Codes, y: Plain) -> None:
    name = "ARG_MAX" if op.kind == "argmax" else "ARG_MIN"
    kind = w.schema.TensorType.INT32
    w.emit(name, [x.index, w.constant(op.axis)], y.index, outputType=kind)


def _table(w: Writer, op: Table, x: Codes, y: Codes) -> None:
    """Look codes up, by their bits as uint8: 0 to 127, then -128 to -1."""
    table = np.asarray(op.arrays["table"], np.int32) - y.grid.offset
    for approximate in (True, False):
        if is_gelu(table, x.grid, y.grid, approximate=approximate):
            w.emit("GELU", [x.index], y.index, approximate=approximate)
            return
    stored = np.arange(256, dtype=np.uint8).astype(np.int8).astype(np.int32)
    entries = table[np.clip(stored + x.grid.offset - x.grid.qmin, 0, table.size - 1)]
    source, steps = x.index, (np.uint8, np.int32)
    for dtype in steps:
        cast = w.tensor(f"{op.path}/index", x.shape, dtype)
        types = {"outDataType": w.tensors[cast].type, "inDataType": w.tensors[source].type}
        w.emit("CAST", [source], cast, **types)
        source = cast
    held = w.code_constant(entries + y.grid.offset, y.grid)
    w.emit("GATHER", [held.index, source], y.index, axis=0, batchDims=0)


def _clip(w: Writer, op: Clip, x: Codes, y: Codes) -> None:
    w.limit(x, stored(op.clamp, y.grid), y)


# Moves -------------------------------------------------------------------------------------------


def _pooling(op: SumPool | MaxPool, x: Codes) -> Window:
    ends = [values[k] for values in (op.window, op.strides) for k in (0, -1)]
    if ends != [1] * 4:
        refuse(
            op,
            "it pools over the batch or over channels",
            "Transpose before pooling, so that it pools over the axes between batch and channels.",
        )
    if len(x.shape) not in (3, 4):
        refuse(op, "TFLite pools over one or two axes between batch and channels", OTHER_FILE)
    lengths, strides, padding = op.window[1:-1], op.strides[1:-1], op.padding[1:-1]
    return Window(lengths, strides, padding, (1,) * len(lengths))


def _max_pool(w: Writer, op: MaxPool, x: Codes, y: Codes) -> None:
    window = _pooling(op, x)

    def emit(x: Codes, y: Codes, options: dict[str, int]) -> None:
        lengths = window.planar().lengths
        options |= {"filterHeight": lengths[0], "filterWidth": lengths[1]}
        w.emit("MAX_POOL_2D", [x.index], y.index, **options)

    def pad(x: Codes, window: Window) -> Codes:
        padding = [(0, 0), *window.padding, (0, 0)]
        y = w.codes(f"{op.path}/padded", grown(x.shape, padding), x.grid)
        # XNNPACK pads with zero alone, which behind a ReLU is the lowest code.
        lowest = w.code_constant(x.grid.offset - 128, x.grid) if x.grid.stored_zero > -128 else None
        pad_codes(w, x, padding, y, lowest)
        return y

    windowed(w, op, x, y, window, emit, pad)


def _extreme(w: Writer, op: Extreme, x: Codes, y: Codes) -> None:
    name = "REDUCE_MAX" if op.kind == "max" else "REDUCE_MIN"
    w.emit(name, [x.index, w.constant(op.axes)], y.index, keepDims=False)


def _concat(w: Writer, op: Concatenate, *tensors: Codes) -> None:
    *xs, y = tensors
    w.emit("CONCATENATION", [x.index for x in xs], y.index, axis=op.axis)


def _reshape(w: Writer, op: Reshape, x: Codes, y: Codes | None) -> None:
    shape = w.source.tensors[op.outputs[0]].shape
    check_shape(op, shape)
    if y is None:
        w.wholes[op.outputs[0]] = w.reshaped(w.whole(op.inputs[0]), shape)
    else:
        w.reshape(x, shape, y)


def _transpose(w: Writer, op: Transpose, x: Codes, y: Codes) -> None:
    w.emit("TRANSPOSE", [x.index, w.constant(op.permutation)], y.index)


def _broadcast(w: Writer, op: Broadcast, x: Codes, y: Codes) -> Codes | None:
    dims = dict(zip(op.dimensions, x.shape, strict=True))
    thin = w.reshape(x, [dims.get(k, 1) for k in range(len(y.shape))])
    number = op.outputs[0]
    readers = [reader for reader in w.source.ops if number in reader.inputs]
    if thin.shape == y.shape:
        return thin
    if number not in w.source.outputs and all(_broadcasts(w, r, number, y) for r in readers):
        return thin
    pairs = list(zip(thin.shape, y.shape, strict=True))
    if any(a != b and b < 0 for a, b in pairs):
        refuse(op, "it repeats values along the batch", "Repeat them outside of the model.")
    repeats = [b if a != b else 1 for a, b in pairs]
    w.emit("TILE", [thin.index, w.constant(repeats)], y.index)
    return None


def _broadcasts(w: Writer, op: Op, number: int, y: Codes) -> bool:
    """Whether an operation broadcasts one input to another that has the full shape."""
    others = [i for i in op.inputs if i != number]
    return (
        op.broadcasts
        and bool(others)
        and all(i in w.values and w.values[i].shape == y.shape for i in others)
    )


def _slice(w: Writer, op: Slice, x: Codes, y: Codes) -> None:
    limit = [None if b == d else b for b, d in zip(op.limit, x.shape, strict=True)]
    if any(b is not None and b < 0 for b in limit):
        refuse(op, "it cuts the batch at a fraction of it", "Cut it outside of the model.")
    w.strided_slice(x, op.start, limit, op.strides, y)


def _reverse(w: Writer, op: Reverse, x: Codes, y: Codes) -> None:
    *inner, last = op.axes
    for axis in inner:
        flipped = w.codes(f"{op.path}/reversed", x.shape, x.grid)
        w.emit("REVERSE_V2", [x.index, w.constant([axis])], flipped.index)
        x = flipped
    w.emit("REVERSE_V2", [x.index, w.constant([last])], y.index)


def _take(w: Writer, op: Take, x: Codes, y: Codes) -> None:
    axis, indices = op.axis, w.constant(op.indices)
    w.emit("GATHER", [x.index, indices], y.index, axis=axis, batchDims=0)


def _select(w: Writer, op: Select, no: Codes, yes: Codes, truth: Codes | None, y: Codes) -> None:
    del truth  # it has no codes
    w.emit("SELECT_V2", [w.real(op.inputs[2]).index, yes.index, no.index], y.index)


def _mask(w: Writer, op: Mask, x: Codes, truth: Codes | None, y: Codes) -> None:
    del truth  # it has no codes
    code = w.code_constant(op.code, x.grid).index
    cases = (x.index, code) if op.keeps else (code, x.index)
    w.emit("SELECT_V2", [w.real(op.inputs[1]).index, *cases], y.index)


def _pad(w: Writer, op: Pad, x: Codes, y: Codes) -> None:
    padding = [(lo, hi) for lo, hi, _ in op.padding]
    check_padding(op, x, padding)
    if any(inner for *_, inner in op.padding):
        refuse(op, "TFLite does not pad between elements", "Do it outside of the model.")
    pad_codes(w, x, padding, y)


_WRITERS: Mapping[type[Op], Callable[..., Codes | None]] = {
    Conv: conv,
    Dense: dense,
    Affine: affine,
    Sum: _add,
    Multiply: _mul,
    ExtremumOfCodes: _extremum,
    PositionOfCodes: _position,
    SumOver: _sum,
    SumPool: _sum_pool,
    CountedSum: counted_sum,
    Mask: _mask,
    Select: _select,
    MaxPool: _max_pool,
    Extreme: _extreme,
    Table: _table,
    Clip: _clip,
    Concatenate: _concat,
    Reshape: _reshape,
    Transpose: _transpose,
    Broadcast: _broadcast,
    Slice: _slice,
    Reverse: _reverse,
    Take: _take,
    Pad: _pad,
    Normalize: normalize,
    SpreadOfCodes: spread,
    SoftmaxOfCodes: softmax,
    LogSoftmaxOfCodes: log_softmax,
    Multiplied: multiplied,
    LookUp: look_up,
}
