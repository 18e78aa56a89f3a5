"""Transposed convolutions as ordinary ones, with the same codes: no runtime multiplies zeros.

A transposed convolution slides its kernel over an input with `d - 1` zeros between its elements:
most of its products are with zero. Positions of the output that are `d` apart (where the stride is
1) see the same taps of the kernel, on other elements: they are one phase. One convolution of the
input itself computes a block of neighbouring positions, one of each phase, as channels; then these
move to their places. Its kernel holds the taps by phase, and zeros where a phase has none.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from simqat_jax.ir.program import Op, Program, Shape, Tensor, at_batch, joined
from simqat_jax.ir.program_builder import BATCH
from simqat_jax.ops.moves import Reshape, Slice, Transpose
from simqat_jax.ops.products import Conv
from simqat_jax.targets.rewrites import between, rewritten


def in_subpixels(program: Program) -> Program:
    """Return a program with the same codes and no convolution of an input with zeros in between."""
    return rewritten(program, _subpixels)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A spatial axis of the new convolution.

    Attributes:
      taps: for each tap of the new kernel and each phase the old tap, -1: a zero.
      stride: from one block to the next, in elements of the input.
      dilation: of the new kernel.
      padding: of the input.
      blocks: how many are computed.
      skipped: how many positions at the front of the first block are none of the output.
    """

    taps: np.ndarray
    stride: int
    dilation: int
    padding: tuple[int, int]
    blocks: int
    skipped: int

    @property
    def phases(self) -> int:
        """How many positions of the output make a block."""
        return self.taps.shape[1]

    @property
    def cost(self) -> int:
        """Products of one input and one output channel."""
        return self.taps.size * self.blocks


def _axis(op: Conv, axis: int, size: int, positions: int) -> _Axis:
    """Return the cheapest form of an axis: where the first block starts decides what taps share.

    Args:
      op: the convolution.
      axis: which of its spatial axes.
      size: elements of the input.
      positions: of the output.
    """
    phases = op.input_dilation[axis] // math.gcd(op.input_dilation[axis], op.strides[axis])
    forms = [_form(op, axis, size, positions, phases, skipped) for skipped in range(phases)]
    if size % BATCH == 0:  # the lengths of a batch size that is free
        forms = [form for form in forms if form.blocks % BATCH == 0]
    return min(forms, key=lambda form: form.cost)


def _form(op: Conv, axis: int, size: int, positions: int, phases: int, skipped: int) -> _Axis:
    stride, zeros, step = op.strides[axis], op.input_dilation[axis], op.kernel_dilation[axis]
    (before, _), length = op.padding[axis], op.arrays["kernel"].shape[axis]
    offsets = {}
    for tap, phase in itertools.product(range(length), range(phases)):
        place, inside = divmod((phase - skipped) * stride + tap * step - before, zeros)
        if not inside:  # the element of the input that this tap sees, for the first block
            offsets[tap, phase] = place
    # What padding would have to cut off, the kernel skips with zeros.
    first, last = min([0, *offsets.values()]), max([0, *offsets.values()])
    dilation = math.gcd(last - first, *(place - first for place in offsets.values())) or 1
    taps = np.full(((last - first) // dilation + 1, phases), -1)
    for (tap, phase), place in offsets.items():
        taps[(place - first) // dilation, phase] = tap
    needed, stride = -(-(positions + skipped) // phases), phases * stride // zeros
    after = max((needed - 1) * stride + last - size + 1, 0)
    blocks = (size - 1 - last + after) // stride + 1
    return _Axis(taps, stride, dilation, (-first, after), blocks, skipped)


def _subpixels(op: Op, tensors: list[Tensor]) -> list[Op] | None:
    if not isinstance(op, Conv) or set(op.input_dilation) == {1}:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    sizes, positions = (at_batch(shape[1:-1], BATCH) for shape in (x.shape, y.shape))
    lengths = enumerate(zip(sizes, positions, strict=True))
    axes = [_axis(op, k, size, count) for k, (size, count) in lengths]
    blocks, phases = _dims(a.blocks for a in axes), [a.phases for a in axes]
    features = op.arrays["kernel"].shape[-1]
    results = between(op, "blocks", (*blocks, math.prod(phases) * features), y, tensors)
    conv = dataclasses.replace(
        op,
        outputs=(results,),
        arrays=_sorted_by_phase(op, axes),
        strides=tuple(a.stride for a in axes),
        padding=tuple(a.padding for a in axes),
        input_dilation=(1,) * len(axes),
        kernel_dilation=tuple(a.dilation for a in axes),
    )
    whole = _dims(a.blocks * a.phases for a in axes)
    start = [a.skipped for a in axes]
    cut = whole != list(y.shape[1:-1])
    target = between(op, "whole", (*whole, features), y, tensors) if cut else op.outputs[0]
    ops = [conv, *_interleaved(op, results, target, tensors, (blocks, phases, features))]
    if cut:
        limit = _dims(a + b for a, b in zip(start, positions, strict=True))
        ops.append(
            Slice(
                path=op.path,
                inputs=(target,),
                outputs=op.outputs,
                start=(0, *start, 0),
                limit=(y.shape[0], *limit, features),
                strides=(1,) * len(y.shape),
            )
        )
    return ops


def _dims(lengths: Iterable[int]) -> list[int]:
    """Write multiples of the batch size as negative numbers."""
    return [-(n // BATCH) if n % BATCH == 0 else n for n in lengths]


def _sorted_by_phase(op: Conv, axes: Sequence[_Axis]) -> dict[str, np.ndarray]:
    """Return the arrays of the new convolution; its channels: (groups, phases ..., features)."""
    old, count = op.arrays["kernel"], len(axes)
    kernel = old.reshape(*old.shape[:-1], op.groups, -1)
    for k, axis in enumerate(axes):
        at = 2 * k  # taps and phases of the axes before it are in front of it
        none = np.zeros_like(kernel.take([0], at))
        kernel = np.concatenate([kernel, none], at).take(axis.taps, at)
    order = [*range(0, 2 * count, 2), 2 * count, 2 * count + 1, *range(1, 2 * count, 2), -1]
    kernel = kernel.transpose([a % kernel.ndim for a in order])
    phases = [a.phases for a in axes]

    def each_phase(value: np.ndarray) -> np.ndarray:
        channels = np.broadcast_to(value, old.shape[-1:]).reshape(op.groups, *(1,) * count, -1)
        return np.broadcast_to(channels, (op.groups, *phases, channels.shape[-1])).ravel()

    arrays = {name: each_phase(value) for name, value in op.arrays.items() if name != "kernel"}
    taps = [len(a.taps) for a in axes]
    return arrays | {"kernel": kernel.reshape(*taps, old.shape[-2], -1)}


def _interleaved(
    op: Conv,
    source: int,
    target: int,
    tensors: list[Tensor],
    lengths: tuple[list[int], list[int], int],
) -> list[Op]:
    """Move the phases of each block from the channels to their positions."""
    blocks, phases, features = lengths
    count, batch = len(blocks), tensors[source].shape[0]
    shape = (batch, *blocks, op.groups, *phases, features // op.groups)
    places = itertools.chain(*((1 + k, 2 + count + k) for k in range(count)))
    order = (0, *places, 1 + count, len(shape) - 1)
    shape, order = _without_neighbours(shape, order)
    ops, at = [], source
    if order != tuple(range(len(order))):
        split = _added(op, "split", shape, tensors, source)
        moved = _added(op, "moved", tuple(shape[a] for a in order), tensors, source)
        ops.append(Reshape(path=op.path, inputs=(source,), outputs=(split,)))
        ops.append(Transpose(path=op.path, inputs=(split,), outputs=(moved,), permutation=order))
        at = moved
    return [*ops, Reshape(path=op.path, inputs=(at,), outputs=(target,))]


def _without_neighbours(shape: Shape, order: Sequence[int]) -> tuple[Shape, tuple[int, ...]]:
    """Return a transposition without axes of length 1, neighbours that stay together as one axis.

    Args:
      shape: -k stands for k times the batch size.
      order: of its axes.
    """
    kept = [a for a in order if shape[a] != 1]
    groups: list[list[int]] = []
    for a in kept:
        inner = groups and all(shape[b] == 1 for b in range(groups[-1][-1] + 1, a))
        if inner and a > groups[-1][-1]:
            groups[-1].append(a)
        else:
            groups.append([a])
    lengths = [joined([shape[a] for a in group]) for group in groups]
    rank = sorted(range(len(groups)), key=lambda g: groups[g])
    return tuple(lengths[g] for g in rank), tuple(map(rank.index, range(len(groups))))


def _added(op: Op, name: str, shape: Shape, tensors: list[Tensor], like: int) -> int:
    tensors.append(dataclasses.replace(tensors[like], name=f"{op.path}/{name}", shape=shape))
    return len(tensors) - 1
