"""Published TFLite files of one input and one output: their weights, and running them in LiteRT."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import ExperimentError

_CONV_2D, _DEPTHWISE_CONV_2D, _FULLY_CONNECTED, _SOFTMAX = 3, 4, 9, 25
"""Of BuiltinOperator in the schema."""
_TO_FLAX = {
    _CONV_2D: (1, 2, 3, 0),  # from (out, H, W, in)
    _DEPTHWISE_CONV_2D: (1, 2, 0, 3),  # from (1, H, W, out)
    _FULLY_CONNECTED: (1, 0),  # from (out, in)
}
"""Axes of kernels, for each kind of layer."""
_TYPES = {0: np.dtype(np.float32), 2: np.dtype(np.int32), 9: np.dtype(np.int8)}
"""Of TensorType in the schema, as far as weights have them."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's kernel, (H, W, in, out) or (in, out), and bias, float32."""

    kernel: np.ndarray
    bias: np.ndarray
    depthwise: bool


def layers(path: Path) -> list[Layer]:
    """Return the layers of a file in the order in which they run; of codes, what they stand for.

    Raises:
      ExperimentError: a package of the extra `export` is missing; the file is no TFLite file.
    """
    model = _parsed(_read(path))
    graph = model.subgraphs[0]
    found = []
    for operator in graph.operators:
        kind = _kind(model, operator)
        if kind in _TO_FLAX:
            kernel, bias = (_values(model, graph.tensors[i]) for i in operator.inputs[1:3])
            depthwise = kind == _DEPTHWISE_CONV_2D
            found.append(Layer(kernel.transpose(_TO_FLAX[kind]), bias, depthwise))
    return found


class LiteRTFile:
    """A file in LiteRT on one thread, which takes one example at a time.

    Attributes:
      bytes: size of the file, softmax included.

    Raises:
      ExperimentError: a package of the extra `export` is missing; the file is no TFLite file.
    """

    def __init__(self, path: Path, *, softmax: bool = True):
        """Open a file.

        Args:
          path: of the file.
          softmax: False: leave out the softmax at its end, so that it returns logits.
        """
        content = _read(path)
        self.bytes = len(content)
        content = content if softmax else _without_softmax(_parsed(content))
        interpreter = _import("ai_edge_litert.interpreter").Interpreter
        self._file = interpreter(model_content=content, num_threads=1)
        self._file.allocate_tensors()
        (self._input,) = self._file.get_input_details()
        (self._output,) = self._file.get_output_details()

    @property
    def input_range(self) -> tuple[float, float]:
        """What the lowest and the highest code of the input stand for, real units."""
        scale, zero_point = self._input["quantization"]
        codes = np.iinfo(self._input["dtype"])
        return scale * (codes.min - zero_point), scale * (codes.max - zero_point)

    def encoded(self, x: np.ndarray) -> np.ndarray:
        """Return what the file takes for real values: their nearest codes where it takes codes."""
        dtype = self._input["dtype"]
        if dtype == np.float32:
            return x.astype(np.float32)
        scale, zero_point = self._input["quantization"]
        codes = np.iinfo(dtype)
        return np.clip(np.rint(x / scale) + zero_point, codes.min, codes.max).astype(dtype)

    def invoke(self, example: np.ndarray) -> np.ndarray:
        """Return the file's output, codes or real values, for one encoded example."""
        self._file.set_tensor(self._input["index"], example)
        self._file.invoke()
        return self._file.get_tensor(self._output["index"])

    def run(self, x: np.ndarray) -> np.ndarray:
        """Return real values for real values, shape (N, ...)."""
        encoded = self.encoded(x)
        out = np.concatenate([self.invoke(encoded[i : i + 1]) for i in range(len(x))])
        if out.dtype == np.float32:
            return out
        scale, zero_point = self._output["quantization"]
        return (out.astype(np.float32) - zero_point) * np.float32(scale)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExperimentError(
            f"TFLite files need {name}, of the extra 'export': "
            'pip install -e ".[export,experiments]" installs it.'
        ) from error


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExperimentError(f"cannot read {path}: {error.strerror or error}.") from error
    if content[4:8] != b"TFL3":
        raise ExperimentError(f"{path} is no TFLite file: give one that a converter wrote.")
    return content


def _parsed(content: bytes) -> Any:
    schema = _import("ai_edge_litert.schema_py_generated")
    return schema.ModelT.InitFromPackedBuf(content, 0)


def _kind(model: Any, operator: Any) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    # Files from before version 3a have the operator in the first, which ends at 127.
    return max(code.deprecatedBuiltinCode, code.builtinCode)


def _values(model: Any, tensor: Any) -> np.ndarray:
    """Return a constant's real values."""
    data = model.buffers[tensor.buffer].data
    codes = np.asarray(data, np.uint8).view(_TYPES[tensor.type]).reshape(tensor.shape)
    if codes.dtype == np.float32:
        return codes
    scale = np.asarray(tensor.quantization.scale, np.float32)
    along = np.ones(codes.ndim, int)
    along[tensor.quantization.quantizedDimension] = -1
    return codes.astype(np.float32) * scale.reshape(along)


def _without_softmax(model: Any) -> bytes:
    graph = model.subgraphs[0]
    last = graph.operators[-1]
    if _kind(model, last) == _SOFTMAX:
        graph.operators, graph.outputs = graph.operators[:-1], last.inputs[:1]
        model.signatureDefs = None  # which name the output
    builder = _import("flatbuffers").Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
