"""Write an integer model as a TFLite flatbuffer: int8 codes, per-channel weights."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from simqat_jax.export.tflite_graph import Codes, Writer, refuse, stored_clamp
from simqat_jax.export.width_blocks import in_width_blocks
from simqat_jax.files import atomic_file, import_extra
from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid, Op

_BLOCKS = {1: 2, 2: 2, 3: 2}  # channels and columns of a block, small and fast in LiteRT 2.3


def export_tflite(
    model: IntegerModel, path: str | os.PathLike, *, integer_io: bool = False
) -> None:
    """Write a model as a TFLite file that LiteRT runs on int8, for any batch size.

    LiteRT's default, the XNNPACK delegate, computes the codes of `model.run_codes` exactly, less
    128 where they are uint8. Its other kernels round differently.

    Args:
      model: what `convert(..., backend="tflite")` returned.
      path: the file, as a rule "*.tflite"; it appears only once it is whole.
      integer_io: take and return int8 codes; by default float32 values.
    Raises: ImportError: the extra `export` is not installed. ValueError: activations or weights of
      more than 8 bits, an operation in float or another that TFLite does not compute exactly, with
      its path; additions that mirror another runtime. OSError: an unwritable path.
    Source: TensorFlow Lite schema, version 3, and 8-bit quantization specification.
    """
    flatbuffers = import_extra("flatbuffers")
    schema = import_extra("ai_edge_litert.schema_py_generated")
    _check(model)
    written = Writer(in_width_blocks(model, _BLOCKS), schema).model(integer_io, _write)
    builder = _builder(flatbuffers)
    builder.Finish(written.Pack(builder), file_identifier=b"TFL3")
    with atomic_file(path) as file:
        file.write(builder.Output())


def _builder(flatbuffers: Any) -> Any:
    """Return a builder that writes equal arrays once: zero points take 8 bytes a channel."""

    class Builder(flatbuffers.Builder):
        def CreateNumpyVector(self, x: np.ndarray) -> int:
            key = (x.dtype.str, x.tobytes())
            if key not in written:
                written[key] = super().CreateNumpyVector(x)
            return written[key]

    written: dict[tuple[str, bytes], int] = {}
    return Builder(1024)


def _write(writer: Writer, op: Op, *tensors: Codes) -> Codes | None:
    return _WRITERS[op.kind](writer, op, *tensors)


def _check(model: IntegerModel) -> None:
    for op in model.ops:
        if op.kind.endswith("_onnx"):
            refuse(
                op,
                "it rounds as ONNX Runtime does, which LiteRT does not",
                'Convert again with convert(..., backend="tflite").',
            )
        if op.kind not in _WRITERS:
            what = "moves codes in a way" if op.kind == "move" else "is computed in float"
            refuse(
                op,
                f"it {what} that has no form in TFLite's integers",
                "Return its input from the model and compute the rest on the values, or use an "
                "operation that stays in integers.",
            )
        if op.arrays.get("kernel", np.zeros((), np.int8)).dtype != np.int8:
            refuse(
                op,
                "its kernel has more than the 8 bits of TFLite's weights",
                "Use SimQATConfig(weight=QuantSpec(num_bits=8)) or fewer bits.",
            )
        for i in (*op.inputs, *op.outputs):
            grid = model.tensors[i].grid
            if grid is not None and grid.dtype.itemsize > 1:
                bits = (grid.qmax - grid.qmin).bit_length()
                refuse(
                    op,
                    f"{model.tensors[i].name} has {bits} bits, and TFLite's activations 8",
                    "Use SimQATConfig(activation=QuantSpec(num_bits=8)) or fewer bits.",
                )
    for i in (*model.inputs, *model.outputs):
        if model.tensors[i].grid is None:
            raise ValueError(
                f"{model.tensors[i].name} is an input or output of the model that is not "
                "quantized, and TFLite's is on integers only. Compute with it outside."
            )


# Layers ------------------------------------------------------------------------------------------


def _conv(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    a, kernel = op.attributes, op.arrays["kernel"]
    if len(a["strides"]) > 2:
        refuse(op, "TFLite convolves over one or two axes in integers, not three", "Exclude it.")
    if any(d != 1 for d in a["input_dilation"]):
        refuse(
            op,
            f"TFLite has no convolution with input_dilation={tuple(a['input_dilation'])}",
            "Resize the input with jnp.repeat in front of a plain convolution.",
        )
    window = _Window(
        kernel.shape[:-2], a["strides"], a["padding"], a["kernel_dilation"], a["pad_mode"]
    )
    _convolution(w, op, x, y, kernel, op.arrays["scale"], a["groups"], window)


@dataclasses.dataclass(frozen=True)
class _Window:
    """What a convolution or pooling sees, along each spatial axis."""

    lengths: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[Sequence[int]]
    dilation: Sequence[int]
    mode: str = "constant"

    def planar(self) -> "_Window":
        """Add an axis of length 1 in front of a single one."""
        if len(self.lengths) == 2:
            return self
        return _Window(
            (1, *self.lengths),
            (1, *self.strides),
            ((0, 0), *self.padding),
            (1, *self.dilation),
            self.mode,
        )

    def is_same(self, sizes: Sequence[int]) -> bool:
        """Whether TFLite's padding SAME pads as much; a negative size is not known."""
        axes = zip(sizes, self.lengths, self.strides, self.padding, self.dilation, strict=True)
        return self.mode == "constant" and all(self._is_same(*axis) for axis in axes)

    @staticmethod
    def _is_same(size: int, length: int, stride: int, padding: Sequence[int], step: int) -> bool:
        if size < 0 and stride != 1:
            return False
        reach = (length - 1) * step + 1
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        return tuple(padding) == (total // 2, total - total // 2)


def _planar(w: Writer, x: Codes) -> Codes:
    """View (batch, length, channels) as (batch, 1, length, channels)."""
    return w.reshape(x, (x.shape[0], 1, *x.shape[1:])) if len(x.shape) == 3 else x


def _windowed(
    w: Writer,
    op: Op,
    x: Codes,
    y: Codes,
    window: _Window,
    emit: Callable[[Codes, Codes, dict[str, int]], None],
    pad: Callable[[Codes, Any], Codes],
) -> None:
    """Pad `x`, call `emit(x, y, options)` on tensors of rank 4, and bring `y` to its shape."""
    x, window, padding = _planar(w, x), window.planar(), w.schema.Padding
    target = y
    if len(y.shape) == 3:
        target = w.codes(f"{op.path}/planar", (y.shape[0], 1, *y.shape[1:]), y.grid)
    options = {"strideH": window.strides[0], "strideW": window.strides[1]}
    options["padding"] = padding.VALID
    if any(p for pads in window.padding for p in pads):
        if window.is_same(x.shape[1:3]):
            options["padding"] = padding.SAME
        else:
            x = pad(x, window)
    emit(x, target, options)
    if target is not y:
        w.reshape(target, y.shape, y)


def _convolution(
    w: Writer,
    op: Op,
    x: Codes,
    y: Codes,
    kernel: np.ndarray,
    scale: np.ndarray,
    groups: int,
    window: _Window,
) -> None:
    depthwise = groups > 1 and groups == x.shape[-1]
    kernel = kernel.reshape(*(1,) * (4 - kernel.ndim), *kernel.shape)
    name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"

    def emit(x: Codes, y: Codes, options: dict[str, int]) -> None:
        dilation = window.planar().dilation
        options |= {"dilationHFactor": dilation[0], "dilationWFactor": dilation[1]}
        if depthwise:
            options["depthMultiplier"] = kernel.shape[-1] // groups
            weights = w.weights(op, x, y, kernel.reshape(1, *kernel.shape[:2], -1), scale, 3)
        else:
            weights = w.weights(op, x, y, kernel.transpose(3, 0, 1, 2), scale, 0)
        w.clamped(op, name, [x.index, *weights], y, **options)

    def pad(x: Codes, window: _Window) -> Codes:
        if window.mode == "wrap":
            return _wrapped(w, op, x, window.padding)
        return _padded(w, op, x, [(0, 0), *window.padding, (0, 0)], window.mode)

    _windowed(w, op, x, y, window, emit, pad)


def _padded(
    w: Writer, op: Op, x: Codes, padding: Sequence[Sequence[int]], mode: str = "constant"
) -> Codes:
    _check_padding(op, x, padding, mode)
    y = w.codes(f"{op.path}/padded", _grown(x.shape, padding), x.grid)
    if mode == "reflect":
        options = {"mode": w.schema.MirrorPadMode.REFLECT}
        w.emit("MIRROR_PAD", [x.index, w.constant(padding)], y.index, **options)
    else:
        _pad_codes(w, x, padding, y)
    return y


def _grown(shape: Sequence[int], padding: Sequence[Sequence[int]]) -> tuple[int, ...]:
    pairs = zip(shape, map(sum, padding), strict=True)
    return tuple(d - p if d < 0 else d + p for d, p in pairs)


def _pad_codes(
    w: Writer, x: Codes, padding: Sequence[Sequence[int]], y: Codes, fill: Codes | None = None
) -> None:
    """Pad with zero or with another code.

    XNNPACK copies the last axis piece by piece. Where that is not padded, it and the one before it
    are padded as one: 17 instead of 479 us for 3 channels of 224 x 224.
    """
    name, filling = ("PAD", []) if fill is None else ("PADV2", [fill.index])
    if len(x.shape) < 3 or x.shape[-2] < 0 or any(padding[-1]) or not any(padding[-2]):
        w.emit(name, [x.index, w.constant(padding), *filling], y.index)
        return
    channels = x.shape[-1]
    joined = [*padding[:-2], [p * channels for p in padding[-2]]]
    flat = w.reshape(x, (*x.shape[:-2], x.shape[-2] * channels))
    padded = w.codes(f"{y.index}/padded", _grown(flat.shape, joined), x.grid)
    w.emit(name, [flat.index, w.constant(joined), *filling], padded.index)
    w.reshape(padded, y.shape, y)


def _check_padding(
    op: Op, x: Codes, padding: Sequence[Sequence[int]], mode: str = "constant"
) -> None:
    for size, pads in zip(x.shape, padding, strict=True):
        if min(pads) < 0 or (mode != "constant" and max(pads) >= abs(size)):
            refuse(
                op,
                f"TFLite cannot pad a length of {abs(size)} by {tuple(pads)} with {mode} padding",
                "Use less padding.",
            )


def _wrapped(w: Writer, op: Op, x: Codes, padding: Sequence[Sequence[int]]) -> Codes:
    """Pad with the values of the other end."""
    _check_padding(op, x, [(0, 0), *padding, (0, 0)], "wrap")
    for axis, (lo, hi) in enumerate(padding, 1):
        parts = [x]
        for length, end in ((lo, True), (hi, False)):
            if length:
                start, limit = [0] * 4, list[int | None]([None] * 4)
                start[axis], limit[axis] = (-length, None) if end else (0, length)
                shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
                part = w.codes(f"{op.path}/wrapped", shape, x.grid)
                w.strided_slice(x, start, limit, [1] * 4, part)
                parts.insert(0 if end else len(parts), part)
        if len(parts) > 1:
            grown = x.shape[axis] + (lo + hi) * (-1 if x.shape[axis] < 0 else 1)
            shape = (*x.shape[:axis], grown, *x.shape[axis + 1 :])
            x = w.codes(f"{op.path}/wrapped", shape, x.grid)
            w.emit("CONCATENATION", [p.index for p in parts], x.index, axis=axis)
    return x


def _dense(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    _fully_connected(w, op, x, y, op.arrays["kernel"].T, op.arrays["scale"])


def _fully_connected(
    w: Writer, op: Op, x: Codes, y: Codes, kernel: np.ndarray, scale: np.ndarray
) -> None:
    x = x if len(x.shape) > 1 else w.reshape(x, (1, *x.shape))
    flat = len(y.shape) == 1
    out = w.codes(f"{op.path}/row", (1, *y.shape), y.grid) if flat else y
    inputs = [x.index, *w.weights(op, x, y, kernel, scale, 0)]
    w.clamped(op, "FULLY_CONNECTED", inputs, out, keepNumDims=len(x.shape) > 2)
    if flat:
        w.reshape(out, y.shape, y)


def _affine(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    def planar(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 4:
            return shape
        lead = (1,) if len(shape) == 1 else shape[:1]
        return (*lead, 1, math.prod(shape[1:-1]), shape[-1])

    channels, scale = x.shape[-1], op.arrays["scale"]
    kernel = np.broadcast_to(op.arrays["kernel"], (channels,)).reshape(1, 1, 1, channels)
    window = _Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    source = w.reshape(x, planar(x.shape))
    out = y if len(y.shape) == 4 else w.codes(f"{op.path}/planar", planar(y.shape), y.grid)
    _convolution(w, op, source, out, kernel, np.broadcast_to(scale, (channels,)), channels, window)
    if out is not y:
        w.reshape(out, y.shape, y)


# Sums --------------------------------------------------------------------------------------------


def _sum(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    """Multiply by a column of ones: XNNPACK's MEAN does not round its ties as it does here."""
    axes = [a % len(x.shape) for a in op.attributes["axes"]]
    if any(x.shape[a] < 0 for a in axes):
        refuse(op, "it sums over the batch", "Sum outside of the model.")
    kept = [a for a in range(len(x.shape)) if a not in axes]
    count, order = math.prod(x.shape[a] for a in axes), [*kept, *axes]
    if order != sorted(order):
        moved = w.codes(f"{op.path}/moved", [x.shape[a] for a in order], x.grid)
        w.emit("TRANSPOSE", [x.index, w.constant(order)], moved.index)
        x = moved
    rows = list(x.shape[: len(kept)])
    weight, scale = _ones(op, x.grid, y.grid, count)
    sums = w.codes(f"{op.path}/sums", [*rows, 1], y.grid)
    kernel = np.full((1, count), weight)
    _fully_connected(w, op, w.reshape(x, [*rows, count]), sums, kernel, np.full(1, scale))
    w.reshape(sums, y.shape, y)


def _sum_pool(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    window, channels = _pooling(op, x), x.shape[-1]
    weight, scale = _ones(op, x.grid, y.grid, math.prod(window.lengths))
    kernel = np.full((*window.lengths, 1, channels), weight)
    _convolution(w, op, x, y, kernel, np.full(channels, scale), channels, window)


def _ones(op: Op, x: Grid, y: Grid, count: int) -> tuple[int, np.float32]:
    """Return a weight and its scale with which a layer adds up `count` codes exactly.

    Not every float32 is `f32(f32(s_x * s_w) / s_y)` for some `s_w`: another multiplier does where
    it rounds every sum that can occur to the same code.
    """
    multiplier = op.arrays["multiplier"].astype(np.float32)
    largest = count * max(x.zero_point - x.qmin, x.qmax - x.zero_point)
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
        "Sum over fewer elements, or exclude it.",
    )


# Elementwise -------------------------------------------------------------------------------------


def _add(w: Writer, op: Op, a: Codes, b: Codes, y: Codes) -> None:
    ratios = [np.float32(v.grid.scale) / np.float32(y.grid.scale) for v in (a, b)]
    w.check_ratio(op, ratios, 2.0**-10)
    name = "SUB" if op.attributes["multipliers"][1] < 0 else "ADD"
    w.clamped(op, name, [a.index, b.index], y)


def _mul(w: Writer, op: Op, a: Codes, b: Codes, y: Codes) -> None:
    w.check_ratio(op, op.arrays["multiplier"], 2.0**-16)
    w.clamped(op, "MUL", [a.index, b.index], y)


def _table(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    """Look codes up, by their bits as uint8: 0 to 127, then -128 to -1."""
    table = np.asarray(op.arrays["table"], np.int32) - y.grid.offset
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


def _clip(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    w.limit(x, stored_clamp(op, y.grid), y)


# Moves -------------------------------------------------------------------------------------------


def _pooling(op: Op, x: Codes) -> _Window:
    a, rank = op.attributes, len(x.shape)
    outer = [a[key][k] for key in ("window", "strides") for k in (0, -1)]
    if rank not in (3, 4) or outer != [1] * 4:
        refuse(op, "TFLite pools over one or two axes between batch and channels", "Move them.")
    inner = slice(1, -1)
    lengths, strides, padding = a["window"][inner], a["strides"][inner], a["padding"][inner]
    return _Window(lengths, strides, padding, (1,) * len(lengths))


def _max_pool(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    window = _pooling(op, x)

    def emit(x: Codes, y: Codes, options: dict[str, int]) -> None:
        lengths = window.planar().lengths
        options |= {"filterHeight": lengths[0], "filterWidth": lengths[1]}
        w.emit("MAX_POOL_2D", [x.index], y.index, **options)

    def pad(x: Codes, window: _Window) -> Codes:
        padding = [(0, 0), *window.padding, (0, 0)]
        y = w.codes(f"{op.path}/padded", _grown(x.shape, padding), x.grid)
        # XNNPACK pads with zero alone, which behind a ReLU is the lowest code.
        lowest = w.code_constant(x.grid.offset - 128, x.grid) if x.grid.stored_zero > -128 else None
        _pad_codes(w, x, padding, y, lowest)
        return y

    _windowed(w, op, x, y, window, emit, pad)


def _reduce(name: str) -> Callable[..., None]:
    def write(w: Writer, op: Op, x: Codes, y: Codes) -> None:
        w.emit(name, [x.index, w.constant(op.attributes["axes"])], y.index, keepDims=False)

    return write


def _concat(w: Writer, op: Op, *tensors: Codes) -> None:
    *xs, y = tensors
    w.emit("CONCATENATION", [x.index for x in xs], y.index, axis=op.attributes["axis"])


def _reshape(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    if sum(d < 0 for d in y.shape) > 1:
        refuse(op, "more than one of its lengths depends on the batch size", "Reshape to others.")
    w.reshape(x, y.shape, y)


def _transpose(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    w.emit("TRANSPOSE", [x.index, w.constant(op.attributes["permutation"])], y.index)


def _broadcast(w: Writer, op: Op, x: Codes, y: Codes) -> Codes | None:
    dims = dict(zip(op.attributes["dimensions"], x.shape, strict=True))
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
        op.kind in ("add", "mul")
        and bool(others)
        and all(i in w.values and w.values[i].shape == y.shape for i in others)
    )


def _slice(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    a = op.attributes
    limit = [None if b == d else b for b, d in zip(a["limit"], x.shape, strict=True)]
    if any(b is not None and b < 0 for b in limit):
        refuse(op, "it cuts the batch at a fraction of it", "Cut it outside of the model.")
    w.strided_slice(x, a["start"], limit, a["strides"], y)


def _reverse(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    *inner, last = op.attributes["axes"]
    for axis in inner:
        flipped = w.codes(f"{op.path}/reversed", x.shape, x.grid)
        w.emit("REVERSE_V2", [x.index, w.constant([axis])], flipped.index)
        x = flipped
    w.emit("REVERSE_V2", [x.index, w.constant([last])], y.index)


def _take(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    axis, indices = op.attributes["axis"], w.constant(op.attributes["indices"])
    w.emit("GATHER", [x.index, indices], y.index, axis=axis, batchDims=0)


def _pad(w: Writer, op: Op, x: Codes, y: Codes) -> None:
    padding = [(lo, hi) for lo, hi, _ in op.attributes["padding"]]
    _check_padding(op, x, padding)
    if any(inner for *_, inner in op.attributes["padding"]):
        refuse(op, "TFLite does not pad between elements", "Do it outside of the model.")
    _pad_codes(w, x, padding, y)


_WRITERS: dict[str, Callable[..., Codes | None]] = {
    "conv": _conv,
    "dense": _dense,
    "affine": _affine,
    "add": _add,
    "mul": _mul,
    "sum": _sum,
    "sum_pool": _sum_pool,
    "max_pool": _max_pool,
    "max": _reduce("REDUCE_MAX"),
    "min": _reduce("REDUCE_MIN"),
    "table": _table,
    "clip": _clip,
    "concat": _concat,
    "reshape": _reshape,
    "transpose": _transpose,
    "broadcast": _broadcast,
    "slice": _slice,
    "reverse": _reverse,
    "take": _take,
    "pad": _pad,
}
