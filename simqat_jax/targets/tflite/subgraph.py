"""The one subgraph of a TFLite file: tensors, buffers and operators."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from simqat_jax.ir.program import Op
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.packing import pack, packed_width
from simqat_jax.targets.refusals import OTHER_FILE, refuse

_ACTIVATIONS = {
    "NONE": (-math.inf, math.inf),
    "RELU": (0.0, math.inf),
    "RELU6": (0.0, 6.0),
    "RELU_N1_TO_1": (-1.0, 1.0),
}
_LARGEST = np.float32(255.75)
_INT4_WIDTH, _INT4_VERSION = 4, 10  # the first version of FULLY_CONNECTED that takes it
_TYPES = {np.float32: "FLOAT32", np.int8: "INT8", np.uint8: "UINT8", np.int32: "INT32"}
_TYPES |= {np.bool_: "BOOL"}


SchemaObject = Any
"""An object of the schema, which has no types."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A tensor of the file: its number, its shape (-k: k times the batch size), its grid."""

    index: int
    shape: tuple[int, ...]
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Plain:
    """A tensor of the file that has no grid: its number, its shape, its type."""

    index: int
    shape: tuple[int, ...]
    dtype: str


class Subgraph:
    """Collects tensors and operators.

    Attributes:
      schema: the module of LiteRT's schema classes, which have no types.
      versions: of each operator that may be emitted its options and its version.
    """

    def __init__(self, schema: ModuleType, versions: Mapping[str, tuple[str | None, int]]):
        self.schema, self.versions = schema, versions
        self.tensors: list[SchemaObject] = []
        self.buffers: list[SchemaObject] = [schema.BufferT()]
        self.operators: list[SchemaObject] = []
        self.opcodes: dict[str, int] = {}
        self.needed: dict[str, int] = {}  # later versions, of operators that need one

    def opcode(self, name: str) -> SchemaObject:
        """Return the entry of an operator in the list of those that the file uses."""
        code, value = self.schema.OperatorCodeT(), getattr(self.schema.BuiltinOperator, name)
        code.builtinCode, code.deprecatedBuiltinCode = value, min(value, 127)
        code.version = self.needed.get(name, self.versions[name][1])
        return code

    # Tensors ---------------------------------------------------------------------------------

    def tensor(
        self,
        name: str | None,
        shape: Sequence[int],
        dtype: DTypeLike,
        scale: ArrayLike | None = None,
        zero_point: int = 0,
        axis: int = 0,
        value: np.ndarray | None = None,
    ) -> int:
        """Add a tensor; return its number.

        In `shape`, -k stands for k times the batch size. `scale` and `zero_point` are those of
        codes as they are stored, along `axis`; `value` is what a constant holds.
        """
        s, tensor = self.schema, self.schema.TensorT()
        tensor.name, tensor.type = name, getattr(s.TensorType, _TYPES[np.dtype(dtype).type])
        tensor.shape = np.abs(np.asarray(shape, np.int32))
        if any(d < 0 for d in shape):
            tensor.shapeSignature = np.maximum(np.asarray(shape, np.int32), -1)
        if scale is not None:
            scale = np.atleast_1d(np.asarray(scale, np.float32))
            tensor.quantization = s.QuantizationParametersT()
            tensor.quantization.scale = scale
            tensor.quantization.zeroPoint = np.full(scale.size, zero_point, np.int64)
            tensor.quantization.quantizedDimension = axis
        tensor.buffer = 0
        if value is not None:
            buffer = s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def constant(self, value: ArrayLike, dtype: DTypeLike = np.int32, **grid: Any) -> int:
        """Return a tensor without a name: its one reader has one."""
        value = np.asarray(value, dtype)
        return self.tensor(None, value.shape, dtype, value=value, **grid)

    def codes(self, name: str, shape: Sequence[int], grid: Grid) -> Codes:
        """Add a tensor of int8 codes."""
        index = self.tensor(name, shape, np.int8, grid.scale, grid.stored_zero)
        return Codes(index, tuple(shape), grid)

    def code_constant(self, codes: ArrayLike, grid: Grid) -> Codes:
        """Add a constant of codes, given as the grid counts them; stored as int8."""
        value = np.asarray(codes, np.int32) - grid.offset
        quantized = {"scale": grid.scale, "zero_point": grid.stored_zero}
        return Codes(self.constant(value, np.int8, **quantized), value.shape, grid)

    def weights(
        self, op: Op, x: Codes, y: Codes, kernel: np.ndarray, scale: np.ndarray, axis: int
    ) -> list[int]:
        """Write kernel and bias; `f32(s_x * s_w) / s_y` must be the operation's multiplier.

        XNNPACK takes multipliers under 256. From 255 on every sum but zero ends at the lowest or
        the highest code, so that a smaller one gives the same codes.
        """
        scale = np.asarray(scale, np.float32)
        ratio = np.float32(x.grid.scale) * scale / np.float32(y.grid.scale)
        scale = np.where(ratio < _LARGEST, scale, scale * (_LARGEST / ratio)).astype(np.float32)
        bias = op.arrays.get("bias", np.zeros(scale.shape, np.int32))
        packed = is_packed(x.grid, kernel, bias)
        if not packed and (scale == scale[0]).all():  # INT4 has a scale for each channel
            scale = scale[:1]
        unit = np.float32(x.grid.scale) * scale
        held = self.constant(kernel, np.int8, scale=scale, axis=axis)
        if packed:
            self.pack(held, kernel)
        return [held, self.constant(bias, np.int32, scale=unit)]

    def pack(self, held: int, kernel: np.ndarray) -> None:
        """Hold a fully connected layer's kernel of at most 4 bits as INT4."""
        tensor = self.tensors[held]
        tensor.type = self.schema.TensorType.INT4
        self.buffers[tensor.buffer].data = pack(kernel, _INT4_WIDTH)
        self.needed["FULLY_CONNECTED"] = _INT4_VERSION

    # Operators -------------------------------------------------------------------------------

    def emit(
        self, name: str, inputs: Sequence[int], output: int | Sequence[int], **options: Any
    ) -> None:
        """Add an operator of one output or several; `options` are fields of its schema class."""
        s, operator = self.schema, self.schema.OperatorT()
        operator.opcodeIndex = self.opcodes.setdefault(name, len(self.opcodes))
        operator.inputs = list(inputs)
        operator.outputs = [output] if isinstance(output, int) else list(output)
        kind = self.versions[name][0]
        if kind is not None:
            operator.builtinOptionsType = getattr(s.BuiltinOptions, kind)
            operator.builtinOptions = getattr(s, kind + "T")()
            for key, value in options.items():
                assert hasattr(operator.builtinOptions, key), (name, key)
                setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)

    def clamped(
        self,
        op: Op,
        name: str,
        inputs: Sequence[int],
        y: Codes,
        clamp: Sequence[int],
        **options: Any,
    ) -> None:
        """Emit an operator whose codes end at the operation's clamp."""
        limits = stored(clamp, y.grid)
        fused = (a for a in _ACTIVATIONS if activation_codes(a, y.grid) == limits)
        activation = next(fused, None)
        functions = self.schema.ActivationFunctionType
        options["fusedActivationFunction"] = getattr(functions, activation or "NONE")
        free = y if activation else self.codes(f"{op.path}/unclamped", y.shape, y.grid)
        self.emit(name, inputs, free.index, **options)
        if not activation:
            self.limit(free, limits, y)

    def limit(self, x: Codes, limits: tuple[int, int], y: Codes) -> None:
        """Clip codes, as they are stored."""
        needed = [
            (name, end)
            for name, end, free in (("MAXIMUM", limits[0], -128), ("MINIMUM", limits[1], 127))
            if end != free
        ]
        for position, (name, end) in enumerate(needed):
            last = position == len(needed) - 1
            out = y if last else self.codes("clipped", x.shape, x.grid)
            bound = self.code_constant(end + x.grid.offset, x.grid)
            self.emit(name, [x.index, bound.index], out.index)
            x = out
        if not needed:
            self.reshape(x, y.shape, y)

    def reshape(self, x: Codes, shape: Sequence[int], y: Codes | None = None) -> Codes:
        """Return the same codes in another shape; `y`: the tensor to write them to."""
        if y is None and x.shape == tuple(shape):
            return x
        y = y or self.codes("reshaped", shape, x.grid)
        self.emit("RESHAPE", [x.index], y.index, newShape=reshape_target(shape))
        return y

    def cast(self, x: int, shape: Sequence[int], target: DTypeLike) -> int:
        """Return the values of a tensor in another type."""
        y = self.tensor(None, shape, target)
        types = {"inDataType": self.tensors[x].type, "outDataType": self.tensors[y].type}
        self.emit("CAST", [x], y, **types)
        return y

    def strided_slice(
        self,
        x: Codes | Plain,
        start: Sequence[int],
        limit: Sequence[int | None],
        strides: Sequence[int],
        y: Codes | Plain,
    ) -> None:
        """Slice each axis; a limit of None is its end."""
        bounds = [self.constant(v) for v in (start, [b or 0 for b in limit], strides)]
        masks = {
            "beginMask": sum(1 << k for k, b in enumerate(start) if b == 0),
            "endMask": sum(1 << k for k, b in enumerate(limit) if b is None),
        }
        self.emit(
            "STRIDED_SLICE",
            [x.index, *bounds],
            y.index,
            ellipsisMask=0,
            newAxisMask=0,
            shrinkAxisMask=0,
            **masks,
        )


def is_packed(x: Grid, kernel: np.ndarray, bias: np.ndarray) -> bool:
    """Whether XNNPACK computes the codes of a layer with a kernel of type INT4.

    It has INT4 for fully connected layers alone, `kernel` of shape (outputs, inputs), with rows of
    whole bytes; there it adds up 16 times each product in int32.
    """
    if kernel.ndim != 2 or kernel.shape[1] % 2 or packed_width(kernel) is None:
        return False
    sums = np.abs(kernel.astype(np.int64)).sum(1) * x.largest + np.abs(bias.astype(np.int64))
    return bool(16 * sums.max() < 2**31)


def check_ratio(op: Op, ratios: ArrayLike, least: float, most: float = 256.0) -> None:
    """Refuse ratios of scales beyond those that XNNPACK takes: `least <= ratio < most`."""
    for ratio in np.ravel(ratios):
        if not least <= ratio < most:
            refuse(
                op,
                f"an input's scale is {ratio:.3g} times its output's, and XNNPACK takes "
                f"{least:.3g} to {most:.3g}",
                OTHER_FILE,
            )


def stored(clamp: Sequence[int], grid: Grid) -> tuple[int, int]:
    """Return the ends of an operation's codes, as they are stored."""
    lo, hi = clamp
    return int(lo) - grid.offset, int(hi) - grid.offset


def activation_codes(activation: str, grid: Grid) -> tuple[int, int]:
    """Return the lowest and highest code that an activation leaves, as they are stored."""
    lo, hi = (
        np.clip(np.rint(np.float32(b) / np.float32(grid.scale)) + grid.stored_zero, -128, 127)
        for b in _ACTIVATIONS[activation]
    )
    return int(lo), int(hi)


def reshape_target(shape: Sequence[int]) -> np.ndarray:
    """Return a shape as RESHAPE takes it: -1 for a length that depends on the batch size."""
    return np.maximum(np.asarray(shape, np.int32), -1)
