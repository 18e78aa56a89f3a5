"""Convolutions and poolings: windows, and the padding that TFLite does not do by itself."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from simqat_jax.ir.program import Op
from simqat_jax.targets.refusals import OTHER_FILE, refuse
from simqat_jax.targets.tflite.subgraph import Codes
from simqat_jax.targets.tflite.writer import Writer


@dataclasses.dataclass(frozen=True)
class Window:
    """What a convolution or pooling sees, along each spatial axis."""

    lengths: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[Sequence[int]]
    dilation: Sequence[int]

    def planar(self) -> "Window":
        """Add an axis of length 1 in front of a single one."""
        if len(self.lengths) == 2:
            return self
        return Window(
            (1, *self.lengths),
            (1, *self.strides),
            ((0, 0), *self.padding),
            (1, *self.dilation),
        )

    def is_same(self, sizes: Sequence[int]) -> bool:
        """Whether TFLite's padding SAME pads as much; a negative size is not known."""
        axes = zip(sizes, self.lengths, self.strides, self.padding, self.dilation, strict=True)
        return all(self._is_same(*axis) for axis in axes)

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


def windowed(
    w: Writer,
    op: Op,
    x: Codes,
    y: Codes,
    window: Window,
    emit: Callable[[Codes, Codes, dict[str, int]], None],
    pad: Callable[[Codes, Window], Codes],
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


def in_regions(
    w: Writer,
    op: Op,
    x: Codes,
    y: Codes,
    window: Window,
    multipliers: np.ndarray,
    emit: Callable[[Codes, Codes, Window, np.ndarray], None],
) -> None:
    """Pool where sums have a multiplier for each position, region by region of one multiplier.

    Average pooling that does not count padding has one inside, and others at edges and corners.

    Args:
      w: the writer.
      op: the operation.
      x: its input.
      y: its output.
      window: what it sees along each spatial axis.
      multipliers: `(1, rows, columns, 1)`, or with one spatial axis.
      emit: pools one region with one multiplier.
    """
    if multipliers.shape[0] != 1 or multipliers.shape[-1] != 1:
        refuse(op, "it divides by other numbers in each channel or example", OTHER_FILE)
    multipliers = np.broadcast_to(multipliers, (1, *y.shape[1:-1], 1))
    cuts = [_runs(multipliers, axis) for axis in range(1, multipliers.ndim - 1)]

    def region(bounds: Sequence[tuple[int, int]], out: Codes | None) -> Codes:
        start, limit, padding = [0] * len(x.shape), list[int | None]([None] * len(x.shape)), []
        for axis, (first, last) in enumerate(bounds):
            stride, (before, _) = window.strides[axis], window.padding[axis]
            lo, size = first * stride - before, x.shape[axis + 1]
            hi = (last - 1) * stride - before + window.lengths[axis]
            start[axis + 1], limit[axis + 1] = max(lo, 0), min(hi, size)
            padding.append((max(-lo, 0), max(hi - size, 0)))
        lengths = [b - a for a, b in zip(start[1:-1], limit[1:-1], strict=True) if b is not None]
        part = w.codes(f"{op.path}/region", (x.shape[0], *lengths, x.shape[-1]), x.grid)
        w.strided_slice(x, start, limit, [1] * len(x.shape), part)
        shape = (y.shape[0], *(b - a for a, b in bounds), y.shape[-1])
        out = out or w.codes(f"{op.path}/pooled", shape, y.grid)
        at = (0, *(a for a, _ in bounds), 0)
        emit(part, out, dataclasses.replace(window, padding=padding), multipliers[at])
        return out

    def joined(bounds: Sequence[tuple[int, int]], out: Codes | None) -> Codes:
        axis = len(bounds)
        if axis == len(cuts):
            return region(bounds, out)
        only = len(cuts[axis]) == 1
        parts = [joined([*bounds, cut], out if only else None) for cut in cuts[axis]]
        if only:
            return parts[0]
        length = sum(part.shape[axis + 1] for part in parts)
        shape = (*parts[0].shape[: axis + 1], length, *parts[0].shape[axis + 2 :])
        out = out or w.codes(f"{op.path}/joined", shape, y.grid)
        w.emit("CONCATENATION", [part.index for part in parts], out.index, axis=axis + 1)
        return out

    joined([], y)


def _runs(values: np.ndarray, axis: int) -> list[tuple[int, int]]:
    """Return where values stay the same along an axis: `(first, last + 1)`."""
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    changes = [k for k in range(1, len(rows)) if not np.array_equal(rows[k], rows[k - 1])]
    return list(zip([0, *changes], [*changes, len(rows)], strict=True))


def padded(w: Writer, op: Op, x: Codes, window: Window) -> Codes:
    """Pad as a convolution does."""
    padding = [(0, 0), *window.padding, (0, 0)]
    check_padding(op, x, padding)
    y = w.codes(f"{op.path}/padded", grown(x.shape, padding), x.grid)
    pad_codes(w, x, padding, y)
    return y


def grown(shape: Sequence[int], padding: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return a shape with padding; -k stands for k times the batch size."""
    pairs = zip(shape, map(sum, padding), strict=True)
    return tuple(d - p if d < 0 else d + p for d, p in pairs)


def pad_codes(
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
    padded = w.codes(f"{y.index}/padded", grown(flat.shape, joined), x.grid)
    w.emit(name, [flat.index, w.constant(joined), *filling], padded.index)
    w.reshape(padded, y.shape, y)


def check_padding(op: Op, x: Codes, padding: Sequence[Sequence[int]]) -> None:
    """Refuse negative padding."""
    for size, pads in zip(x.shape, padding, strict=True):
        if min(pads) < 0:
            refuse(op, f"TFLite cannot pad a length of {abs(size)} by {tuple(pads)}", OTHER_FILE)
