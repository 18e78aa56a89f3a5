"""The whole ONNX file: the graph of a program between its inputs and its outputs."""

import json
from collections.abc import Callable

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.targets.onnx.writer import OnnxObject, Writer
from simqat_jax.targets.refusals import each

_OPSET, _IR_VERSION = 19, 9


class Message:
    """A program as a message of ONNX.

    Attributes:
      writer: of its operations.
      io: the type of codes that go in and out; None: they are real values.
    """

    def __init__(self, program: Program, io: np.dtype | None):
        self.writer, self.io = Writer(program), io

    def model(self, write: Callable[[Writer, Op], None]) -> OnnxObject:
        """Return the model; `write` writes one operation."""
        w, source = self.writer, self.writer.model
        inputs = [self._input(source.tensors[i], i) for i in source.inputs]
        each(source.ops, lambda op: write(w, op), "ONNX")
        outputs = [
            self._output(name, source.tensors[i], i)
            for name, i in zip(w.outputs, source.outputs, strict=True)
        ]
        helper = w.helper
        graph = helper.make_graph(w.nodes, "simqat_jax", inputs, outputs, w.initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="simqat_jax",
            producer_version=str(source.metadata.get("simqat_jax", "")),
        )
        metadata = {
            k: v if isinstance(v, str) else json.dumps(v, separators=(",", ":"))
            for k, v in source.metadata.items()
        }
        helper.set_model_props(model, metadata)
        return model

    def checked_bytes(self, model: OnnxObject) -> bytes:
        """Return a model as a file holds it."""
        self.writer.onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()

    def _input(self, tensor: Tensor, i: int) -> OnnxObject:
        """Add an input of the file, quantized where it takes real values."""
        w, codes = self.writer, tensor.name
        if tensor.grid is not None and self.io is None:
            codes = w.quantize(tensor.name, tensor)
        elif tensor.grid is not None and self.io != np.uint8:
            real = w.node("DequantizeLinear", [codes, *self._outer_scale(tensor)], tensor.name)
            codes = w.node("QuantizeLinear", [real, *w.scale(tensor)], tensor.name)
        w.put(i, codes)
        return self._info(tensor.name, tensor)

    def _output(self, name: str, tensor: Tensor, i: int) -> OnnxObject:
        """Add an output of the file, dequantized where it returns real values."""
        w = self.writer
        kind, inputs = "Identity", [w.get(i)]
        if tensor.grid is not None and self.io is None:
            kind, inputs = "DequantizeLinear", [*inputs, *w.scale(tensor)]
        elif tensor.grid is not None and self.io != np.uint8:
            real = w.dequantize(inputs[0], tensor)
            kind, inputs = "QuantizeLinear", [real, *self._outer_scale(tensor)]
        w.nodes.append(w.helper.make_node(kind, inputs, [name]))
        return self._info(name, tensor)

    def _outer_scale(self, tensor: Tensor) -> tuple[str, str]:
        """Return the names of scale and zero point of codes as they go in or out.

        Between two types of codes with one scale `rint(k * scale / scale)` is k: both roundings
        together are off by less than a thousandth.
        """
        assert self.io is not None, "real values have none"
        grid = self.writer.grid(tensor)
        zero = np.asarray(grid.zero_point + grid.offset_in(self.io), self.io)
        scale, _ = self.writer.scale(tensor)
        return scale, self.writer.initializer(zero, f"{tensor.name}/zero")

    def _info(self, name: str, tensor: Tensor) -> OnnxObject:
        """Describe an input or output of the file: name, type, shape."""
        helper, types = self.writer.helper, self.writer.onnx.TensorProto
        if tensor.grid is None:
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        else:
            kind = types.FLOAT if self.io is None else getattr(types, self.io.name.upper())
        shape = ["batch" if d == -1 else f"{-d}*batch" if d < 0 else d for d in tensor.shape]
        return helper.make_tensor_value_info(name, kind, shape)
