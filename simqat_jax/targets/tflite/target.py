"""Write an integer model as a TFLite flatbuffer: int8 codes, per-channel weights."""

import os
from types import ModuleType

import numpy as np

from simqat_jax.files import atomic_file, import_extra
from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.rounding.xnnpack import XNNPACK
from simqat_jax.targets.metadata import FileMetadata, check_metadata, file_ends
from simqat_jax.targets.rewrites import in_width_blocks
from simqat_jax.targets.subpixels import in_subpixels
from simqat_jax.targets.target import IntegerIO, Target, check_integer_io, check_model
from simqat_jax.targets.tflite.listing import list_tflite
from simqat_jax.targets.tflite.metadata import NAME, metadata_bytes, with_labels
from simqat_jax.targets.tflite.ops import VERSIONS, check, write_op
from simqat_jax.targets.tflite.runtime import open_tflite
from simqat_jax.targets.tflite.subgraph import SchemaObject
from simqat_jax.targets.tflite.writer import Writer

_BLOCKS = {1: (4, 2), 2: (2,), 3: (2,)}  # channels, columns of a block: fast in LiteRT 2.3


def export_tflite(
    model: IntegerModel,
    path: str | os.PathLike[str],
    *,
    integer_io: IntegerIO = False,
    metadata: FileMetadata | None = None,
) -> None:
    """Write a model as a TFLite file that LiteRT runs on int8, for any batch size.

    LiteRT's default, the XNNPACK delegate, computes the codes of `model.run_codes` exactly, less
    128 where they are uint8. Its other kernels round differently. Float parts are float operators.

    Args:
      model: what `convert(..., backend="tflite")` returned.
      path: the file, as a rule `*.tflite`; it appears only once it is whole.
      integer_io: take and return codes, as int8 (True, "int8") or with 128 added to them as uint8
        ("uint8"); by default float32 values. What is on no grid has the model's own type: token
        ids, masks, probabilities.
      metadata: what the file says of itself, as `TFLITE_METADATA`; without it nothing but names.

    Raises:
      TypeError: `model` is no IntegerModel, `path` no path, `integer_io` no flag or type,
        `metadata` no FileMetadata.
      ImportError: the extra `export` is not installed.
      ValueError: activations or weights of more than 8 bits, an operation that TFLite does not
        compute exactly, a float part that it lacks, with its path; additions that mirror another
        runtime; metadata that do not fit the model; a `path` that ends in .onnx.
      OSError: an unwritable path.

    Source:
      TensorFlow Lite schema, version 3, and 8-bit quantization specification.
    """
    check_model(model, "export_tflite(model, path)")
    check_integer_io(integer_io)
    check_metadata(metadata)
    with atomic_file(path, TFLITE.suffix) as file:
        file.write(_bytes(model.program, TFLITE.code_type(integer_io), metadata))


def _bytes(program: Program, io: np.dtype | None, metadata: FileMetadata | None) -> bytes:
    flatbuffers = import_extra("flatbuffers")
    schema = import_extra("ai_edge_litert.schema_py_generated")
    check(program)
    writer = Writer(in_width_blocks(in_subpixels(program), _BLOCKS), schema, VERSIONS)
    written, ends = writer.model(io, write_op), []
    if metadata is not None:
        inputs, outputs = file_ends(program, metadata, io, TFLITE.dtype)
        ends = [*inputs, *outputs]
        writer.hold(written, NAME, metadata_bytes(metadata, inputs, outputs))
    builder = _builder(flatbuffers)
    builder.Finish(written.Pack(builder), file_identifier=b"TFL3")
    return with_labels(bytes(builder.Output()), ends)


def _builder(flatbuffers: ModuleType) -> SchemaObject:
    """Return a builder that writes equal arrays once: zero points take 8 bytes a channel."""

    class Builder(flatbuffers.Builder):
        def CreateNumpyVector(self, x: np.ndarray) -> int:
            key = (x.dtype.str, x.tobytes())
            if key not in written:
                written[key] = super().CreateNumpyVector(x)
            return written[key]

    written: dict[tuple[str, bytes], int] = {}
    return Builder(1024)


TFLITE = Target(
    suffix=".tflite",
    rounding=XNNPACK,
    dtype=np.dtype(np.int8),
    write=_bytes,
    listing=list_tflite,
    packages=("ai_edge_litert",),
    open=open_tflite,
    settings=dict,
)
