"""What is in a file of any origin: its operations, the types that they compute on, its inputs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from simqat_jax.ir.sheet import Column, Line, Sheet, some
from simqat_jax.targets.metadata import Described, notes

_COLUMNS = (
    Column("layer", "end"),
    Column("operator", "start"),
    Column("shape", "start"),
    Column("type"),
    Column("weights", "start"),
    Column("bytes"),
)


@dataclasses.dataclass(frozen=True)
class FileInput:
    """An input of a file.

    Attributes:
      name: as the file has it.
      shape: its lengths, -1 where any will do.
      dtype: of NumPy, by name.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class FileOp:
    """An operator of a file.

    Attributes:
      name: of its first output, else its kind.
      kind: the operator.
      shape: of its first output, -1 where any length will do; None where the file does not say.
      dtype: what it computes on: "int8"; of a convolution between dequantization and quantization
        the type of the codes.
      weights: its constants, each by its type and shape: "int8 (5, 5, 1, 6)".
      nbytes: bytes of its constants.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    dtype: str
    weights: tuple[str, ...]
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether it computes on real numbers."""
        return "float" in self.dtype


@dataclasses.dataclass(frozen=True)
class FileNode:
    """An operator, as programs that draw files know it.

    Attributes:
      key: what Model Explorer calls it, or its first output.
      tensor: the name of its first output; where that is quantized next, that of the codes.
    """

    key: str
    tensor: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """What is in a file.

    Attributes:
      inputs: what it takes.
      ops: its operators, in order, but for those that quantize and dequantize.
      conversions: how many operators quantize or dequantize.
      nodes: all operators that can be told from others.
      notes: what it says of itself, in lines.
    """

    inputs: tuple[FileInput, ...]
    ops: tuple[FileOp, ...]
    conversions: int
    nodes: tuple[FileNode, ...]
    notes: tuple[str, ...] = ()


def sheet_of(listing: Listing, path: Path) -> Sheet:
    """Return a listing as a table to print."""
    lines = [_line(i.name, "input", i.shape, i.dtype) for i in listing.inputs]
    lines += [_of_op(op) for op in listing.ops]
    floats = [op.name for op in listing.ops if op.is_float]
    foot = [
        f"{len(listing.ops)} operators, {len(floats)} of them on real numbers, and "
        f"{listing.conversions} that quantize or dequantize; {path.stat().st_size:,} bytes."
    ]
    foot += [f"float: {some(floats)}."] if floats else []
    return Sheet(listing.notes, _COLUMNS, tuple(lines), tuple(foot))


def notes_of(read: Callable[[], Described]) -> tuple[str, ...]:
    """Return what a file says of itself, in lines; where that cannot be read, why."""
    try:
        return tuple(notes(*read()))
    except Exception as error:  # metadata may be of any origin, and damaged
        return (f"Its metadata cannot be read: {' '.join(str(error).split())}",)


def _of_op(op: FileOp) -> Line:
    size = f"{op.nbytes:,}" if op.nbytes else ""
    widest = max(op.weights, key=len, default="")
    line = _line(op.name, op.kind, op.shape, op.dtype, widest, size)
    return dataclasses.replace(line, more=op.weights, is_float=op.is_float)


def _line(
    name: str,
    kind: str,
    shape: Sequence[int] | None,
    dtype: str,
    weights: str = "",
    size: str = "",
) -> Line:
    return Line((name, kind, "" if shape is None else shape_text(shape), dtype, weights, size))


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, with "any" for a length that is free."""
    return f"({', '.join('any' if d < 0 else str(d) for d in shape)})"
