"""What an ONNX file says of itself: doc strings to read, `metadata_props` for programs."""

import json
from collections.abc import Sequence
from typing import Any

from simqat_jax.targets.metadata import (
    Described,
    End,
    FileMetadata,
    TensorMetadata,
    sentences,
    told,
)

OnnxObject = Any
"""A message of ONNX, which has no types."""
_PROPERTIES = {
    "name": "model_name",
    "version": "model_version",
    "author": "model_author",
    "license": "model_license",
}
"""Keys of `metadata_props`, by field; some are those of the ONNX specification."""
_ENDS = ("inputs", "outputs")
_TOLD = ("description", "mean", "std", "labels")


def describe(
    model: OnnxObject, metadata: FileMetadata, inputs: Sequence[End], outputs: Sequence[End]
) -> None:
    """Write what a file says of itself into its message."""
    model.doc_string = metadata.description
    for field, key in _PROPERTIES.items():
        if text := getattr(metadata, field):
            _put(model, key, text)
    graph = model.graph
    for key, ends, infos in zip(_ENDS, (inputs, outputs), (graph.input, graph.output), strict=True):
        for end, info in zip(ends, infos, strict=True):
            info.doc_string = sentences(end.about.description, *told(end.about), end.kind)
        _put(model, key, json.dumps([end.to_dict() for end in ends], ensure_ascii=False))


def read_metadata(model: OnnxObject) -> Described:
    """Return what a file says, and of each input and output its name and what it says.

    What is only in doc strings, as in files of other origin, is a description.
    """
    properties = {p.key: p.value for p in model.metadata_props}
    about = {field: properties.get(key, "") for field, key in _PROPERTIES.items()}
    given = [end for key in _ENDS for end in json.loads(properties.get(key, "[]"))]
    ends = {end["name"]: {k: end[k] for k in _TOLD if k in end} for end in given}

    def said(info: OnnxObject) -> TensorMetadata:
        about, text = ends.get(info.name, {}), info.doc_string
        for part in told(TensorMetadata(**about)):
            text = text.replace(f"{part}. ", "")
        return TensorMetadata(**about | {"description": text})

    tensors = [(info.name, said(info)) for info in (*model.graph.input, *model.graph.output)]
    return FileMetadata(description=model.doc_string, **about), tensors


def _put(model: OnnxObject, key: str, value: str) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = key, value
