"""Constants that repeat along the batch at full length.

LiteRT computes exactly where all lengths follow from those of the inputs; lengths that are read off
a tensor are not known before it runs. But sums broadcast: one zero for each example, plus the
constant.
"""

import numpy as np

from simqat_jax.ir.program import Shape, Tensor
from simqat_jax.targets.tflite.subgraph import Codes, Plain, Subgraph, reshape_target


def repeated_codes(w: Subgraph, tensor: Tensor, held: Codes, each: int) -> Codes:
    """Return the codes of a constant at full length.

    Args:
      w: the file.
      tensor: the constant.
      held: its codes, of length 1 along the batch.
      each: what `false_of_each` returned.
    """
    zeros = w.codes(f"{tensor.name}/zeros", _one_of_each(tensor), held.grid)
    w.emit("QUANTIZE", [_zeros(w, each, tensor, "float32")], zeros.index)
    full = w.codes(tensor.name, tensor.shape, held.grid)
    w.emit("ADD", [zeros.index, held.index], full.index)
    return full


def repeated_values(w: Subgraph, tensor: Tensor, each: int) -> Plain:
    """Return the values of a constant on no grid at full length; `each`: as above."""
    assert tensor.value is not None
    kind = "float32" if tensor.dtype == "float32" else "int32"
    full, held = w.tensor(None, tensor.shape, np.dtype(kind)), w.constant(tensor.value, kind)
    w.emit("ADD", [_zeros(w, each, tensor, kind), held], full)
    if kind != tensor.dtype:
        full = w.cast(full, tensor.shape, np.dtype(tensor.dtype))
    return Plain(full, tensor.shape, tensor.dtype)


def false_of_each(w: Subgraph, x: Codes | Plain, axis: int) -> int:
    """Return a truth value of each example that is false; `axis`: the batch's in an input."""
    ends = [None if k == axis else 1 for k in range(len(x.shape))]
    shape = tuple(d if k == axis else 1 for k, d in enumerate(x.shape))
    if isinstance(x, Codes):
        one: Codes | Plain = w.codes("one", shape, x.grid)
    else:
        one = Plain(w.tensor("one", shape, np.dtype(x.dtype)), shape, x.dtype)
    w.strided_slice(x, [0] * len(ends), ends, [1] * len(ends), one)
    real = one.index
    if isinstance(one, Codes):
        real = w.tensor(None, shape, np.float32)
        w.emit("DEQUANTIZE", [one.index], real)
    elif one.dtype != "float32":
        real = w.cast(one.index, shape, np.float32)
    row = w.tensor(None, (-1,), np.float32)
    w.emit("RESHAPE", [real], row, newShape=reshape_target((-1,)))
    false = w.tensor(None, (-1,), np.bool_)
    w.emit("LESS", [row, row], false)  # than itself no number is, NaN neither
    return false


def _one_of_each(tensor: Tensor) -> Shape:
    return tuple(min(d, 1) for d in tensor.shape)


def _zeros(w: Subgraph, each: int, tensor: Tensor, dtype: str) -> int:
    """Return a zero of each example along the axis of the batch in a constant."""
    shape = _one_of_each(tensor)
    zeros = w.cast(each, (-1,), np.dtype(dtype))
    target = w.tensor(None, shape, np.dtype(dtype))
    w.emit("RESHAPE", [zeros], target, newShape=reshape_target(shape))
    return target
