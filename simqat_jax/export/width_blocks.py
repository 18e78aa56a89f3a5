"""Convolve blocks of columns at once: what runtimes need to be fast on images of few channels.

Integer kernels gather the channels of one pixel at a time, and 1 to 3 bytes fill no vector. A block
of neighbouring columns is therefore taken as channels, in the input and in the output: the bytes
stay where they are, only the view changes. The kernel is repeated for every column of an output
block, each at its place, with zeros around it. All sums stay as they were.
"""

import math
from collections.abc import Mapping

import numpy as np

from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Op, Tensor


def in_width_blocks(model: IntegerModel, columns: Mapping[int, int]) -> IntegerModel:
    """Return a model with the same codes whose convolutions of few channels work on blocks.

    Args:
      model: the model, which stays as it is.
      columns: for numbers of input channels, how many columns of the input make a block.
    """
    tensors, ops = list(model.tensors), []
    for op in model.ops:
        ops += _blocked(op, tensors, columns) or [op]
    return IntegerModel(
        tensors, ops, model.inputs, model.outputs, model.structure, model.backend, model.metadata
    )


def _blocked(op: Op, tensors: list[Tensor], columns: Mapping[int, int]) -> list[Op] | None:
    """Append the tensors in between; return the operations, None where it cannot be done."""
    a = op.attributes
    if op.kind != "conv" or len(a["strides"]) != 2 or a["pad_mode"] != "constant":
        return None
    if {a["groups"], *a["kernel_dilation"], *a["input_dilation"]} != {1}:
        return None
    x, y = tensors[op.inputs[0]], tensors[op.outputs[0]]
    batch, height, width, channels = x.shape
    _, rows, outputs, features = y.shape
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

    def tensor(name: str, shape: tuple[int, ...], like: Tensor) -> int:
        tensors.append(Tensor(f"{op.path}/{name}", (batch, *shape), like.dtype, like.grid))
        return len(tensors) - 1

    ops, source = [], op.inputs[0]
    if left or right:
        height += sum(vertical)
        padded = tensor("padded", (height, count * block, channels), x)
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
    blocks = tensor("blocks", (height, count, block * channels), x)
    results = tensor("results", (rows, outputs // together, together * features), y)
    return [
        *ops,
        Op("reshape", op.path, (source,), (blocks,)),
        Op("conv", op.path, (blocks,), (results,), attributes, arrays),
        Op("reshape", op.path, (results,), op.outputs),
    ]
