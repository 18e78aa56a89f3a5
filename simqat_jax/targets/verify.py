"""Count the codes of an exported file that are not those of its integer model."""

import argparse
import dataclasses
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.files import as_path
from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.arguments import check_real, check_whole
from simqat_jax.targets.data import read_data
from simqat_jax.targets.open_file import TIMEOUT, open_file, target_of
from simqat_jax.targets.target import OpenFile, check_model

_MOST_PARTS = 6
_CODES_OR_REALS = ("int8", "uint8", "float32")


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; print it, or take `to_dict()`.

    Attributes:
      path: the file.
      runtime: what ran it, with its version.
      examples: how many examples it ran.
      codes: how many output codes were compared.
      differing: how many of them are not the model's.
      first_layer: path of the first operation whose codes differ, None where none does.
      values: how many output values were compared that are no codes.
      differing_values: how many of them are not the model's.
      largest_difference: between two of them.
      float_parts: what the model computes in float, by path with its operations: runtimes agree
        about sums, products and quotients, and differ in the last digits of all else.
    """

    path: str
    runtime: str
    examples: int
    codes: int
    differing: int
    first_layer: str | None
    values: int = 0
    differing_values: int = 0
    largest_difference: float = 0.0
    float_parts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, text and numbers, as JSON holds them."""
        return dataclasses.asdict(self) | {"float_parts": list(self.float_parts)}

    def __repr__(self) -> str:
        return (
            f"Verification({self.differing:,} of {self.codes:,} codes of {self.path} differ in "
            f"{self.runtime})"
        )

    def __str__(self) -> str:
        where = f"; the first in {self.first_layer}" if self.first_layer else ""
        lines = [
            f"{self.path} in {self.runtime}: {self.differing:,} of {self.codes:,} codes differ "
            f"({self.examples:,} examples){where}."
        ]
        if self.values:
            lines.append(
                f"Of {self.values:,} values that are no codes {self.differing_values:,} differ, by "
                f"{self.largest_difference:.3g} at most."
            )
        if self.float_parts:
            shown, rest = self.float_parts[:_MOST_PARTS], len(self.float_parts) - _MOST_PARTS
            more = f" and {rest} more" if rest > 0 else ""
            lines.append(f"In float: {'; '.join(shown)}{more}.")
        return "\n".join(lines)


def verify(
    model: IntegerModel,
    path: str | os.PathLike[str],
    *data: ArrayLike,
    batch_size: int = 64,
    timeout: float | None = TIMEOUT,
) -> Verification:
    """Run an exported file and count the output codes that are not the integer model's.

    The file runs in a process of its own, see `open_file`: one that makes its runtime crash, or run
    for ever, is a ValueError.

    Args:
      model: what the file was written from.
      path: a file of `export_onnx` (*.onnx) or `export_tflite` (*.tflite).
      data: arrays in real units, one for each input of the model (arrays by keyword last, sorted),
        as many examples as wanted.
      batch_size: examples a call; the model's own where that is fixed.
      timeout: seconds that opening the file, and each call, may take; None: any.

    Returns:
      A Verification.

    Raises:
      TypeError: an argument of the wrong type.
      FileNotFoundError: no such file.
      ValueError: a damaged file, one of another kind or another model, or that takes longer than
        `timeout`; data that hold no examples or NaN, a `batch_size` below 1.
      ImportError: the extra `export` is missing.
    """
    check_model(model, "verify(model, path, x)")
    path = as_path(path)
    check_whole("batch_size", batch_size, 1)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    runtime = _opened(model, path, timeout)
    for array in data:
        check_real("data", array)
    arrays = [np.asarray(a) for a in data]
    found: list[_Compared] = []
    first = None
    for batch in _batches(model, arrays, batch_size):
        found.append(_compared(model, runtime, path, batch))
        if first is None and any(map(np.any, found[-1].codes)):
            first = _first_layer(model, path, batch, timeout)
    codes = [x for compared in found for x in compared.codes]
    gaps = [x for compared in found for x in compared.gaps]
    return Verification(
        path=str(path),
        runtime=runtime.name,
        examples=len(arrays[0]),
        codes=sum(x.size for x in codes),
        differing=int(sum(map(np.sum, codes))),
        first_layer=first,
        values=sum(x.size for x in gaps),
        differing_values=int(sum(map(np.count_nonzero, gaps))),
        largest_difference=max((float(x.max(initial=0)) for x in gaps), default=0.0),
        float_parts=_float_parts(model.program),
    )


def _opened(model: IntegerModel, path: Path, timeout: float | None) -> OpenFile:
    """Open a file of a model.

    Raises:
      ValueError: it has other inputs.
    """
    runtime = open_file(path, timeout=timeout)
    types, tensors = runtime.input_types, [model.tensors[i] for i in model.inputs]
    if len(types) != len(tensors):
        raise ValueError(
            f"{path} takes {len(types)} inputs and the model {len(tensors)}: it was written from "
            "another model."
        )
    for kind, tensor in zip(types, tensors, strict=True):
        if tensor.grid is not None and kind not in _CODES_OR_REALS:
            raise ValueError(
                f"{path} takes {kind} for {tensor.name}, which is no type of codes: it was written "
                "from another model."
            )
    return runtime


class _Compared(NamedTuple):
    """Outputs of a file next to the model's.

    Attributes:
      codes: for each output of codes which of them differ.
      gaps: for each other output how far its values are apart.
    """

    codes: list[np.ndarray]
    gaps: list[np.ndarray]


def _float_parts(program: Program) -> tuple[str, ...]:
    """Return each path with what is computed in float there."""
    kinds: dict[str, dict[str, None]] = defaultdict(dict)
    for op in program.float_ops:
        kinds[op.path][op.kind] = None
    return tuple(f"{path} ({', '.join(names)})" for path, names in kinds.items())


def _batches(
    model: IntegerModel, arrays: Sequence[np.ndarray], size: int
) -> list[list[np.ndarray]]:
    if len(arrays) != len(model.inputs):
        raise ValueError(f"the model takes {len(model.inputs)} arrays, got {len(arrays)}.")
    if any(not a.shape or not len(a) for a in arrays):
        raise ValueError("the data hold no examples.")
    counts = {len(a) for a in arrays}
    if len(counts) > 1:
        raise ValueError(f"the data hold different numbers of examples: {sorted(counts)}.")
    for i, a in zip(model.inputs, arrays, strict=True):
        if np.issubdtype(a.dtype, np.floating) and np.isnan(a).any():
            raise ValueError(f"{model.tensors[i].name}: the data hold NaN, which has no code.")
    if all(d >= 0 for i in model.inputs for d in model.tensors[i].shape):
        return [list(arrays)]
    starts = range(0, len(arrays[0]), size)
    return [[a[start : start + size] for a in arrays] for start in starts]


def _compared(
    model: IntegerModel, runtime: OpenFile, path: Path, batch: Sequence[np.ndarray]
) -> _Compared:
    """Run the file and the model.

    Raises:
      ValueError: the file returns other outputs, or cannot run.
    """
    codes = model._quantized(batch)
    arrays = []
    for i, x, code, kind in zip(model.inputs, batch, codes, runtime.input_types, strict=True):
        grid = model.tensors[i].grid
        if grid is None:
            arrays.append(np.asarray(code))
        elif kind == "float32":
            arrays.append(np.asarray(x, np.float32))
        else:
            arrays.append(grid.in_file(code, kind))
    want, found = jax.tree.leaves(model.run_codes(*codes)), runtime.run(arrays)
    shapes = [x.shape for x in want], [x.shape for x in found]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{path} returns arrays of shapes {shapes[1]} and the model {shapes[0]}: it is "
            "damaged, or written from another model. Export the model again."
        )
    compared = _Compared([], [])
    for i, a, b in zip(model.outputs, want, found, strict=True):
        grid = model.tensors[i].grid
        if grid is None:
            compared.gaps.append(_gap(np.asarray(a, np.float64), np.asarray(b, np.float64)))
            continue
        if np.issubdtype(b.dtype, np.floating):
            got = np.asarray(grid.quantize(jnp.asarray(b)), np.int32)  # exact: on the grid
        else:
            got = grid.of_file(b)
        compared.codes.append(np.asarray(a, np.int32) != got)
    return compared


def _gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how far values are apart: 0 where both are the same infinity or none a number."""
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = np.abs(np.subtract(a, b, where=~same, out=np.zeros(a.shape)))
    return np.where(np.isnan(gap), np.inf, gap)


def _first_layer(
    model: IntegerModel, path: Path, batch: Sequence[np.ndarray], timeout: float | None
) -> str:
    """Write the model again with every tensor an output, and return where codes first differ."""
    ops = [op for op in model.ops if model.tensors[op.outputs[0]].grid is not None]
    outputs = [op.outputs[0] for op in ops]
    program = dataclasses.replace(
        model.program, outputs=tuple(outputs), structure=list(range(len(outputs)))
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"whole{path.suffix}"
        target = target_of(path)
        whole.write_bytes(target.write(program, target.dtype, None))
        runtime = open_file(whole, timeout=timeout)
        wrong = _compared(IntegerModel(program), runtime, whole, batch).codes
    for op, differ in zip(ops, wrong, strict=True):
        if differ.any():
            return op.path
    return "none of the model's own: the file is not written from this model"


def verify_files(
    model: Path, files: Sequence[Path], data: Sequence[Path], timeout: float | None = TIMEOUT
) -> int:
    """Print what `verify` finds in each of several files.

    Args:
      model: an integer model's file.
      files: written from it.
      data: its inputs, see `read_data`.
      timeout: seconds that each file may take to open, and for each call.

    Returns:
      0 where all codes are equal, 1 where some differ.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no file to verify, or one that cannot be read or checked.
    """
    if not files:
        raise ValueError("give the *.onnx or *.tflite files to verify, behind the model.")
    integer = IntegerModel.load(model)
    arrays = read_data(integer, data)
    status = 0
    for file in files:
        found = verify(integer, file, *arrays, timeout=timeout)
        print(found)
        status = max(status, int(found.differing > 0))
    return status


class _OneLine(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `simqat-verify MODEL FILE --data DATA`, an alias of `simqat verify`.

    Returns:
      0 where all codes are equal, 1 where some differ, 2 where something could not be checked;
      then one line says why.
    """
    parser = _OneLine(prog="simqat-verify", description=__doc__)
    parser.add_argument("model", type=Path, help="an integer model, as IntegerModel.save wrote it")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="file", help="*.onnx or *.tflite, written from it"
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="inputs in real units, *.npy or *.npz"
    )
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT, help="seconds to open a file, and for each call"
    )
    options = parser.parse_args(arguments)
    try:
        return verify_files(options.model, options.files, options.data, options.timeout)
    except Exception as error:  # a runtime raises errors of its own for a file that it cannot read
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"simqat-verify: could not check: {reason}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
