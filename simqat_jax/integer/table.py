"""The printed integer model: its operations, their outputs and sizes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from simqat_jax.ir.program import Op, Program, Tensor
from simqat_jax.ir.sheet import Line, Sheet, number, some
from simqat_jax.ir.table import Column
from simqat_jax.numerics.packing import packed_width

_COLUMNS = (
    Column("layer", "path"),
    Column("kind", "words"),
    Column("shape", "words"),
    Column("weight"),
    Column("output", "words"),
    Column("bytes"),
)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, with the batch size by name."""
    dims = ["batch" if d == -1 else f"{-d}*batch" if d < 0 else str(d) for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


class Shown:
    """What holds a program, as a terminal, a notebook and other tools see it.

    Attributes:
      program: what it computes, as data.
    """

    program: Program

    def __repr__(self) -> str:
        return f"{type(self).__name__}({summary(self.program)})"

    def __str__(self) -> str:
        return sheet(self.program).text()

    def _repr_html_(self) -> str:
        return sheet(self.program).html()

    def details(self) -> str:
        """Return all that is known of each operation, as text to print: scales and arrays."""
        shown = sheet(self.program)
        return shown.details(shown.lines)

    def to_dict(self) -> dict[str, Any]:
        """Return what it is, without the values of its arrays, as JSON holds it."""
        return as_dict(self.program)


def sheet(program: Program) -> Sheet:
    """Return a line for each input and operation, with sums below."""
    floats = set(map(id, program.float_ops))
    lines = [_input(program.tensors[i]) for i in program.inputs]
    lines += [_line(program, op, is_float=id(op) in floats) for op in program.ops]
    return Sheet((), _COLUMNS, tuple(lines), tuple(_foot(program)))


def summary(program: Program) -> str:
    """Say in a few words what a program is."""
    return (
        f"{len(program.ops)} operations, {len(program.float_ops)} of them in float; "
        f"{program.nbytes:,} bytes; rounding as in {program.backend}"
    )


def as_dict(program: Program) -> dict[str, Any]:
    """Return what a program is, without the values of its arrays, as JSON holds it."""
    floats = set(map(id, program.float_ops))
    return {
        "backend": program.backend,
        "nbytes": program.nbytes,
        "inputs": list(program.inputs),
        "outputs": list(program.outputs),
        "output_names": list(program.output_names()),
        "tensors": [_tensor_dict(tensor) for tensor in program.tensors],
        "ops": [
            {
                "path": op.path,
                "kind": op.kind,
                "float": id(op) in floats,
                "inputs": list(op.inputs),
                "outputs": list(op.outputs),
                "attributes": op.attributes,
                "arrays": {name: _array_dict(array) for name, array in op.arrays.items()},
                "nbytes": op.nbytes,
            }
            for op in program.ops
        ],
    }


def _tensor_dict(tensor: Tensor) -> dict[str, Any]:
    grid = tensor.grid
    codes = None
    if grid is not None:
        codes = {"scale": float(grid.scale), "zero_point": int(grid.zero_point)}
        codes |= {"qmin": grid.qmin, "qmax": grid.qmax, "num_bits": grid.num_bits}
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "grid": codes,
        "constant": tensor.value is not None,
    }


def _array_dict(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "num_bits": _bits(array)}


def _bits(array: np.ndarray) -> int:
    """Return how many bits an element takes in a file."""
    return packed_width(array) or 8 * array.dtype.itemsize


def _input(tensor: Tensor) -> Line:
    cells = (tensor.name, "input", shape_text(tensor.shape), "", _codes(tensor), "")
    return Line(cells, (f"output: {_described(tensor)}",))


def _line(program: Program, op: Op, *, is_float: bool) -> Line:
    tensor = program.tensors[op.outputs[0]]
    constants = (program.tensors[i].value for i in op.inputs)
    size = op.nbytes + sum(value.nbytes for value in constants if value is not None)
    cells = (
        op.path,
        f"{op.kind} (float)" if is_float else op.kind,
        shape_text(tensor.shape),
        f"{_bits(op.arrays['kernel'])} bits" if "kernel" in op.arrays else "",
        _codes(tensor),
        f"{size:,}" if size else "",
    )
    more = [f"output: {tensor.name} {_described(tensor)}"]
    more += [
        f"{name}: {shape_text(array.shape)}, {array.dtype}, {_bits(array)} bits an element"
        for name, array in op.arrays.items()
    ]
    return Line(cells, tuple(more), is_float)


def _codes(tensor: Tensor) -> str:
    """Write the width of the codes and the real values of the lowest and the highest."""
    grid = tensor.grid
    if grid is None:
        return tensor.dtype
    ends = [(code - int(grid.zero_point)) * float(grid.scale) for code in (grid.qmin, grid.qmax)]
    return f"{grid.num_bits} bits [{number(ends[0])}, {number(ends[1])}]"


def _described(tensor: Tensor) -> str:
    grid = tensor.grid
    text = f"{shape_text(tensor.shape)}, {_codes(tensor)}"
    if grid is None:
        return text
    return f"{text}, scale {grid.scale:.9g}, zero point {grid.zero_point}"


def _foot(program: Program) -> Iterator[str]:
    yield f"{summary(program)}."
    paths = list(dict.fromkeys(op.path for op in program.float_ops))
    if paths:
        yield f"float: {some(paths)}."
