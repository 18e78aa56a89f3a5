"""Write layers, on int8 codes: products of data and a kernel, and BatchNorms of their own."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from simqat_jax.ir.program import Op
from simqat_jax.ops.batch_norm import Affine
from simqat_jax.ops.products import Conv, Dense
from simqat_jax.ops.sums import SumOver
from simqat_jax.targets.refusals import OTHER_FILE, refuse
from simqat_jax.targets.tflite.subgraph import Codes, is_packed
from simqat_jax.targets.tflite.windows import Window, padded, windowed
from simqat_jax.targets.tflite.writer import Writer


def conv(w: Writer, op: Conv, x: Codes, y: Codes) -> None:
    """Write a convolution; a packed one of single positions is a matrix product."""
    kernel = op.arrays["kernel"]
    if len(op.strides) > 2:
        refuse(op, "TFLite convolves over one or two axes in integers, not three", OTHER_FILE)
    assert set(op.input_dilation) == {1}, op.path  # `in_subpixels` leaves no other
    rows = kernel.reshape(-1, kernel.shape[-1]).T
    if _is_pointwise(op) and is_packed(x.grid, rows, op.arrays["bias"]):
        fully_connected(w, op, x, y, rows, op.arrays["scale"])
        return
    window = Window(kernel.shape[:-2], op.strides, op.padding, op.kernel_dilation)
    convolution(w, op, x, y, kernel, op.arrays["scale"], op.groups, window, op.clamp)


def _is_pointwise(op: Conv) -> bool:
    """Whether it multiplies the channels of each position by one matrix."""
    spatial = op.arrays["kernel"].shape[:-2]
    padded = any(p for pads in op.padding for p in pads)
    return {*spatial, *op.strides, op.groups} == {1} and not padded


def dense(w: Writer, op: Dense, x: Codes, y: Codes) -> None:
    """Write a matrix product with a kernel."""
    fully_connected(w, op, x, y, op.arrays["kernel"].T, op.arrays["scale"])


def fully_connected(
    w: Writer, op: Dense | Conv | SumOver, x: Codes, y: Codes, kernel: np.ndarray, scale: np.ndarray
) -> None:
    """Write the product of the last axis with a kernel (out, in)."""
    x = x if len(x.shape) > 1 else w.reshape(x, (1, *x.shape))
    flat = len(y.shape) == 1
    out = w.codes(f"{op.path}/row", (1, *y.shape), y.grid) if flat else y
    inputs = [x.index, *w.weights(op, x, y, kernel, scale, 0)]
    w.clamped(op, "FULLY_CONNECTED", inputs, out, op.clamp, keepNumDims=len(x.shape) > 2)
    if flat:
        w.reshape(out, y.shape, y)


def affine(w: Writer, op: Affine, x: Codes, y: Codes) -> None:
    """Write a BatchNorm of its own: a depthwise convolution."""

    def planar(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 4:
            return shape
        lead = (1,) if len(shape) == 1 else shape[:1]
        return (*lead, 1, math.prod(shape[1:-1]), shape[-1])

    channels, scale = x.shape[-1], op.arrays["scale"]
    kernel = np.broadcast_to(op.arrays["kernel"], (channels,)).reshape(1, 1, 1, channels)
    window = Window((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))
    source = w.reshape(x, planar(x.shape))
    out = y if len(y.shape) == 4 else w.codes(f"{op.path}/planar", planar(y.shape), y.grid)
    scales = np.broadcast_to(scale, (channels,))
    convolution(w, op, source, out, kernel, scales, channels, window, op.clamp)
    if out is not y:
        w.reshape(out, y.shape, y)


def convolution(
    w: Writer,
    op: Op,
    x: Codes,
    y: Codes,
    kernel: np.ndarray,
    scale: np.ndarray,
    groups: int,
    window: Window,
    clamp: Sequence[int],
) -> None:
    """Write a convolution with a kernel (spatial ..., in, out)."""
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
        w.clamped(op, name, [x.index, *weights], y, clamp, **options)

    windowed(w, op, x, y, window, emit, functools.partial(padded, w, op))
