"""Write the operations of a program as ONNX nodes, in QDQ form, for ONNX Runtime."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor, grid_of
from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME
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
from simqat_jax.targets.onnx import primitives
from simqat_jax.targets.onnx.at import real_values
from simqat_jax.targets.onnx.whole import (
    log_softmax,
    look_up,
    multiplied,
    normalize,
    softmax,
    spread,
)
from simqat_jax.targets.onnx.writer import (
    FIRST,
    LAST,
    Layout,
    Writer,
    dequantized,
    kernel_codes,
    looked_up,
)
from simqat_jax.targets.refusals import check as check_each
from simqat_jax.targets.refusals import refuse, refuse_float, refuse_wide

T = TypeVar("T")


def write_op(writer: Writer, op: Op) -> None:
    """Write one operation of a program.

    Raises:
      RefusedError: it has no form in ONNX.
    """
    _WRITERS[type(op)](writer, op)


def check(program: Program) -> None:
    """Raise ValueError for a program that has no form in ONNX, before it is written."""
    check_each(program.ops, lambda op: _check(program, op), "ONNX")


def _check(program: Program, op: Op) -> None:
    if not op.rounds_as(ONNXRUNTIME):
        refuse(
            op,
            f"it rounds as in {program.backend}",
            'Convert it with convert(..., backend="onnx").',
        )
    if type(op) not in _WRITERS:
        refuse_float(program, op)
    if isinstance(op, Primitive):
        primitives.check(program, op)
    if isinstance(op, Multiply) or op.kind == ONNXRUNTIME.add.kind:
        _check_reach(program, op)
    refuse_wide(program, op)


def _check_reach(program: Program, op: Op) -> None:
    """Refuse sums and products beyond int32, to which ONNX Runtime rounds before it clips."""
    a, b, y = (grid_of(program.tensors[i]) for i in (*op.inputs, *op.outputs))
    terms = (a.largest * a.scale, b.largest * b.scale)
    reach = (math.prod if isinstance(op, Multiply) else sum)(terms) / y.scale
    if reach >= 2**31 - 256:
        refuse(
            op,
            f"results of up to {reach:.3g} codes are clipped to those of its output, and ONNX "
            "Runtime rounds to int32 before",
            "Clip its inputs in the model (jnp.clip), so that their range is not so much wider.",
        )


# Operations --------------------------------------------------------------------------------------


def _first(axis: int, rank: int, layout: Layout) -> int:
    """Return where an axis is in a layout."""
    axis %= rank
    if layout == LAST or axis == 0:
        return axis
    return 1 if axis == rank - 1 else axis + 1


def _ordered(values: Sequence[T], layout: Layout) -> list[T]:
    """Put one value an axis into a layout's order."""
    return list(values) if layout == LAST else [values[0], values[-1], *values[1:-1]]


def _conv_padding(w: Writer, op: Conv, x: str, tensor: Tensor) -> tuple[str, list[int]]:
    """Do what a convolution's own padding cannot; return the input and what is left to pad."""
    assert set(op.input_dilation) == {1}, op.path  # `in_subpixels` leaves no other
    flat = [p[end] for end in (0, 1) for p in op.padding]
    if min(flat) >= 0:
        return x, flat
    half, zero = len(flat) // 2, w.scale(tensor)[1]
    pads = w.ints([0, 0, *flat[:half], 0, 0, *flat[half:]], op.path)
    return w.node("Pad", [x, pads, zero], op.path), [0] * len(flat)


def _weights(
    w: Writer, op: Conv | Dense | Affine, kernel: np.ndarray, axis: int, tensor: Tensor
) -> list[str]:
    """Write kernel and bias, dequantized."""
    scale = op.arrays["scale"].astype(np.float32)
    unit = np.float32(w.grid(tensor).scale) * scale
    parts: tuple[dict[str, np.ndarray], ...]
    parts = ({"scale": scale}, {"bias": op.arrays["bias"], "unit": unit})
    if isinstance(op, Dense):  # ONNX Runtime fuses no Gemm whose kernel has no zero points
        parts[0]["zero"] = np.zeros(scale.shape, np.int8)
    names = [[w.initializer(v, f"{op.path}/{k}") for k, v in part.items()] for part in parts]
    names[0].insert(0, kernel_codes(w, op, kernel))
    axes = ({} if axis == 1 else {"axis": axis}, {"axis": 0})  # 1 is the default
    return [
        w.node("DequantizeLinear", inputs, op.path, **given)
        for inputs, given in zip(names, axes, strict=True)
    ]


def _conv(w: Writer, op: Conv) -> None:
    tensor = w.model.tensors[op.inputs[0]]
    x, pads = _conv_padding(w, op, w.get(op.inputs[0], FIRST), tensor)
    kernel = np.moveaxis(op.arrays["kernel"], (-1, -2), (0, 1))
    real = w.node(
        "Conv",
        [w.dequantize(x, tensor), *_weights(w, op, kernel, 0, tensor)],
        op.path,
        pads=pads,
        strides=op.strides,
        dilations=op.kernel_dilation,
        group=op.groups,
    )
    w.finish(op, real, FIRST, op.clamp)


def _dense(w: Writer, op: Dense) -> None:
    tensor, output = (w.model.tensors[i] for i in (op.inputs[0], op.outputs[0]))
    kernel, x = op.arrays["kernel"], w.get(op.inputs[0])
    rows = len(tensor.shape) != 2
    if rows:
        x = w.node("Reshape", [x, w.ints([-1, tensor.shape[-1]], op.path)], op.path)
    real = w.node("Gemm", [w.dequantize(x, tensor), *_weights(w, op, kernel, 1, tensor)], op.path)
    w.finish(op, real, LAST, op.clamp)
    if rows:
        shape = w.ints(_reshape_target(op, output.shape), op.path)
        w.put(op.outputs[0], w.node("Reshape", [w.get(op.outputs[0]), shape], op.path))


def _affine(w: Writer, op: Affine) -> None:
    tensor = w.model.tensors[op.inputs[0]]
    channels, rank = tensor.shape[-1], len(tensor.shape)
    layout = FIRST if rank > 2 else LAST
    x = w.get(op.inputs[0], layout)
    if rank != 4:
        x = w.node(
            "Reshape",
            [x, w.ints([-1, channels, 1, math.prod(tensor.shape[1:-1])], op.path)],
            op.path,
        )
    kernel = op.arrays["kernel"].reshape(-1, 1, 1, 1)
    inputs = [w.dequantize(x, tensor), *_weights(w, op, kernel, 0, tensor)]
    w.finish(op, w.node("Conv", inputs, op.path, group=channels), layout, op.clamp)
    if rank != 4:
        shape = [-1, *_ordered(tensor.shape, layout)[1:]]
        name = w.get(op.outputs[0], layout)
        w.put(op.outputs[0], w.node("Reshape", [name, w.ints(shape, op.path)], op.path), layout)


def _binary(w: Writer, op: Sum | Multiply, kind: str) -> None:
    layout = w.layout(op)
    inputs = [dequantized(w, op, p, layout) for p in range(2)]
    w.finish(op, w.node(kind, inputs, op.path), layout, op.clamp)


def _add(w: Writer, op: Sum) -> None:
    _binary(w, op, "Sub" if op.kind == ONNXRUNTIME.subtract.kind else "Add")


def _mul(w: Writer, op: Multiply) -> None:
    _binary(w, op, "Mul")


def _extremum(w: Writer, op: ExtremumOfCodes) -> None:
    layout, kind = w.layout(op), "Max" if op.kind == "maximum" else "Min"
    codes = [w.operand(op, p, layout) for p in range(2)]
    w.put(op.outputs[0], w.node(kind, codes, op.path), layout)


def _position(w: Writer, op: PositionOfCodes) -> None:
    kind = "ArgMax" if op.kind == "argmax" else "ArgMin"
    place = w.node(kind, [w.get(op.inputs[0])], op.path, axis=op.axis, keepdims=0)
    w.put(op.outputs[0], w.node("Cast", [place], op.path, to=w.onnx.TensorProto.INT32))


def _requantized(
    w: Writer, op: SumOver | SumPool | CountedSum, sums: str, multiplier: str, layout: Layout
) -> None:
    """Scale int32 sums as the model does, in plain operators."""
    output = w.model.tensors[op.outputs[0]]
    grid = w.grid(output)
    real = w.node("Cast", [sums], op.path, to=w.onnx.TensorProto.FLOAT)
    real = w.node("Mul", [real, multiplier], op.path)
    real = w.node("Round", [real], op.path)
    zero = w.initializer(np.float32(grid.zero_point + grid.unsigned_offset), op.path)
    real = w.node("Add", [real, zero], op.path)
    ends = [w.initializer(np.float32(v + grid.unsigned_offset), op.path) for v in op.clamp]
    real = w.node("Clip", [real, *ends], op.path)
    w.put(op.outputs[0], w.node("Cast", [real], op.path, to=w.onnx.TensorProto.UINT8), layout)


def _centered(w: Writer, op: Op) -> str:
    tensor = w.model.tensors[op.inputs[0]]
    grid = w.grid(tensor)
    codes = w.node("Cast", [w.get(op.inputs[0])], op.path, to=w.onnx.TensorProto.INT32)
    zero = w.initializer(np.int32(grid.zero_point + grid.unsigned_offset), op.path)
    return w.node("Sub", [codes, zero], op.path)


def _sum(w: Writer, op: SumOver) -> None:
    tensor = w.model.tensors[op.inputs[0]]
    rank, axes = len(tensor.shape), op.axes
    lengths = [tensor.shape[a] for a in axes]
    spatial = list(axes) == list(range(1, rank - 1)) and rank > 2
    if spatial and op.count == math.prod(lengths):
        inputs = [dequantized(w, op, 0, FIRST)]
        w.finish(op, w.node("GlobalAveragePool", inputs, op.path), LAST, op.clamp)
        shape = w.ints([-1, tensor.shape[-1]], op.path)
        w.put(op.outputs[0], w.node("Reshape", [w.get(op.outputs[0]), shape], op.path))
        return
    inputs = [_centered(w, op), w.ints(axes, op.path)]
    sums = w.node("ReduceSum", inputs, op.path, keepdims=0)
    _requantized(w, op, sums, w.initializer(op.arrays["multiplier"], op.path), LAST)


def _counted_sum(w: Writer, op: CountedSum) -> None:
    sums = _centered(w, op)
    if op.axes:
        sums = w.node("ReduceSum", [sums, w.ints(op.axes, op.path)], op.path, keepdims=0)
    shape = w.ints([max(d, -1) for d in w.model.tensors[op.outputs[0]].shape], op.path)
    table = w.initializer(op.arrays["multiplier"], op.path)
    multiplier = w.node("Gather", [table, w.get(op.inputs[1])], op.path)
    _requantized(w, op, w.node("Reshape", [sums, shape], op.path), multiplier, LAST)


def _select(w: Writer, op: Select) -> None:
    no, yes, truth = map(w.get, op.inputs)
    w.put(op.outputs[0], w.node("Where", [truth, yes, no], op.path))


def _mask(w: Writer, op: Mask) -> None:
    x, grid = w.get(op.inputs[0]), w.grid(w.model.tensors[op.inputs[0]])
    code = w.initializer(np.uint8(op.code + grid.unsigned_offset), op.path)
    cases = [x, code] if op.keeps else [code, x]
    w.put(op.outputs[0], w.node("Where", [w.get(op.inputs[1]), *cases], op.path))


def _sum_pool(w: Writer, op: SumPool) -> None:
    """A convolution with ones, in integers."""
    tensor = w.model.tensors[op.inputs[0]]
    grid, channels = w.grid(tensor), tensor.shape[-1]
    window, strides, pads = _spatial_window(op)
    ones = np.ones((channels, 1, *window), np.uint8)
    zero = w.initializer(np.uint8(grid.zero_point + grid.unsigned_offset), op.path)
    sums = w.node(
        "ConvInteger",
        [w.get(op.inputs[0], FIRST), w.initializer(ones, op.path), zero],
        op.path,
        group=channels,
        strides=strides,
        pads=pads,
        kernel_shape=window,
    )
    multiplier = op.arrays["multiplier"].astype(np.float32)
    if multiplier.ndim > 1:
        multiplier = np.moveaxis(multiplier, -1, 1)
    _requantized(w, op, sums, w.initializer(multiplier, op.path), FIRST)


def _spatial_window(op: SumPool | MaxPool) -> tuple[list[int], list[int], list[int]]:
    outer = [(op.window[k], op.strides[k], *op.padding[k]) for k in (0, -1)]
    if any(v != (1, 1, 0, 0) for v in outer):
        refuse(
            op,
            "it pools over the batch or over channels",
            "Transpose before pooling, so that it pools over the axes between batch and channels.",
        )
    pads = [p[end] for end in (0, 1) for p in op.padding[1:-1]]
    return list(op.window[1:-1]), list(op.strides[1:-1]), pads


def _max_pool(w: Writer, op: MaxPool) -> None:
    window, strides, pads = _spatial_window(op)
    x, half = w.get(op.inputs[0], FIRST), len(window)
    if any(pad >= length for pad, length in zip(pads, 2 * window, strict=True)):
        # MaxPool pads less than its window. Pad pads with the lowest code, 0.
        ends = w.ints([0, 0, *pads[:half], 0, 0, *pads[half:]], op.path)
        x, pads = w.node("Pad", [x, ends], op.path), [0] * len(pads)
    name = w.node(
        "MaxPool",
        [x],
        op.path,
        kernel_shape=window,
        strides=strides,
        pads=pads,
    )
    w.put(op.outputs[0], name, FIRST)


def _extreme(w: Writer, op: Extreme) -> None:
    axes, kind = w.ints(op.axes, op.path), "ReduceMax" if op.kind == "max" else "ReduceMin"
    name = w.node(kind, [w.get(op.inputs[0]), axes], op.path, keepdims=0)
    w.put(op.outputs[0], name)


def _table(w: Writer, op: Table) -> None:
    tensor, output = (w.model.tensors[i] for i in (op.inputs[0], op.outputs[0]))
    layout, grid = w.layout(op), w.grid(tensor)
    codes = op.arrays["table"].astype(np.int32) + w.grid(output).unsigned_offset
    lowest = grid.qmin + grid.unsigned_offset
    padded = np.concatenate([np.repeat(codes[:1], lowest), codes]).astype(np.uint8)
    index = w.node("Cast", [w.get(op.inputs[0], layout)], op.path, to=w.onnx.TensorProto.INT32)
    shape = [-1 if d < 0 else d for d in tensor.shape]
    lengths = shape if layout == LAST else _ordered(shape, layout)
    w.put(op.outputs[0], looked_up(w, padded, index, lengths, op.path), layout)


def _clip(w: Writer, op: Clip) -> None:
    layout, output = w.layout(op), w.model.tensors[op.outputs[0]]
    x = w.get(op.inputs[0], layout)
    w.put(op.outputs[0], w.clip(x, output, op.clamp), layout)


def _concat(w: Writer, op: Concatenate) -> None:
    layout, rank = w.layout(op), len(w.model.tensors[op.outputs[0]].shape)
    axis = _first(op.axis, rank, layout)
    parts = [w.get(i, layout) for i in op.inputs]
    w.put(op.outputs[0], w.node("Concat", parts, op.path, axis=axis), layout)


def _reshape_target(op: Op, shape: Sequence[int]) -> list[int]:
    if sum(d < 0 for d in shape) > 1:
        raise ValueError(
            f"{op.path}: {op.kind} makes a tensor with the batch size in two of its lengths, which "
            "ONNX cannot write. Compute it behind the file."
        )
    return [-1 if d < 0 else d for d in shape]


def _reshape(w: Writer, op: Reshape) -> None:
    source, target = (w.model.tensors[i].shape for i in (op.inputs[0], op.outputs[0]))
    if source == target:
        w.written[op.outputs[0]] = dict(w.layouts(op.inputs[0]))
        return
    # Channels last, as the runtime's own operators in front compute: it drops the transposition.
    shape = w.ints(_reshape_target(op, target), op.path)
    w.put(op.outputs[0], w.node("Reshape", [w.get(op.inputs[0]), shape], op.path))


def _transpose(w: Writer, op: Transpose) -> None:
    permutation = op.permutation
    x = w.get(op.inputs[0])
    w.put(op.outputs[0], w.node("Transpose", [x], op.path, perm=permutation))


def _broadcast(w: Writer, op: Broadcast) -> None:
    source, target = (w.model.tensors[i].shape for i in (op.inputs[0], op.outputs[0]))
    aligned = [1] * len(target)
    for axis, length in zip(op.dimensions, source, strict=True):
        aligned[axis] = length
    shape = w.ints(_reshape_target(op, aligned), op.path)
    x = w.node("Reshape", [w.get(op.inputs[0]), shape], op.path)
    whole = w.ints([1 if d < 0 else d for d in target], op.path)  # 1: as long as it is
    w.put(op.outputs[0], w.node("Expand", [x, whole], op.path))


def _slice(w: Writer, op: Slice) -> None:
    layout = w.layout(op)
    end = np.iinfo(np.int64).max
    limit = [end if d < 0 else d for d in op.limit]
    axes = [_first(k, len(limit), layout) for k in range(len(limit))]
    bounds = [w.ints(v, op.path) for v in (op.start, limit, axes, op.strides)]
    w.put(op.outputs[0], w.node("Slice", [w.get(op.inputs[0], layout), *bounds], op.path), layout)


def _reverse(w: Writer, op: Reverse) -> None:
    layout, rank = w.layout(op), len(w.model.tensors[op.outputs[0]].shape)
    axes = [_first(a, rank, layout) for a in op.axes]
    ends = np.iinfo(np.int64).min
    values = ([-1] * len(axes), [ends] * len(axes), axes, [-1] * len(axes))
    bounds = [w.ints(v, op.path) for v in values]
    w.put(op.outputs[0], w.node("Slice", [w.get(op.inputs[0], layout), *bounds], op.path), layout)


def _take(w: Writer, op: Take) -> None:
    layout, rank = w.layout(op), len(w.model.tensors[op.outputs[0]].shape)
    axis = _first(op.axis, rank, layout)
    inputs = [w.get(op.inputs[0], layout), w.ints(op.indices, op.path)]
    w.put(op.outputs[0], w.node("Gather", inputs, op.path, axis=axis), layout)


def _pad(w: Writer, op: Pad) -> None:
    padding, layout = op.padding, w.layout(op)
    if any(inner for _, _, inner in padding):
        refuse(op, "ONNX cannot pad between elements", "Insert the zeros in front of the model.")
    tensor = w.model.tensors[op.inputs[0]]
    ordered = _ordered(padding, layout)
    pads = w.ints([p[end] for end in (0, 1) for p in ordered], op.path)
    zero = w.scale(tensor)[1]
    w.put(op.outputs[0], w.node("Pad", [w.get(op.inputs[0], layout), pads, zero], op.path), layout)


def _quantize(w: Writer, op: Quantize) -> None:
    output = w.model.tensors[op.outputs[0]]
    w.put(op.outputs[0], w.quantize(real_values(w, op.inputs[0]), output))


_WRITERS: Mapping[type[Op], Callable[[Writer, Any], None]] = {
    Conv: _conv,
    Dense: _dense,
    Affine: _affine,
    Sum: _add,
    Multiply: _mul,
    ExtremumOfCodes: _extremum,
    PositionOfCodes: _position,
    SumOver: _sum,
    SumPool: _sum_pool,
    CountedSum: _counted_sum,
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
    Quantize: _quantize,
    Normalize: normalize,
    SpreadOfCodes: spread,
    SoftmaxOfCodes: softmax,
    LogSoftmaxOfCodes: log_softmax,
    Multiplied: multiplied,
    LookUp: look_up,
    Primitive: primitives.write,
}
