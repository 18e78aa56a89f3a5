"""Write an integer model as an ONNX file, in QDQ form, for ONNX Runtime."""

import os

import numpy as np

from simqat_jax.files import as_path, atomic_file
from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.arguments import check_flag
from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME
from simqat_jax.targets.axes import moving_one_axis
from simqat_jax.targets.onnx.ops import check, write_op
from simqat_jax.targets.onnx.runtime import onnxruntime_saturates, open_onnx
from simqat_jax.targets.onnx.writer import Writer
from simqat_jax.targets.rewrites import in_width_blocks, pooling_rows_first, reshaping_once
from simqat_jax.targets.subpixels import in_subpixels
from simqat_jax.targets.target import Target, check_model

_BLOCKS = {1: 4, 2: 4, 3: 4, 6: 2}  # channels, and columns of a block: fastest in ONNX Runtime 1.32
_FEW = 16  # channels from which on pooling rows first gains nothing


def export_onnx(
    model: IntegerModel, path: str | os.PathLike[str], *, integer_io: bool = False
) -> None:
    """Write an integer model as an ONNX file with the same codes in ONNX Runtime.

    Every quantized operation stands between DequantizeLinear and QuantizeLinear, which ONNX Runtime
    fuses to its integer operators; what only moves codes works on uint8. Signed codes are written
    as uint8 with 128 added. Float parts are float operators. The batch size is free where the
    model's is.

    Args:
      model: from `convert(..., backend="onnx")`.
      path: of the file, which appears only once it is whole.
      integer_io: inputs and outputs are uint8 codes; otherwise float32 in real units. Those on no
        grid have the model's own type: token ids, masks, probabilities.

    Raises:
      TypeError: `model` is no IntegerModel, `path` no path, `integer_io` no bool.
      ImportError: the extra `export` is not installed.
      ValueError: an operation or a width that cannot be written, with its path; additions that
        mirror another runtime.

    Source:
      ONNX operators, opset 19.
    """
    check_model(model, "export_onnx(model, path)")
    check_flag("integer_io", integer_io)
    path = as_path(path)
    data = _bytes(model.program, integer_io)
    with atomic_file(path) as file:
        file.write(data)


def _bytes(program: Program, integer_io: bool) -> bytes:
    check(program)
    blocks = in_width_blocks(in_subpixels(moving_one_axis(program)), _BLOCKS)
    fast = reshaping_once(pooling_rows_first(blocks, _FEW))
    return Writer(fast, integer_io).model_bytes(write_op)


ONNX = Target(
    suffix=".onnx",
    rounding=ONNXRUNTIME,
    write=_bytes,
    packages=("onnx", "onnxruntime"),
    open=open_onnx,
    settings=lambda: {"exact_sums": onnxruntime_saturates()},
    offset=lambda grid: grid.unsigned_offset,
    dtype=np.dtype(np.uint8),
)
