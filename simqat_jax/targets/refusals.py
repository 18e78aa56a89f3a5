"""What stands in the way of a file: all at once, by kind, with a remedy for where it stands."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np

from simqat_jax.ir.program import Op, Program
from simqat_jax.ops.floats import FloatOp, MoveOp, Quantize

_MOST_KINDS, _MOST_PATHS = 8, 3
IN_FRONT, BETWEEN, BEHIND = "in front of the layers", "between layers", "behind the layers"
OTHER_FILE = (
    'Write it for ONNX Runtime, with export_onnx(convert(..., backend="onnx"), path), or run the '
    "integer model itself (IntegerModel.save)."
)
"""A remedy for what TFLite alone cannot hold."""
_REMEDIES = {
    IN_FRONT: "Move it out of the model: compute it on the input, and give the model the result.",
    BEHIND: "Move it out of the model: return what it reads, and compute it on the file's output.",
    BETWEEN: (
        "Replace it by what runs on integers (BatchNorm, relu, gelu, mean ...), or run the integer "
        "model itself (IntegerModel.save), which computes this in float. Exclusion does not help."
    ),
}


class RefusedError(ValueError):
    """An operation that a file cannot hold exactly."""

    def __init__(self, op: Op, problem: str, remedy: str):
        super().__init__(f"{op.path}: {problem} (operation {op.kind!r}). {remedy}")
        self.op, self.problem, self.remedy = op, problem, remedy


def refuse(op: Op, problem: str, remedy: str) -> NoReturn:
    """Raise RefusedError for an operation that a file cannot hold exactly."""
    raise RefusedError(op, problem, remedy)


def refuse_float(program: Program, op: Op) -> NoReturn:
    """Raise RefusedError for what has no form in integers, with a remedy for where it stands."""
    where = place(program, op)
    what = (
        "moves codes in a way that no file holds" if isinstance(op, MoveOp) else "computed in float"
    )
    refuse(op, f"{what}, {where}", _REMEDIES[where])


def refuse_wide(program: Program, op: Op) -> None:
    """Raise RefusedError for weights or activations of more than 8 bits."""
    if op.arrays.get("kernel", np.zeros((), np.int8)).dtype != np.int8:
        remedy = "Use SimQATConfig(weight=QuantSpec(num_bits=8, ...)) or fewer bits."
        refuse(op, "its weights have more than 8 bits", remedy)
    grids = [program.tensors[i].grid for i in (*op.inputs, *op.outputs)]
    if any(grid is not None and grid.dtype.itemsize > 1 for grid in grids):
        remedy = "Use SimQATConfig(activation=QuantSpec(num_bits=8, ...)) or fewer bits."
        refuse(op, "its activations have more than 8 bits", remedy)


def place(program: Program, op: Op) -> str:
    """Return where an operation stands: before all layers on integers, behind them or between."""
    before, after = set(op.inputs), set(op.outputs)
    above = below = False
    at = program.ops.index(op)
    for other in reversed(program.ops[:at]):
        if not before.isdisjoint(other.outputs):
            above = above or _is_layer(other)
            before.update(other.inputs)
    for other in program.ops[at + 1 :]:
        if not after.isdisjoint(other.inputs):
            below = below or _is_layer(other)
            after.update(other.outputs)
    if above and below:
        return BETWEEN
    return BEHIND if above else IN_FRONT


def _is_layer(op: Op) -> bool:
    return not isinstance(op, FloatOp | Quantize)


def each(ops: Sequence[Op], act: Callable[[Op], None], file: str) -> None:
    """Do something for every operation; raise ValueError for all refusals together.

    What depends on a refused operation is left out: it would be refused for that alone.
    """
    refused, unknown = [], set[int]()
    for op in ops:
        if unknown.isdisjoint(op.inputs):
            try:
                act(op)
                continue
            except RefusedError as error:
                refused.append(error)
        unknown.update(op.outputs)
    raise_all(refused, file)


def check(ops: Iterable[Op], act: Callable[[Op], None], file: str) -> None:
    """Check every operation, whatever it depends on; raise ValueError for all refusals together."""
    refused = []
    for op in ops:
        try:
            act(op)
        except RefusedError as error:
            refused.append(error)
    raise_all(refused, file)


@dataclasses.dataclass(frozen=True)
class _Kind:
    what: str
    problem: str
    remedy: str


def raise_all(refused: Sequence[RefusedError], file: str) -> None:
    """Raise ValueError for refusals, one line a kind; the only one there is by itself."""
    if not refused:
        return
    if len(refused) == 1:
        raise refused[0]
    kinds = _by_kind(refused)
    groups: dict[str, list[str]] = defaultdict(list)
    for kind, paths in kinds.items():
        groups[kind.remedy].append(f"  {kind.what} {len(paths)}x, {kind.problem}: {_listed(paths)}")
    lines = [f"{len(refused)} operations have no exact form in {file}."]
    room = _MOST_KINDS
    for remedy, of_remedy in groups.items():
        if room > 0:
            lines += [*of_remedy[:room], remedy]
        room -= len(of_remedy)
    if room < 0:
        lines.append(f"And {-room} more kinds.")
    raise ValueError("\n".join(lines))


def _by_kind(refused: Sequence[RefusedError]) -> dict[_Kind, list[str]]:
    """Return the modules of each kind; what a module refuses several times is one of a kind."""
    modules: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for error in refused:
        module, _, name = error.op.path.rpartition("/")
        if not isinstance(error.op, FloatOp):
            module, name = error.op.path, error.op.kind
        modules[module, error.problem, error.remedy].append(name)
    kinds: dict[_Kind, list[str]] = defaultdict(list)
    for (module, problem, remedy), names in modules.items():
        unique = list(dict.fromkeys(names))
        what = unique[0]
        if len(unique) > 1:
            owner = re.sub(r"_?\d+$", "", module.rpartition("/")[2]) or "the model's own"
            what = f"{owner} ({_listed(unique)})"
        kinds[_Kind(what, problem, remedy)].append(module or "the model")
    return kinds


def _listed(paths: Sequence[str]) -> str:
    unique = list(dict.fromkeys(paths))
    rest = len(unique) - _MOST_PATHS
    return ", ".join(unique[:_MOST_PATHS]) + (f" and {rest} more" if rest > 0 else "")
