"""A primitive on its way into an ONNX graph."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from simqat_jax.ir.program import Shape, Tensor
from simqat_jax.ops.primitives import Primitive
from simqat_jax.targets.onnx.writer import Writer
from simqat_jax.targets.refusals import check_shape, refuse_primitive


@dataclasses.dataclass(frozen=True)
class At:
    """A primitive that is being written."""

    w: Writer
    op: Primitive

    @property
    def inputs(self) -> list[Tensor]:
        """What it reads."""
        return [self.w.model.tensors[i] for i in self.op.inputs]

    @property
    def output(self) -> Tensor:
        """What it makes; of several the first."""
        return self.w.model.tensors[self.op.outputs[0]]

    @property
    def params(self) -> Mapping[str, Any]:
        """Its parameters."""
        return self.op.params

    @property
    def is_bool(self) -> bool:
        """Whether it reads truth values."""
        return self.inputs[0].dtype == "bool"

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add a node."""
        return self.w.node(kind, inputs, self.op.path, **attributes)

    def number(self, value: ArrayLike, dtype: str = "float32") -> str:
        """Add a constant."""
        return self.w.initializer(np.asarray(value, dtype), self.op.path)

    def ints(self, values: Sequence[int]) -> str:
        """Add a constant of int64."""
        return self.w.ints(values, self.op.path)

    def cast(self, x: str, dtype: str) -> str:
        """Convert to another type."""
        return self.node("Cast", x, to=self.w.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshaped(self, x: str, shape: Shape) -> str:
        """Return the same values in another shape."""
        check_shape(self.op, shape)
        return self.node("Reshape", x, self.ints([-1 if d < 0 else d for d in shape]))

    def refuse(self, problem: str) -> NoReturn:
        """Raise RefusedError for what ONNX Runtime lacks."""
        refuse_primitive(self.w.model, self.op, problem)


def real_values(w: Writer, i: int) -> str:
    """Return the name of a tensor's real values, made of codes with plain nodes.

    ONNX Runtime takes a DequantizeLinear, an operator and a QuantizeLinear for one operator on
    integers, which rounds in another way.
    """
    tensor = w.model.tensors[i]
    if tensor.grid is None:
        return w.get(i)
    if i not in w.reals:
        grid = w.grid(tensor)
        real = w.node("Cast", [w.get(i)], tensor.name, to=w.onnx.TensorProto.FLOAT)
        ends = np.float32(grid.zero_point + grid.unsigned_offset), np.float32(grid.scale)
        for kind, value in zip(("Sub", "Mul"), ends, strict=True):
            real = w.node(kind, [real, w.initializer(value, tensor.name)], tensor.name)
        w.reals[i] = real
    return w.reals[i]
