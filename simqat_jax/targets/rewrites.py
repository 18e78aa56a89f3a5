"""The same codes from operations that runtimes compute faster where channels are few.

Integer kernels work on the channels of one pixel at a time, and few bytes fill no vector.

Convolutions: a block of neighbouring columns is therefore taken as channels, in the input and in
the output: the bytes stay where they are, only the view changes. The kernel is repeated for every
column of an output block, each at its place, with zeros around it. All sums stay as they were.

Max pooling: rows are pooled first, with all columns of a row as channels, then columns. Reshapes
that follow each other are one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.ops.moves import MaxPool, Pad, Reshape
from simqat_jax.ops.products import Conv


def in_width_blocks(program: Program, columns: Mapping[int, Sequence[int]]) -> Program:
    """Return a program with the same codes whose convolutions of few channels work on blocks.

    Args:
      program: the program, which stays as it is.
      columns: for numbers of input channels, how many columns of the input make a block: the first
        number with which blocks fit.
    """
    return rewritten(program, lambda op, tensors: _blocked(op, tensors, columns))


def pooling_rows_first(program: Program, channels: int) -> Program:
    """Return a program with the same codes that pools rows first where there are few channels.

    Args:
      program: the program, which stays as it is.
      channels: from how many channels on nothing changes.
    """
    return rewritten(program, lambda op, tensors: _rows_first(op, tensors, channels))


def reshaping_once(program: Program) -> Program:
    """Return a program with the same codes that reshapes nothing it has just reshaped.

    Args:
      program: the program, which stays as it is.
    """
    before = {op.outputs[0]: op.inputs[0] for op in program.ops if isinstance(op, Reshape)}

    def straight(op: Op) -> Op:
        source = op.inputs[0] if isinstance(op, Reshape) else None
        if source not in before:
            return op
        while source in before:
            source = before[source]
        return dataclasses.replace(op, inputs=(source,))

    ops = list(map(straight, program.ops))
    read = {*program.outputs, *(i for op in ops for i in op.inputs)}
    kept = (op for op in ops if not isinstance(op, Reshape) or op.outputs[0] in read)
    return dataclasses.replace(program, ops=tuple(kept))


def rewritten(program: Program, rewrite: Callable[[Op, list[Tensor]], list[Op] | None]) -> Program:
    """Replace operations; `rewrite` appends the tensors between new ones, or returns None."""
    tensors, ops = list(program.tensors), []
    for op in program.ops:
        ops += rewrite(op, tensors) or [op]
    return dataclasses.replace(program, tensors=tuple(tensors), ops=tuple(ops))


def between(op: Op, name: str, shape: Sequence[int], like: Tensor, tensors: list[Tensor]) -> int:
    """Append a tensor between two operations; return its number.

    Args:
      op: the operation that they replace.
      name: of the tensor, behind that of the operation.
      shape: behind the axis of the batch.
      like: a tensor of the same grid and batch.
      tensors: those of the program.
    """
    tensors.append(Tensor(f"{op.path}/{name}", (like.shape[0], *shape), like.dtype, like.grid))
    return len(tensors) - 1


def _rows_first(op: Op, tensors: list[Tensor], most: int) -> list[Op] | None:
    if not isinstance(op, MaxPool) or len(op.window) != 4:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    _, height, width, channels = x.shape
    lengths = op.window
    if min(height, width) < 0:
        return None
    if channels >= most or lengths[0] != 1 or lengths[3] != 1 or min(lengths[1:3]) == 1:
        return None

    def along(axis: int, source: int, target: int) -> MaxPool:
        axes = range(4)
        return dataclasses.replace(
            op,
            inputs=(source,),
            outputs=(target,),
            window=tuple(op.window[k] if k == axis else 1 for k in axes),
            strides=tuple(op.strides[k] if k == axis else 1 for k in axes),
            padding=tuple(op.padding[k] if k == axis else (0, 0) for k in axes),
        )

    wide = between(op, "rows", (height, 1, width * channels), x, tensors)
    pooled = between(op, "pooled", (y.shape[1], 1, width * channels), x, tensors)
    columns = between(op, "columns", (y.shape[1], width, channels), x, tensors)
    return [
        Reshape(path=op.path, inputs=op.inputs, outputs=(wide,)),
        along(1, wide, pooled),
        Reshape(path=op.path, inputs=(pooled,), outputs=(columns,)),
        along(2, columns, op.outputs[0]),
    ]


class _Fit(NamedTuple):
    """How blocks of columns fit a convolution.

    Attributes:
      block: columns of an input block.
      together: of an output block.
      reach: of how many input blocks an output block is made.
      blocks: how many input blocks there are.
    """

    block: int
    together: int
    reach: int
    blocks: int


def _fit(block: int, stride: int, taps: int, outputs: int) -> _Fit | None:
    """Return how blocks fit a convolution of so many taps and output columns; None: not."""
    together = block // stride
    if not together or block % stride or outputs % together:
        return None
    reach = math.ceil((block - stride + taps) / block)
    return _Fit(block, together, reach, outputs // together + reach - 1)


def _blocked(
    op: Op, tensors: list[Tensor], columns: Mapping[int, Sequence[int]]
) -> list[Op] | None:
    if not isinstance(op, Conv) or len(op.strides) != 2:
        return None
    if {op.groups, *op.kernel_dilation, *op.input_dilation} != {1}:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    _, height, width, channels = x.shape
    _, rows, outputs, features = y.shape
    if min(height, width, rows, outputs) < 0:
        return None
    old, stride, (vertical, (left, _)) = op.arrays["kernel"], op.strides[1], op.padding
    if min(left, *vertical) < 0:
        return None
    fitting = (_fit(b, stride, old.shape[1], outputs) for b in columns.get(channels, ()))
    fit = next((f for f in fitting if f and f.blocks * f.block >= width + left), None)
    if fit is None:
        return None
    block, together, reach, count = fit
    right = count * block - width - left

    ops, source = [], op.inputs[0]
    if left or right:
        height += sum(vertical)
        padded = between(op, "padded", (height, count * block, channels), x, tensors)
        padding = ((0, 0, 0), (*vertical, 0), (left, right, 0), (0, 0, 0))
        ops.append(Pad(path=op.path, inputs=(source,), outputs=(padded,), padding=padding))
        source, vertical = padded, (0, 0)
    kernel = np.zeros((len(old), reach * block, channels, together, features), old.dtype)
    for k in range(together):
        kernel[:, k * stride : k * stride + old.shape[1], :, k] = old
    arrays = {
        name: np.tile(np.broadcast_to(value, features), together)
        for name, value in op.arrays.items()
        if name != "kernel"
    }
    arrays["kernel"] = kernel.reshape(len(old), reach, block * channels, together * features)
    blocks = between(op, "blocks", (height, count, block * channels), x, tensors)
    results = between(op, "results", (rows, outputs // together, together * features), y, tensors)
    blocked = dataclasses.replace(
        op,
        inputs=(blocks,),
        outputs=(results,),
        arrays=arrays,
        strides=(op.strides[0], 1),
        padding=(vertical, (0, 0)),
    )
    return [
        *ops,
        Reshape(path=op.path, inputs=(source,), outputs=(blocks,)),
        blocked,
        Reshape(path=op.path, inputs=(results,), outputs=op.outputs),
    ]
