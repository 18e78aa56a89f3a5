"""What is in an ONNX file of any origin."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simqat_jax.files import import_extra
from simqat_jax.targets.listing import (
    FileEnd,
    FileNode,
    FileOp,
    Listing,
    said_by,
    shape_text,
)
from simqat_jax.targets.metadata import Codes
from simqat_jax.targets.onnx.metadata import read_metadata

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")


def list_onnx(path: Path) -> Listing:
    """Return what is in a file.

    Raises:
      ImportError: the extra `export` is missing.
      ValueError: a file that cannot be read.
    """
    onnx: Any = import_extra("onnx")
    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    except Exception as error:  # of protobuf, which has classes of its own
        raise ValueError(f"{path} is no ONNX file, or damaged: {error}") from error
    if not (model.ir_version and model.graph.output):  # protobuf reads much as an empty message
        raise ValueError(f"{path} is no ONNX file, or damaged: it has no graph with outputs.")
    listing = _Reader(onnx, model.graph).listing()
    return dataclasses.replace(listing, said=said_by(lambda: read_metadata(model)))


class _Reader:
    """A graph, and what its tensors are."""

    def __init__(self, onnx: Any, graph: Any):
        self._onnx = onnx
        self._graph = graph
        self._constants = {t.name: t for t in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        self._types = {v.name: v.type.tensor_type for v in values}
        self._made = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def listing(self) -> Listing:
        inputs = [v.name for v in self._graph.input if v.name not in self._constants]
        computing = [
            node for node in self._graph.node if node.op_type not in (*_CONVERSIONS, "Constant")
        ]
        conversions = sum(node.op_type in _CONVERSIONS for node in self._graph.node)
        return Listing(
            tuple(self._end(n, self._readers.get(n, [])) for n in inputs),
            tuple(self._end(v.name, [self._made.get(v.name)]) for v in self._graph.output),
            tuple(map(self._op, computing)),
            conversions,
            tuple(self._node(number, node) for number, node in enumerate(self._graph.node)),
        )

    def _end(self, name: str, beside: Sequence[Any]) -> FileEnd:
        """Return an input or output, given the nodes that read or make it."""
        found = {self._quantized_by(node) for node in beside}
        codes = found.pop() if len(found) == 1 else None
        return FileEnd(name, self._shape(name), self._dtype(name), codes)

    def _quantized_by(self, node: Any) -> Codes | None:
        """Return what codes that a node makes or takes stand for; None: another node."""
        if node is None or node.op_type not in _CONVERSIONS:
            return None
        constants = [self._constants.get(name) for name in node.input[1:]]
        if len(constants) != 2 or None in constants:
            return None
        scale, zero = map(self._onnx.numpy_helper.to_array, constants)
        if scale.size != 1:
            return None
        return Codes(zero.dtype.name, scale.item(), zero.item())

    def _node(self, number: int, node: Any) -> FileNode:
        """Return a node; the adapter of Model Explorer numbers those without a name."""
        made, tensor = node.output[0], node.output[0]
        if node.op_type not in _CONVERSIONS:
            readers = [r for r in self._readers.get(made, []) if r.op_type == "QuantizeLinear"]
            tensor = next((r.output[0] for r in readers), made)
        numbered = f"node_{number}" if number else "node"
        return FileNode(node.name or numbered, tensor)

    def _op(self, node: Any) -> FileOp:
        constants = [
            self._constants[n] for n in map(self._codes, node.input) if n in self._constants
        ]
        return FileOp(
            name=node.output[0],
            kind=node.op_type,
            shape=self._shape(node.output[0]),
            dtype=self._computes_on(node),
            weights=tuple(f"{self._name(t.data_type)} {shape_text(t.dims)}" for t in constants),
            nbytes=sum(len(t.raw_data) or t.ByteSize() for t in constants),
        )

    def _computes_on(self, node: Any) -> str:
        """Return the type of its codes where it stands between them, else that of its values."""
        data = [n for n in node.input if n and self._codes(n) not in self._constants]
        readers = self._readers.get(node.output[0], [])
        between = all(self._codes(n) != n for n in data)
        if data and between and readers and all(r.op_type == "QuantizeLinear" for r in readers):
            return self._dtype(self._codes(data[0]))
        types = [self._dtype(n) for n in (*data, node.output[0])]
        return next((t for t in types if "float" in t), types[-1])

    def _codes(self, name: str) -> str:
        """Return the tensor of codes that is dequantized to this one; another one: itself."""
        node = self._made.get(name)
        return node.input[0] if node is not None and node.op_type == "DequantizeLinear" else name

    def _dtype(self, name: str) -> str:
        return self._name(self._types[name].elem_type) if name in self._types else ""

    def _name(self, elem_type: int) -> str:
        name: str = self._onnx.TensorProto.DataType.Name(elem_type).lower()
        return {"float": "float32", "double": "float64"}.get(name, name)

    def _shape(self, name: str) -> tuple[int, ...] | None:
        found = self._types.get(name)
        if found is None or not found.HasField("shape"):
            return None
        return _lengths(found.shape.dim)


def _lengths(dims: Iterable[Any]) -> tuple[int, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
