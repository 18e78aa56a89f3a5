"""Figures of an analysis for each node of a file, as Model Explorer lays them over its graph."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from simqat_jax.analysis.result import Analysis, LayerAnalysis, TensorAnalysis
from simqat_jax.files import as_path, atomic_file
from simqat_jax.numerics.arguments import check_kind
from simqat_jax.targets.listing import FileNode
from simqat_jax.targets.open_file import target_of

_COUNTED = re.compile(r":\d+$")
"""What tells a name of a file from an equal one."""


class _Colour(NamedTuple):
    """Of the nodes whose value is at most this, and above that of the colour before."""

    most: float
    colour: str


_DECIBELS = _Colour(10, "#b91c1c"), _Colour(20, "#f97316"), _Colour(30, "#fde047")
_BITS = _Colour(2, "#1e3a8a"), _Colour(4, "#3b82f6"), _Colour(8, "#bfdbfe")


class _Overlay(NamedTuple):
    """A figure of nodes.

    Attributes:
      name: what the end of the file's name says.
      colours: by value, ascending.
      of_tensor: of a node's result; None: it has none.
      of_layer: of the layer that a node belongs to.
    """

    name: str
    colours: tuple[_Colour, ...]
    of_tensor: Callable[[TensorAnalysis], float | None] = lambda tensor: None
    of_layer: Callable[[LayerAnalysis], float | None] = lambda layer: None


_OVERLAYS = (
    _Overlay("sqnr", _DECIBELS, of_tensor=lambda tensor: tensor.sqnr),
    _Overlay("sensitivity", _DECIBELS, of_layer=lambda layer: layer.alone_quantized),
    _Overlay("weight_bits", _BITS, of_layer=lambda layer: layer.num_bits),
    _Overlay("activation_bits", _BITS, of_tensor=lambda tensor: tensor.spec.num_bits),
)


def write_overlays(
    analysis: Analysis, file: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> tuple[Path, ...]:
    """Write what an analysis found as node data of Model Explorer, for the graph of a file.

    Four JSON files, to be loaded as node data once Model Explorer shows the file: `sqnr` (dB, of a
    node's result against float), `sensitivity` (dB, of the model's outputs where the node's layer
    alone is quantized), `weight_bits` and `activation_bits`. Nodes of TFLite are told by their
    output tensor, those of ONNX by their name or, as the adapter `model-explorer-onnx` 0.4 calls
    those without, their number. A node without a figure, or with an infinite one, has no value.

    Args:
      analysis: what `analyze` returned, or `Analysis.load`.
      file: `*.onnx` or `*.tflite`, written from the model that was analyzed.
      folder: where to write "net.sqnr.json" and the others for a file "net.tflite".

    Returns:
      The paths of what was written.

    Raises:
      TypeError: no Analysis, no path.
      ImportError: the extra `export` is not installed.
      FileNotFoundError: no file, no folder.
      ValueError: a file of another kind, one that cannot be read, or of another model: none of its
        nodes has a figure.

    Source:
      https://github.com/google-ai-edge/model-explorer, "node data".
    """
    check_kind("analysis", analysis, Analysis, "analyze(...) returns one.")
    path, into = as_path(file), as_path(folder)
    target = target_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    nodes = target.listing(path).nodes
    found = {overlay.name: dict(_values(analysis, overlay, nodes)) for overlay in _OVERLAYS}
    if not any(found.values()):
        raise ValueError(
            f"no node of {path} has the name of a layer or tensor of this analysis, such as "
            f"{analysis.layers[0].name!r}. Analyze the model that the file was written from."
        )
    written = []
    for overlay in _OVERLAYS:
        written.append(into / f"{path.stem}.{overlay.name}.json")
        with atomic_file(written[-1]) as out:
            out.write(json.dumps(_node_data(overlay, found[overlay.name]), indent=1).encode())
    return tuple(written)


def _node_data(overlay: _Overlay, values: Mapping[str, float]) -> dict[str, object]:
    return {
        "results": {key: {"value": round(value, 2)} for key, value in values.items()},
        "thresholds": [{"value": most, "bgColor": colour} for most, colour in overlay.colours],
    }


def _values(
    analysis: Analysis, overlay: _Overlay, nodes: tuple[FileNode, ...]
) -> Iterator[tuple[str, float]]:
    layers = {layer.name: layer for layer in analysis.layers}
    for node in nodes:
        name = _COUNTED.sub("", node.tensor)
        tensor, layer = analysis.tensors.get(name), _layer_of(name, layers)
        value = None if tensor is None else overlay.of_tensor(tensor)
        if value is None and layer is not None:
            value = overlay.of_layer(layer)
        if value is not None and math.isfinite(value):
            yield node.key, value


def _layer_of(name: str, layers: Mapping[str, LayerAnalysis]) -> LayerAnalysis | None:
    """Return the layer of the name, or of the longest path in front of it."""
    while name not in layers and "/" in name:
        name = name.rpartition("/")[0]
    return layers.get(name)
