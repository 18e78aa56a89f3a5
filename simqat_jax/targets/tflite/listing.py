"""What is in a TFLite file of any origin."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
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
from simqat_jax.targets.tflite.metadata import NAME, read_metadata

_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def list_tflite(path: Path) -> Listing:
    """Return what is in a file.

    Raises:
      ImportError: the extra `export` is missing.
      ValueError: a file that cannot be read.
    """
    schema: Any = import_extra("ai_edge_litert.schema_py_generated")
    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError(f"{path} is no TFLite file: it does not begin as one.")
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        listing = _Reader(schema, model).listing()
    except Exception as error:  # struct, IndexError and more: offsets that lead nowhere
        raise ValueError(f"{path} is damaged: {error}.") from error
    held = [entry.buffer for entry in model.metadata or () if entry.name == NAME.encode()]
    if not held:
        return listing
    said = said_by(lambda: read_metadata(bytes(model.buffers[held[0]].data), data))
    return dataclasses.replace(listing, said=said)


class _Reader:
    """The first subgraph of a file, which is the model."""

    def __init__(self, schema: Any, model: Any):
        self._model = model
        self._graph = model.subgraphs[0]
        self._kinds = _names(schema.BuiltinOperator)
        self._types = _names(schema.TensorType)

    def listing(self) -> Listing:
        operators = [(self._kind(op), op) for op in self._graph.operators]
        return Listing(
            tuple(self._end(i, "input", operators) for i in self._graph.inputs),
            tuple(self._end(i, "output", operators) for i in self._graph.outputs),
            tuple(self._op(kind, op) for kind, op in operators if kind not in _CONVERSIONS),
            sum(kind in _CONVERSIONS for kind, _ in operators),
            tuple(self._nodes(operators)),
        )

    def _nodes(self, operators: Sequence[tuple[str, Any]]) -> Iterator[FileNode]:
        """Yield the operators with a name of their own; Model Explorer knows them by it."""
        quantized = {op.inputs[0]: op.outputs[0] for kind, op in operators if kind == "QUANTIZE"}
        names = collections.Counter(self._name(op.outputs[0]) for _, op in operators)
        for kind, op in operators:
            made = op.outputs[0]
            codes = made if kind in _CONVERSIONS else quantized.get(made, made)
            if self._name(made) and names[self._name(made)] == 1:
                yield FileNode(self._name(made), self._name(codes))

    def _end(self, number: int, kind: str, operators: Sequence[tuple[str, Any]]) -> FileEnd:
        """Return an input or output; no name: it is called `kind`."""
        codes = self._codes(number)
        if codes is None:
            beside = {
                op.outputs[0] for n, op in operators if n == "QUANTIZE" and number in op.inputs
            }
            beside |= {
                op.inputs[0] for n, op in operators if n == "DEQUANTIZE" and number in op.outputs
            }
            found = set(map(self._codes, beside))
            codes = found.pop() if len(found) == 1 else None
        tensor = self._graph.tensors[number]
        return FileEnd(self._name(number) or kind, self._shape(tensor), self._dtype(tensor), codes)

    def _codes(self, number: int) -> Codes | None:
        """Return what a tensor's codes stand for; None: it has none, or several scales."""
        tensor = self._graph.tensors[number]
        grid = tensor.quantization
        if grid is None or grid.scale is None or len(grid.scale) != 1:
            return None
        zero = 0 if grid.zeroPoint is None else grid.zeroPoint[0]
        return Codes(self._dtype(tensor), float(grid.scale[0]), int(zero))

    def _kind(self, op: Any) -> str:
        code = self._model.operatorCodes[op.opcodeIndex]
        if code.customCode:
            return code.customCode.decode()
        return self._kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def _op(self, kind: str, op: Any) -> FileOp:
        tensors = self._graph.tensors
        read = [tensors[i] for i in op.inputs if i >= 0]
        made = [tensors[i] for i in op.outputs]
        constants = [t for t in read if self._bytes(t)]
        types = [self._dtype(t) for t in (*(t for t in read if not self._bytes(t)), *made)]
        return FileOp(
            name=self._name(op.outputs[0]) or kind.lower(),
            kind=kind,
            shape=self._shape(made[0]),
            dtype=next((t for t in types if "float" in t), types[-1]),
            weights=tuple(
                f"{self._dtype(t)} {shape_text(self._shape(t) or ())}" for t in constants
            ),
            nbytes=sum(map(self._bytes, constants)),
        )

    def _name(self, number: int) -> str:
        """Return a tensor's name; none: what lies between the operators of a layer has none."""
        name = self._graph.tensors[number].name
        return "" if name is None else name.decode()

    def _bytes(self, tensor: Any) -> int:
        data = self._model.buffers[tensor.buffer].data
        return 0 if data is None else len(data)

    def _dtype(self, tensor: Any) -> str:
        return self._types[tensor.type].lower()

    def _shape(self, tensor: Any) -> tuple[int, ...] | None:
        signature = tensor.shapeSignature
        shape = tensor.shape if signature is None or len(signature) == 0 else signature
        return None if shape is None else tuple(map(int, shape))


def _names(enumeration: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enumeration).items() if isinstance(value, int)}
