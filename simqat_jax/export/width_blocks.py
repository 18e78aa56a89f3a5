"""The same codes from operations that runtimes compute faster where channels are few.

Integer kernels work on the channels of one pixel at a time, and few bytes fill no vector.

Convolutions: a block
of neighbouring columns is therefore taken as channels, in the input and in the output: the bytes
stay where they are, only the view changes. The kernel is repeated for every column of an output
block, each at its place, with zeros around it. All sums stay as they were.

Max pooling: rows are pooled first, with all columns of a row as channels, then columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Op, Tensor


def in_width_blocks(model: IntegerModel, columns: Mapping[int, int]) -> IntegerModel:
    """Return a model with the same codes whose convolutions of few channels work on blocks.

    Args:
      model: the model, which stays as it is.
      columns: for numbers of input channels, how many columns of the input make a block.
    """
    return _rewritten(model, lambda op, tensors: _blocked(op, tensors, columns))


def pooling_rows_first(model: IntegerModel, channels: int) -> IntegerModel:
    """Return a model with the same codes that pools rows first where there are few channels.

    Args:
      model: the model, which stays as it is.
      channels: from how many channels on nothing changes.
    """
    return _rewritten(model, lambda op, tensors: _rows_first(op, tensors, channels))


def _rewritten(
    model: IntegerModel, rewrite: Callable[[Op, list[Tensor]], list[Op] | None]
) -> IntegerModel:
    """Replace operations; `rewrite` appends the tensors between new ones, or returns None."""
    tensors, ops = list(model.tensors), []
    for op in model.ops:
        ops += rewrite(op, tensors) or [op]
    return IntegerModel(
        tensors, ops, model.inputs, model.outputs, model.structure, model.backend, model.metadata
    )


def _between(op: Op, name: str, shape: Sequence[int], like: Tensor, tensors: list[Tensor]) -> int:
    tensors.append(Tensor(f"{op.path}/{name}", (like.shape[0], *shape), like.dtype, like.grid))
    return len(tensors) - 1


def _rows_first(op: Op, tensors: list[Tensor], most: int) -> list[Op] | None:
    if op.kind != "max_pool" or len(op.attributes["window"]) != 4:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    _, height, width, channels = x.shape
    lengths = op.attributes["window"]
    if min(height, width) < 0:
        return None
    if channels >= most or lengths[0] != 1 or lengths[3] != 1 or min(lengths[1:3]) == 1:
        return None
    nothing = {"window": 1, "strides": 1, "padding": (0, 0)}

    def along(axis: int) -> dict[str, Any]:
        return op.attributes | {
            key: tuple(v if k == axis else none for k, v in enumerate(op.attributes[key]))
            for key, none in nothing.items()
        }

    wide = _between(op, "rows", (height, 1, width * channels), x, tensors)
    pooled = _between(op, "pooled", (y.shape[1], 1, width * channels), x, tensors)
    columns = _between(op, "columns", (y.shape[1], width, channels), x, tensors)
    return [
        Op("reshape", op.path, op.inputs, (wide,)),
        Op("max_pool", op.path, (wide,), (pooled,), along(1)),
        Op("reshape", op.path, (pooled,), (columns,)),
        Op("max_pool", op.path, (columns,), op.outputs, along(2)),
    ]


def _blocked(op: Op, tensors: list[Tensor], columns: Mapping[int, int]) -> list[Op] | None:
    a = op.attributes
    if op.kind != "conv" or len(a["strides"]) != 2 or a["pad_mode"] != "constant":
        return None
    if {a["groups"], *a["kernel_dilation"], *a["input_dilation"]} != {1}:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    _, height, width, channels = x.shape
    _, rows, outputs, features = y.shape
    if min(height, width, rows, outputs) < 0:
        return None
    old, stride = op.arrays["kernel"], a["strides"][1]
    block = columns.get(channels, 0)
    together = block // stride  # columns of an output block
    if not together or block % stride or outputs % together:
        return None
    reach = math.ceil((block - stride + old.shape[1]) / block)  # input blocks of an output block
    count = outputs // together + reach - 1
    vertical, (left, _) = a["padding"]
    right = count * block - width - left
    if min(left, right, *vertical) < 0:
        return None

    ops, source = [], op.inputs[0]
    if left or right:
        height += sum(vertical)
        padded = _between(op, "padded", (height, count * block, channels), x, tensors)
        padding = ((0, 0, 0), (*vertical, 0), (left, right, 0), (0, 0, 0))
        ops.append(Op("pad", op.path, (source,), (padded,), {"padding": padding}))
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
    attributes = a | {"strides": (a["strides"][0], 1), "padding": (vertical, (0, 0))}
    blocks = _between(op, "blocks", (height, count, block * channels), x, tensors)
    results = _between(op, "results", (rows, outputs // together, together * features), y, tensors)
    return [
        *ops,
        Op("reshape", op.path, (source,), (blocks,)),
        Op("conv", op.path, (blocks,), (results,), attributes, arrays),
        Op("reshape", op.path, (results,), op.outputs),
    ]
