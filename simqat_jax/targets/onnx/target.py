"""Write an integer model as an ONNX file, in QDQ form, for ONNX Runtime."""

import os

import numpy as np

from simqat_jax.files import atomic_file
from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME
from simqat_jax.targets.axes import moving_one_axis
from simqat_jax.targets.metadata import FileMetadata, check_metadata, file_ends
from simqat_jax.targets.onnx.listing import list_onnx
from simqat_jax.targets.onnx.message import Message
from simqat_jax.targets.onnx.metadata import describe
from simqat_jax.targets.onnx.ops import check, write_op
from simqat_jax.targets.onnx.runtime import onnxruntime_saturates, open_onnx
from simqat_jax.targets.rewrites import in_width_blocks, pooling_rows_first, reshaping_once
from simqat_jax.targets.subpixels import in_subpixels
from simqat_jax.targets.target import IntegerIO, Target, check_integer_io, check_model

# Channels, and columns of a block: fastest in ONNX Runtime 1.32.
_BLOCKS = {1: (4,), 2: (4,), 3: (4,), 6: (2,)}
_FEW = 16  # channels from which on pooling rows first gains nothing


def export_onnx(
    model: IntegerModel,
    path: str | os.PathLike[str],
    *,
    integer_io: IntegerIO = False,
    metadata: FileMetadata | None = None,
) -> None:
    """Write an integer model as an ONNX file with the same codes in ONNX Runtime.

    Every quantized operation stands between DequantizeLinear and QuantizeLinear, which ONNX Runtime
    fuses to its integer operators; what only moves codes works on uint8. Signed codes are written
    as uint8 with 128 added. Float parts are float operators. The batch size is free where the
    model's is.

    Args:
      model: from `convert(..., backend="onnx")`.
      path: of the file, which appears only once it is whole.
      integer_io: inputs and outputs are codes, as uint8 (True, "uint8") or less 128 as int8
        ("int8"); otherwise float32 in real units. Those on no grid have the model's own type: token
        ids, masks, probabilities.
      metadata: what the file says of itself, as doc strings and `metadata_props`; without it these
        hold the configuration, and scales and zero points of codes that go in and out.

    Raises:
      TypeError: `model` is no IntegerModel, `path` no path, `integer_io` no flag or type,
        `metadata` no FileMetadata.
      ImportError: the extra `export` is not installed.
      ValueError: an operation or a width that cannot be written, with its path; additions that
        mirror another runtime; metadata that do not fit the model; a `path` that ends in .tflite.

    Source:
      ONNX operators, opset 19.
    """
    check_model(model, "export_onnx(model, path)")
    check_integer_io(integer_io)
    check_metadata(metadata)
    with atomic_file(path, ONNX.suffix) as file:
        file.write(_bytes(model.program, ONNX.code_type(integer_io), metadata))


def _bytes(program: Program, io: np.dtype | None, metadata: FileMetadata | None) -> bytes:
    check(program)
    blocks = in_width_blocks(in_subpixels(moving_one_axis(program)), _BLOCKS)
    message = Message(reshaping_once(pooling_rows_first(blocks, _FEW)), io)
    model = message.model(write_op)
    if metadata is None and io is not None:
        metadata = FileMetadata()  # nothing else tells what the codes stand for
    if metadata is not None:
        describe(model, metadata, *file_ends(program, metadata, io, ONNX.dtype))
    return message.checked_bytes(model)


ONNX = Target(
    suffix=".onnx",
    rounding=ONNXRUNTIME,
    dtype=np.dtype(np.uint8),
    write=_bytes,
    listing=list_onnx,
    packages=("onnx", "onnxruntime"),
    open=open_onnx,
    settings=lambda: {"exact_sums": onnxruntime_saturates()},
)
