"""What a TFLite file says of itself: a flatbuffer in one of its buffers, and a zip file behind it.

Source:
  `metadata_schema.fbs` of TensorFlow Lite Support, file identifier M001.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simqat_jax.files import import_extra
from simqat_jax.targets.metadata import Described, End, FileMetadata, TensorMetadata

NAME = "TFLITE_METADATA"
"""Of the entry of a model whose buffer holds it."""
_IDENTIFIER, _PARSER = b"M001", "1.0.0"
_NORMALIZATION, _AXIS_LABELS, _VALUE_LABELS = 1, 2, 3  # of a union and of an enumeration
_MODEL = {"name": 0, "description": 1, "version": 2, "author": 4, "license": 5}
_SUBGRAPHS, _MIN_PARSER = 3, 7  # what else a model has
_INPUTS, _OUTPUTS = 2, 3  # of a subgraph
_TENSOR_NAME, _TENSOR_DESCRIPTION, _UNITS, _FILES = 0, 1, 4, 6  # of a tensor
_OPTIONS_TYPE, _OPTIONS = 0, 1  # of a unit that processes
_FILE_NAME, _FILE_TYPE = 0, 2  # of an associated file
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of labels: files of the same model are the same."""
Builder = Any
"""Of flatbuffers, which has no types."""


def metadata_bytes(metadata: FileMetadata, inputs: Sequence[End], outputs: Sequence[End]) -> bytes:
    """Return the flatbuffer."""
    builder: Builder = import_extra("flatbuffers").Builder(1024)
    files = _label_files((*inputs, *outputs))
    ends = [
        _vector(builder, [_tensor(builder, end, files.get(end.name)) for end in group])
        for group in (inputs, outputs)
    ]
    subgraph = _table(builder, {_INPUTS: ends[0], _OUTPUTS: ends[1]})
    fields = {_SUBGRAPHS: _vector(builder, [subgraph])}
    fields[_MIN_PARSER] = builder.CreateString(_PARSER)
    for name, place in _MODEL.items():
        if text := getattr(metadata, name):
            fields[place] = builder.CreateString(text)
    builder.Finish(_table(builder, fields), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def with_labels(model: bytes, ends: Sequence[End]) -> bytes:
    """Return a file with the labels of its inputs and outputs behind it, as an uncompressed zip."""
    files = _label_files(ends)
    if not files:
        return model
    whole = io.BytesIO(model)
    with zipfile.ZipFile(whole, "a") as archive:
        for end in ends:
            if end.name in files:
                lines = "".join(f"{label}\n" for label in end.about.labels)
                archive.writestr(zipfile.ZipInfo(files[end.name], _EPOCH), lines)
    return whole.getvalue()


def read_metadata(buffer: bytes, file: bytes) -> Described:
    """Return what the flatbuffer says, and of each input and output its name and what it says.

    Args:
      buffer: the flatbuffer.
      file: the whole file, with the labels behind it.
    """
    model = _Table(buffer, int.from_bytes(buffer[:4], "little"))
    about: dict[str, Any] = {name: model.text(place) for name, place in _MODEL.items()}
    (subgraph, *_) = model.tables(_SUBGRAPHS)
    tensors = [
        (tensor.text(_TENSOR_NAME), _read_tensor(tensor, file))
        for place in (_INPUTS, _OUTPUTS)
        for tensor in subgraph.tables(place)
    ]
    return FileMetadata(**about), tensors


# Writing -----------------------------------------------------------------------------------------


def _label_files(ends: Sequence[End]) -> dict[str, str]:
    """Return the name of a file for each input and output that has labels."""
    names = [end.name for end in ends if end.about.labels]
    return {name: "labels.txt" if len(names) == 1 else f"labels/{name}.txt" for name in names}


def _tensor(builder: Builder, end: End, labels: str | None) -> int:
    fields = {}
    if end.about.means:
        numbers = (np.asarray(v, np.float32) for v in (end.about.means, end.about.stds))
        options = _table(builder, dict(enumerate(map(builder.CreateNumpyVector, numbers))))
        unit = _table(builder, {_OPTIONS: options}, {_OPTIONS_TYPE: _NORMALIZATION})
        fields[_UNITS] = _vector(builder, [unit])
    if labels is not None:
        kind = _VALUE_LABELS if end.counts else _AXIS_LABELS
        file = _table(builder, {_FILE_NAME: builder.CreateString(labels)}, {_FILE_TYPE: kind})
        fields[_FILES] = _vector(builder, [file])
    fields[_TENSOR_NAME] = builder.CreateString(end.name)
    fields[_TENSOR_DESCRIPTION] = builder.CreateString(end.text)
    return _table(builder, fields)


def _table(
    builder: Builder, references: Mapping[int, int], bytes_: Mapping[int, int] | None = None
) -> int:
    """Write a table: of its fields those that refer to something, and those of a byte."""
    bytes_ = bytes_ or {}
    builder.StartObject(1 + max(*references, *bytes_, 0))
    for place, offset in references.items():
        builder.PrependUOffsetTRelativeSlot(place, offset, 0)
    for place, value in bytes_.items():
        builder.PrependInt8Slot(place, value, 0)
    return builder.EndObject()


def _vector(builder: Builder, tables: Sequence[int]) -> int:
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    return builder.EndVector()


# Reading -----------------------------------------------------------------------------------------


def _read_tensor(tensor: "_Table", file: bytes) -> TensorMetadata:
    means, stds = (), ()
    for unit in tensor.tables(_UNITS):
        if unit.byte(_OPTIONS_TYPE) == _NORMALIZATION:
            means, stds = (unit.table(_OPTIONS).numbers(place) for place in (0, 1))
    labels: list[str] = []
    for associated in tensor.tables(_FILES):
        if associated.byte(_FILE_TYPE) in (_AXIS_LABELS, _VALUE_LABELS) and not labels:
            with zipfile.ZipFile(io.BytesIO(file)) as archive:
                labels = archive.read(associated.text(_FILE_NAME)).decode().splitlines()
    description = tensor.text(_TENSOR_DESCRIPTION)
    return TensorMetadata(description=description, mean=means, std=stds, labels=labels)


class _Table:
    """A table of a flatbuffer, whose fields are known by their places."""

    def __init__(self, buffer: bytes, start: int):
        self._table: Any = import_extra("flatbuffers.table").Table(buffer, start)

    def _at(self, place: int) -> int:
        """Return where a field is in the buffer; 0: it is left out."""
        offset = self._table.Offset(4 + 2 * place)
        return self._table.Pos + offset if offset else 0

    def text(self, place: int) -> str:
        """Return a string, empty where it is left out."""
        at = self._at(place)
        return self._table.String(at).decode() if at else ""

    def byte(self, place: int) -> int:
        """Return a number of a byte, 0 where it is left out."""
        at = self._at(place)
        return self._table.Bytes[at] if at else 0

    def table(self, place: int) -> "_Table":
        """Return a table inside."""
        return _Table(self._table.Bytes, self._table.Indirect(self._at(place)))

    def tables(self, place: int) -> list["_Table"]:
        """Return the tables of a vector."""
        start, count = self._vector(place)
        places = range(start, start + 4 * count, 4)
        return [_Table(self._table.Bytes, self._table.Indirect(at)) for at in places]

    def numbers(self, place: int) -> tuple[float, ...]:
        """Return the numbers of a vector of float32."""
        start, count = self._vector(place)
        return tuple(np.frombuffer(self._table.Bytes, "<f4", count, start).tolist())

    def _vector(self, place: int) -> tuple[int, int]:
        """Return where a vector begins, and how long it is."""
        offset = self._table.Offset(4 + 2 * place)
        return (self._table.Vector(offset), self._table.VectorLen(offset)) if offset else (0, 0)
