"""Write the float network of an integer model as ONNX and TFLite files: what int8 is timed against.

Weights are dequantized and BatchNorm is folded, as a converter of float networks leaves them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import ArrayLike, DTypeLike
from onnx import helper, numpy_helper

import simqat_jax as sq
from simqat_jax.files import atomic_file

_RELU = ("conv", "dense", "add", "add_onnx")


def _weights(model: sq.IntegerModel, op: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel and bias of a layer, float32."""
    scale = op.arrays["scale"]
    unit = np.float32(model.tensors[op.inputs[0]].grid.scale) * scale
    return op.arrays["kernel"] * scale, (op.arrays["bias"] * unit).astype(np.float32)


def _has_relu(model: sq.IntegerModel, op: Any) -> bool:
    zero = model.tensors[op.outputs[0]].grid.zero_point
    return op.kind in _RELU and op.attributes["clamp"][0] >= zero


def write_onnx(model: sq.IntegerModel, path: Path) -> None:
    """Write the float network for ONNX Runtime: channels first, opset 19.

    Args:
      model: with operations of LeNet-5 and ResNets only.
      path: of the file.

    Raises:
      ValueError: another operation.
    """
    nodes: list[Any] = []
    initializers: list[Any] = []

    def constant(value: np.ndarray) -> str:
        name = f"constant_{len(initializers)}"
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    source = model.tensors[model.inputs[0]]
    names = {model.inputs[0]: node("Transpose", ["input"], perm=(0, 3, 1, 2))}
    flat: dict[int, tuple[int, ...]] = {}  # what was flattened with channels first
    for op in model.ops:
        a, inputs = op.attributes, [names[i] for i in op.inputs]
        if op.kind == "conv":
            kernel, bias = _weights(model, op)
            pads = [p[end] for end in (0, 1) for p in a["padding"]]
            inputs += [constant(kernel.transpose(3, 2, 0, 1)), constant(bias)]
            name = node("Conv", inputs, pads=pads, strides=a["strides"], group=a["groups"])
        elif op.kind == "dense":
            kernel, bias = _weights(model, op)
            if op.inputs[0] in flat:
                rows = kernel.reshape(*flat[op.inputs[0]], -1)
                kernel = np.moveaxis(rows, -2, 0).reshape(kernel.shape)
            name = node("Gemm", [*inputs, constant(kernel), constant(bias)])
        elif op.kind in ("add", "add_onnx"):
            name = node("Add", inputs)
        elif op.kind == "max_pool":
            window, strides, padding = (a[k][1:-1] for k in ("window", "strides", "padding"))
            pads = [p[end] for end in (0, 1) for p in padding]
            name = node("MaxPool", inputs, kernel_shape=window, strides=strides, pads=pads)
        elif op.kind == "sum":
            name = node("Flatten", [node("GlobalAveragePool", inputs)])
        elif op.kind == "reshape":
            flat[op.outputs[0]] = model.tensors[op.inputs[0]].shape[1:]
            name = node("Flatten", inputs)
        else:
            raise ValueError(f"{op.path}: no float form of {op.kind} is written here.")
        names[op.outputs[0]] = node("Relu", [name]) if _has_relu(model, op) else name
    output = names[model.outputs[0]]
    kind = onnx.TensorProto.FLOAT
    shapes = [["batch", *source.shape[1:]], ["batch", *model.tensors[model.outputs[0]].shape[1:]]]
    ends = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, shape in zip(("input", output), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "float", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 19)]
    with atomic_file(path, ".onnx") as file:
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file)


class _TFLite:
    """Tensors and operators of a file to be."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.kinds: list[str] = []

    def tensor(self, shape: Sequence[int], value: np.ndarray | None = None) -> int:
        tensor = schema.TensorT()
        is_int = value is not None and value.dtype == np.int32
        tensor.type = schema.TensorType.INT32 if is_int else schema.TensorType.FLOAT32
        tensor.name, tensor.buffer = f"tensor_{len(self.tensors)}", 0
        tensor.shape = [abs(d) for d in shape]
        if any(d < 0 for d in shape):
            tensor.shapeSignature = [max(d, -1) for d in shape]
        if value is not None:
            buffer: Any = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, value: ArrayLike, dtype: DTypeLike = np.float32) -> int:
        value = np.asarray(value, dtype)
        return self.tensor(value.shape, value)

    def operator(
        self, kind: str, options: str, inputs: list[int], shape: Sequence[int], **values: Any
    ) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
        operator = schema.OperatorT()
        operator.opcodeIndex = self.kinds.index(kind)
        operator.inputs, operator.outputs = inputs, [self.tensor(shape)]
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
        operator.builtinOptions = getattr(schema, f"{options}T")()
        vars(operator.builtinOptions).update(values)
        self.operators.append(operator)
        return operator.outputs[0]

    def file(self, source: int, output: int) -> bytes:
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = [source], [output]
        model.version, model.subgraphs, model.buffers = 3, [graph], self.buffers
        model.operatorCodes = []
        for kind in self.kinds:
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
            code.version = 1
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def _is_same(size: int, window: int, stride: int, padding: Sequence[int]) -> bool:
    total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return tuple(padding) == (total // 2, total - total // 2)


def write_tflite(model: sq.IntegerModel, path: Path) -> None:
    """Write the float network for LiteRT: channels last.

    Args:
      model: with operations of LeNet-5 and ResNets only.
      path: of the file.

    Raises:
      ValueError: another operation.
    """
    w = _TFLite()
    source = model.inputs[0]
    numbers = {source: w.tensor(model.tensors[source].shape)}

    def padded(
        i: int, window: Sequence[int], strides: Sequence[int], padding: Sequence[Sequence[int]]
    ) -> tuple[int, int]:
        """Return the input and the padding of the operator itself.

        What is padded in front of a max pool is never negative: zeros do.
        """
        shape = model.tensors[i].shape
        if not any(map(any, padding)):
            return numbers[i], schema.Padding.VALID
        if all(map(_is_same, shape[1:3], window, strides, padding)):
            return numbers[i], schema.Padding.SAME
        pads = [(0, 0), *padding, (0, 0)]
        grown = [d + sum(p) for d, p in zip(shape, pads, strict=True)]
        x = w.operator("PAD", "PadOptions", [numbers[i], w.constant(pads, np.int32)], grown)
        return x, schema.Padding.VALID

    for op in model.ops:
        a, inputs = op.attributes, [numbers[i] for i in op.inputs]
        shape = model.tensors[op.outputs[0]].shape
        functions = schema.ActivationFunctionType
        relu = functions.RELU if _has_relu(model, op) else functions.NONE
        fused = {"fusedActivationFunction": relu}
        if op.kind == "conv" and a["groups"] == 1:
            kernel, bias = _weights(model, op)
            x, pad = padded(op.inputs[0], kernel.shape[:2], a["strides"], a["padding"])
            fused |= {"padding": pad, "strideH": a["strides"][0], "strideW": a["strides"][1]}
            fused |= {"dilationHFactor": 1, "dilationWFactor": 1}
            weights = [w.constant(kernel.transpose(3, 0, 1, 2)), w.constant(bias)]
            out = w.operator("CONV_2D", "Conv2DOptions", [x, *weights], shape, **fused)
        elif op.kind == "dense":
            kernel, bias = _weights(model, op)
            weights = [w.constant(kernel.T), w.constant(bias)]
            inputs += weights
            out = w.operator("FULLY_CONNECTED", "FullyConnectedOptions", inputs, shape, **fused)
        elif op.kind in ("add", "add_onnx"):
            out = w.operator("ADD", "AddOptions", inputs, shape, **fused)
        elif op.kind == "max_pool":
            window, strides, padding = (a[k][1:-1] for k in ("window", "strides", "padding"))
            x, pad = padded(op.inputs[0], window, strides, padding)
            fused |= {"padding": pad, "strideH": strides[0], "strideW": strides[1]}
            fused |= {"filterHeight": window[0], "filterWidth": window[1]}
            out = w.operator("MAX_POOL_2D", "Pool2DOptions", [x], shape, **fused)
        elif op.kind == "sum":
            inputs.append(w.constant(a["axes"], np.int32))
            out = w.operator("MEAN", "ReducerOptions", inputs, shape, keepDims=False)
        elif op.kind == "reshape":
            target = [max(d, -1) for d in shape]
            inputs.append(w.constant(target, np.int32))
            out = w.operator("RESHAPE", "ReshapeOptions", inputs, shape, newShape=target)
        else:
            raise ValueError(f"{op.path}: no float form of {op.kind} is written here.")
        numbers[op.outputs[0]] = out
    with atomic_file(path, ".tflite") as file:
        file.write(w.file(numbers[source], numbers[model.outputs[0]]))
