"""What is in a file of any origin: its operations, the types that they compute on, its inputs."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from simqat_jax.ir.sheet import Line, Sheet, some
from simqat_jax.ir.table import Column
from simqat_jax.targets.metadata import Codes, Described, FileMetadata, kind_text, notes

_COLUMNS = (
    Column("layer", "path"),
    Column("operator", "words"),
    Column("shape", "words"),
    Column("type"),
    Column("weights", "words"),
    Column("bytes"),
)


@dataclasses.dataclass(frozen=True)
class FileEnd:
    """An input or output of a file.

    Attributes:
      name: as the file has it.
      shape: its lengths, -1 where any will do; None where the file does not say.
      dtype: of NumPy, by name.
      codes: what its codes stand for, or those that are made of it first, or it is made of last;
        None: it lies on no grid, or has several.
    """

    name: str
    shape: tuple[int, ...] | None
    dtype: str
    codes: Codes | None = None


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
      outputs: what it returns.
      ops: its operators, in order, but for those that quantize and dequantize.
      conversions: how many operators quantize or dequantize.
      nodes: all operators that can be told from others.
      said: what it says of itself; None: nothing.
    """

    inputs: tuple[FileEnd, ...]
    outputs: tuple[FileEnd, ...]
    ops: tuple[FileOp, ...]
    conversions: int
    nodes: tuple[FileNode, ...]
    said: Described | None = None

    def notes(self, *, whole: bool = False) -> tuple[str, ...]:
        """Return what it says of itself, in lines; `whole`: with all labels."""
        return () if self.said is None else tuple(notes(*self.said, whole=whole))


def sheet_of(listing: Listing, path: Path, *, whole: bool = False) -> Sheet:
    """Return a listing as a table to print; `whole`: with all labels above it."""
    lines = [_of_end(end, "input") for end in listing.inputs]
    lines += [_of_op(op) for op in listing.ops]
    lines += [_of_end(end, "output") for end in listing.outputs]
    floats = [op.name for op in listing.ops if op.is_float]
    foot = [
        f"{len(listing.ops)} operators, {len(floats)} of them on real numbers, and "
        f"{listing.conversions} that quantize or dequantize; {path.stat().st_size:,} bytes."
    ]
    foot += [f"float: {some(floats)}."] if floats else []
    return Sheet(listing.notes(whole=whole), _COLUMNS, tuple(lines), tuple(foot))


def said_by(read: Callable[[], Described]) -> Described:
    """Return what a file says of itself; where that cannot be read, why."""
    try:
        return read()
    except Exception as error:  # metadata may be of any origin, and damaged
        reason = " ".join(str(error).split())
        return FileMetadata(description=f"Its metadata cannot be read: {reason}"), []


def _of_end(end: FileEnd, kind: str) -> Line:
    shape = _shape_text(end.shape)
    more = (f"{kind} {shape}", kind_text(end.dtype, end.codes))
    return Line((end.name, kind, shape, end.dtype, "", ""), more)


def _of_op(op: FileOp) -> Line:
    shape, size = _shape_text(op.shape), f"{op.nbytes:,}" if op.nbytes else ""
    widest = max(op.weights, key=len, default="")
    more = (f"{op.kind} {shape} {op.dtype}", *(f"weights: {text}" for text in op.weights))
    return Line((op.name, op.kind, shape, op.dtype, widest, size), more, op.is_float)


def _shape_text(shape: Sequence[int] | None) -> str:
    return "" if shape is None else shape_text(shape)


def shape_text(shape: Sequence[int]) -> str:
    """Write a shape, with "any" for a length that is free."""
    return f"({', '.join('any' if d < 0 else str(d) for d in shape)})"
