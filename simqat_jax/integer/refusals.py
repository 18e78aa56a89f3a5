"""What cannot be held: all at once, by kind, with a remedy for where it stands."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence

from simqat_jax.ir.program import Op, Program
from simqat_jax.ops.floats import FloatOp, Quantize
from simqat_jax.ops.primitives import Primitive

_MOST_KINDS, _MOST_PATHS = 8, 3
IN_FRONT, BETWEEN, BEHIND = "in front of the layers", "between layers", "behind the layers"
MOVE_OUT = {
    IN_FRONT: "Move it out of the model: compute it on the input, and give the model the result.",
    BEHIND: "Move it out of the model: return what it reads, and compute it on the result.",
}
"""Remedies for what does not stand between layers."""
REPLACE = "Replace it by what runs on integers (BatchNorm, relu, gelu, mean ...)"
"""The remedy for what does."""


class RefusedError(ValueError):
    """An operation that a program or a file cannot hold."""

    def __init__(self, op: Op, problem: str, remedy: str):
        super().__init__(f"{op.path}: {problem} (operation {op.kind!r}). {remedy}")
        self.op, self.problem, self.remedy = op, problem, remedy


def refuse_float_parts(program: Program) -> None:
    """Raise ValueError where a program computes on real values, all such operations together."""
    allow = 'or allow it with SimQATConfig(float_parts="allow")'
    refused = []
    for op in program.float_ops:
        where = place(program, op)
        remedy = f"{MOVE_OUT.get(where, REPLACE).rstrip('.')}, {allow}."
        refused.append(RefusedError(op, f"computed in float, {where}", remedy))
    raise_all(refused, "integers")


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
    return not isinstance(op, FloatOp | Primitive | Quantize)


@dataclasses.dataclass(frozen=True)
class _Kind:
    what: str
    problem: str
    remedy: str


def raise_all(refused: Sequence[RefusedError], form: str) -> None:
    """Raise ValueError for refusals, one line a kind; the only one there is by itself.

    Args:
      refused: what is refused.
      form: what it has none in: "ONNX".
    """
    if not refused:
        return
    if len(refused) == 1:
        raise refused[0]
    kinds = _by_kind(refused)
    groups: dict[str, list[str]] = defaultdict(list)
    for kind, paths in kinds.items():
        groups[kind.remedy].append(f"  {kind.what} {len(paths)}x, {kind.problem}: {_listed(paths)}")
    lines = [f"{len(refused)} operations have no exact form in {form}."]
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
        if not isinstance(error.op, FloatOp | Primitive):
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
