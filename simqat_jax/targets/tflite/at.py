"""A primitive on its way into a TFLite file."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike

from simqat_jax.ir.program import Shape, Tensor
from simqat_jax.ops.primitives import Primitive
from simqat_jax.targets.refusals import check_shape, refuse_primitive
from simqat_jax.targets.tflite.subgraph import Codes, Plain, reshape_target
from simqat_jax.targets.tflite.writer import Writer


@dataclasses.dataclass(frozen=True)
class At:
    """A primitive that is being written."""

    w: Writer
    op: Primitive

    @property
    def params(self) -> Mapping[str, Any]:
        """Its parameters."""
        return self.op.params

    def output(self, position: int = 0) -> Tensor:
        """Return what it makes."""
        return self.w.source.tensors[self.op.outputs[position]]

    def make(
        self,
        name: str,
        *inputs: Plain | Codes,
        shape: Shape | None = None,
        dtype: str = "",
        **options: Any,
    ) -> Plain:
        """Add an operator; by default it makes a tensor like the primitive's output."""
        shape = self.output().shape if shape is None else shape
        made = self.w.plain(self.op.path, shape, dtype or self.output().dtype)
        self.w.emit(name, [x.index for x in inputs], made.index, **options)
        return made

    def number(self, value: ArrayLike, dtype: str = "float32") -> Plain:
        """Add a constant."""
        value = np.asarray(value, dtype)
        return Plain(self.w.constant(value, value.dtype), value.shape, dtype)

    def ints(self, values: ArrayLike) -> Plain:
        """Add a constant of int32."""
        return self.number(values, "int32")

    def reshaped(self, x: Plain, shape: Sequence[int]) -> Plain:
        """Return the same values in another shape."""
        if tuple(shape) == x.shape:
            return x
        check_shape(self.op, shape)
        target = reshape_target(shape)
        return self.make("RESHAPE", x, shape=tuple(shape), dtype=x.dtype, newShape=target)

    def transposed(self, x: Plain, order: Sequence[int]) -> Plain:
        """Return the same values with the axes in another order."""
        if list(order) == sorted(order):
            return x
        shape = tuple(x.shape[k] for k in order)
        return self.make("TRANSPOSE", x, self.ints(order), shape=shape, dtype=x.dtype)

    def cast(self, x: Plain, dtype: str) -> Plain:
        """Convert to another type."""
        if x.dtype == dtype:
            return x
        return Plain(self.w.cast(x.index, x.shape, np.dtype(dtype)), x.shape, dtype)

    def refuse(self, problem: str) -> NoReturn:
        """Raise RefusedError for what LiteRT lacks."""
        refuse_primitive(self.w.source, self.op, problem)
