"""Build an ONNX graph: nodes, initializers, and tensors of codes in two layouts."""

import hashlib
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from simqat_jax.files import import_extra
from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.packing import pack, packed_width, unpack

_WORTH_PACKING = 512
"""Kernels of so many codes save more bytes than the nodes that unpack them take."""
OnnxObject = Any
"""A message of ONNX, which has no types."""
_DEFAULTS = {"pads": 0, "strides": 1, "dilations": 1, "group": 1}
_FEW = 16
"""Constants of so few numbers bear the name of what they belong to."""
LAST, FIRST = "channels last", "channels first"
Layout = str
"""Where channels are."""


class Writer:
    """Collects the nodes of a graph."""

    def __init__(self, model: Program):
        self.onnx = import_extra("onnx")
        self.helper = import_extra("onnx.helper")
        self.numpy = import_extra("onnx.numpy_helper")
        self.model = model
        self.nodes: list[OnnxObject] = []
        self.initializers: list[OnnxObject] = []
        self.constants: dict[Hashable, str] = {}
        self.outputs = model.output_names()
        self.names = {*self.outputs, *(model.tensors[i].name for i in model.inputs)}
        self.scales: dict[Grid, tuple[str, str]] = {}
        # For each tensor the names under which it was written, by layout.
        self.written: dict[int, dict[Layout, str]] = {}
        # For each tensor of codes the name of its real values.
        self.reals: dict[int, str] = {}

    # Pieces of a graph -----------------------------------------------------------------------

    def name(self, stem: str) -> str:
        """Return a name that nothing in the graph has yet."""
        stem = stem or "main"
        names = itertools.chain([stem], (f"{stem}:{n}" for n in itertools.count(2)))
        name = next(name for name in names if name not in self.names)
        self.names.add(name)
        return name

    def node(
        self, kind: str, inputs: Sequence[str], stem: str, **attributes: ArrayLike | str
    ) -> str:
        """Add a node without defaults or a name besides its output's: the bytes count."""
        output = self.name(stem)
        given = {
            k: v
            for k, v in attributes.items()
            if k not in _DEFAULTS or np.any(np.not_equal(v, _DEFAULTS[k]))
        }
        self.nodes.append(self.helper.make_node(kind, list(inputs), [output], **given))
        return output

    def initializer(self, value: ArrayLike, stem: str) -> str:
        """Add a constant, large ones once; return its name."""
        value = np.array(value, order="C")
        key = (value.dtype, value.shape, hashlib.sha256(value.data).digest())
        if value.size > _FEW and key in self.constants:
            return self.constants[key]
        name = self.constants[key] = self.name(stem)
        self.initializers.append(self.numpy.from_array(value, name))
        return name

    def ints(self, values: Sequence[int], stem: str) -> str:
        """Add a constant of int64: ONNX takes shapes, axes and bounds as tensors."""
        return self.initializer(np.asarray(values, np.int64), stem)

    def grid(self, tensor: Tensor) -> Grid:
        """Return the grid of a tensor; raise ValueError where it has none of at most 8 bits."""
        grid = tensor.grid
        if grid is None or grid.dtype.itemsize > 1:
            width = "no grid" if grid is None else f"codes of type {grid.dtype}"
            raise ValueError(
                f"{tensor.name} has {width}, and the ONNX file is written with 8 bits. Use "
                "QuantSpec(num_bits=8) or less."
            )
        return grid

    def quantize(self, real: str, tensor: Tensor) -> str:
        """Quantize real values; clip where the grid is narrower than uint8."""
        name = self.node("QuantizeLinear", [real, *self.scale(tensor)], tensor.name)
        return self.clip(name, tensor, (self.grid(tensor).qmin, self.grid(tensor).qmax))

    def dequantize(self, codes: str, tensor: Tensor) -> str:
        """Dequantize codes: the front half of a QDQ pair."""
        return self.node("DequantizeLinear", [codes, *self.scale(tensor)], tensor.name)

    def scale(self, tensor: Tensor) -> tuple[str, str]:
        """Return the names of scale and zero point, one pair for each grid."""
        grid = self.grid(tensor)
        if grid not in self.scales:
            self.scales[grid] = (
                self.initializer(np.float32(grid.scale), f"{tensor.name}/scale"),
                self.initializer(
                    np.uint8(grid.zero_point + grid.unsigned_offset), f"{tensor.name}/zero"
                ),
            )
        return self.scales[grid]

    def clip(self, codes: str, tensor: Tensor, clamp: Sequence[int]) -> str:
        """Clip codes, unless the type does."""
        lo, hi = (v + self.grid(tensor).unsigned_offset for v in clamp)
        if (lo, hi) == (0, 255):
            return codes
        ends = [self.initializer(np.uint8(v), f"{tensor.name}/clip") for v in (lo, hi)]
        return self.node("Clip", [codes, *ends], tensor.name)

    # Tensors in one layout or another --------------------------------------------------------

    def put(self, i: int, name: str, layout: Layout = LAST) -> None:
        """Note down under which name a tensor has been written in a layout."""
        self.written.setdefault(i, {})[layout] = name

    def get(self, i: int, layout: Layout = LAST) -> str:
        """Return the name of a tensor's codes in a layout; write them so where they are not."""
        names, tensor = self.written.setdefault(i, {}), self.model.tensors[i]
        if not names:
            held = self.initializer(_codes(self, tensor), tensor.name)
            names[LAST] = _repeated(self, held, tensor) if tensor.repeats else held
        if layout not in names:
            rank = len(tensor.shape)
            to_first = (0, rank - 1, *range(1, rank - 1))
            order = to_first if layout == FIRST else tuple(np.argsort(to_first))
            source = names[LAST if layout == FIRST else FIRST]
            names[layout] = self.node("Transpose", [source], tensor.name, perm=order)
        return names[layout]

    def layouts(self, i: int) -> dict[Layout, str]:
        """Return the names under which a tensor is written, by layout."""
        if not self.written.get(i):
            self.get(i)
        return self.written[i]

    def layout(self, op: Op) -> str:
        """Return the layout in which an operation that works in both costs no transposition."""
        tensors = [self.model.tensors[i] for i in (*op.inputs, *op.outputs)]
        ranks = {len(t.shape) for t in tensors}
        written = [self.written.get(i, {}) for i in op.inputs]
        first = any(FIRST in names for names in written)
        return FIRST if first and len(ranks) == 1 and min(ranks) > 2 else LAST

    def operand(self, op: Op, position: int, layout: Layout) -> str:
        """Return the codes of an input of an operation in a layout, as long as it takes them."""
        i = op.inputs[position]
        thin = self.model.reads_thin(op, i)
        return _held(self, self.model.tensors[i], layout) if thin else self.get(i, layout)

    def finish(self, op: Op, real: str, layout: Layout, clamp: Sequence[int]) -> None:
        """Quantize the real result of an operation."""
        output = self.model.tensors[op.outputs[0]]
        name = self.node("QuantizeLinear", [real, *self.scale(output)], output.name)
        self.put(op.outputs[0], self.clip(name, output, clamp), layout)


def dequantized(w: Writer, op: Op, position: int, layout: Layout) -> str:
    """Return an input of an operation in real units, in a layout."""
    return w.dequantize(w.operand(op, position, layout), w.model.tensors[op.inputs[position]])


def _codes(w: Writer, tensor: Tensor) -> np.ndarray:
    """Return a constant's codes as they are stored, uint8; without a grid its values."""
    assert tensor.value is not None
    if tensor.grid is None:
        return tensor.value
    return (tensor.value.astype(np.int32) + w.grid(tensor).unsigned_offset).astype(np.uint8)


def _held(w: Writer, tensor: Tensor, layout: Layout) -> str:
    """Write a constant that repeats along the batch as it is held, of length 1 there."""
    codes = _codes(w, tensor)
    return w.initializer(np.moveaxis(codes, -1, 1) if layout == FIRST else codes, tensor.name)


def _repeated(w: Writer, held: str, tensor: Tensor) -> str:
    """Repeat a constant along the batch, whose size is that of the first input that has it."""
    source, axis = next(
        (w.model.tensors[i].name, axis)
        for i in w.model.inputs
        for axis, d in enumerate(w.model.tensors[i].shape)
        if d == -1
    )
    size = w.node("Shape", [source], tensor.name, start=axis, end=axis + 1)
    where = w.ints([int(d < 0) for d in tensor.shape], tensor.name)
    lengths = w.node("Pow", [size, where], tensor.name)  # 1 where the batch is not
    return w.node("Expand", [held, lengths], tensor.name)


def looked_up(w: Writer, table: np.ndarray, index: str, shape: Sequence[int], stem: str) -> str:
    """Look numbers up in a table; `shape`: of the indices, int32, with -1 for the batch size.

    As one row of a table with one row, which takes ONNX Runtime a sixteenth of Gather's time.
    """
    flat = w.node("Reshape", [index, w.ints([1, -1], stem)], stem)
    found = w.node("GatherElements", [w.initializer(table[None], stem), flat], stem, axis=1)
    return w.node("Reshape", [found, w.ints(shape, stem)], stem)


def kernel_codes(w: Writer, op: Op, codes: np.ndarray) -> str:
    """Write a kernel; codes of at most 4 bits packed, and looked up in a table byte by byte.

    ONNX Runtime looks them up once, as it opens the file. INT4 would be no other than that: nothing
    multiplies it by uint8, and version 1.22 does not cast it.
    """
    width, name, stem = packed_width(codes), f"{op.path}/kernel", op.path
    if width is None or codes.size < _WORTH_PACKING:
        return w.initializer(codes, name)
    packed, count = pack(codes, width), 8 // width
    key = (width, codes.shape, packed.tobytes())
    if key in w.constants:
        return w.constants[key]
    table = unpack(np.arange(256, dtype=np.uint8), width, (256, count))
    index = w.node("Cast", [w.initializer(packed, name)], stem, to=w.onnx.TensorProto.INT32)
    found = w.node("Gather", [w.initializer(table, "unpacked"), index], stem)
    if packed.size * count > codes.size:  # codes do not fill the last byte
        flat = w.node("Reshape", [found, w.ints([-1], stem)], stem)
        found = w.node("Slice", [flat, w.ints([0], stem), w.ints([codes.size], stem)], stem)
    w.constants[key] = w.node("Reshape", [found, w.ints(codes.shape, stem)], stem)
    return w.constants[key]


def quotient(w: Writer, number: ArrayLike, divisor: str, stem: str) -> str:
    """Divide a number: of `x * (1 / y)` ONNX Runtime makes `x / y`, but not of `x * -(-1 / y)`."""
    return w.node(
        "Neg",
        [w.node("Div", [w.initializer(-np.asarray(number, np.float32), stem), divisor], stem)],
        stem,
    )
