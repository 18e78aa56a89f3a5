"""Show what became slower or larger from one commit to another, beyond what it spreads.

Benchmarks add what they measure to a history, `runs/benchmarks.jsonl`. A and B are commits in it
(their first digits), or other files of the same form.

Example:
  python -m experiments.benchmarks.train_step --models lenet5   # at commit A, then at B
  python -m experiments.benchmarks.compare A B
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.records import HISTORY, Record, read, text
from experiments.benchmarks.timing import Figure
from experiments.errors import ExperimentError, run_or_exit

_LEAST = 0.02
"""Changes below are none: clocks and counters are not better than that."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of both.

    Attributes:
      what: benchmark, case and the figure's name.
      before: of A.
      after: of B.
    """

    what: str
    before: Figure
    after: Figure

    @property
    def ratio(self) -> float:
        """What the median has become, relative to before."""
        if self.before.median == 0:
            return 1.0 if self.after.median == 0 else float("inf")
        return self.after.median / self.before.median

    @property
    def slower(self) -> bool:
        """Whether the middle halves lie apart, and B's is above."""
        return self.after.low > self.before.high and self.ratio > 1 + _LEAST

    @property
    def faster(self) -> bool:
        """Whether the middle halves lie apart, and B's is below."""
        return self.after.high < self.before.low and self.ratio < 1 - _LEAST


def changes(before: Sequence[Record], after: Sequence[Record]) -> list[Change]:
    """Return the figures that both have; the newest where one has several.

    Times and sizes of different machines or versions are left out; ratios are not.
    """
    old = {record.key: record for record in before}
    found = []
    for key, record in {record.key: record for record in after}.items():
        base = old.get(key)
        if base is None:
            continue
        alike = (base.machine, base.versions) == (record.machine, record.versions)
        case = ", ".join(f"{name} {value}" for name, value in record.row.case.items())
        found += [
            Change(
                what=f"{record.benchmark}: {case}: {name}", before=base.row.figures[name], after=f
            )
            for name, f in record.row.figures.items()
            if name in base.row.figures and (alike or "/" in name)
        ]
    return found


def records_of(name: str, history: Path) -> list[Record]:
    """Return the records of a commit in the history, or of a file.

    Raises:
      ExperimentError: there are none.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        return read(path)
    known = read(history)
    found = [record for record in known if record.commit.startswith(name)]
    if not found:
        commits = ", ".join(dict.fromkeys(record.commit for record in known))
        raise ExperimentError(f"{history} has no commit {name}: it has {commits or 'none'}.")
    return found


def compare(a: str, b: str, history: Path, everything: bool) -> bool:
    """Print what changed; return whether something became slower.

    Raises:
      ExperimentError: A or B is unknown, or they have nothing in common.
    """
    found = changes(records_of(a, history), records_of(b, history))
    if not found:
        raise ExperimentError(
            f"{a} and {b} have no figure in common. Run the same benchmark at both, on one machine."
        )
    shown = [c for c in found if everything or c.slower or c.faster]
    slower = sum(c.slower for c in found)
    table = Table("", a, b, "ratio", "", title=f"{slower} of {len(found)} figures slower or larger")
    for c in sorted(shown, key=lambda c: -c.ratio):
        word = "slower" if c.slower else "faster" if c.faster else ""
        table.add_row(c.what, text(c.before), text(c.after), f"{c.ratio:.2f}", word)
    Console().print(table)
    return slower > 0


def main(
    a: Annotated[str, tyro.conf.Positional],
    b: Annotated[str, tyro.conf.Positional],
    history: Path = HISTORY,
    everything: bool = False,
) -> None:
    """Compare two commits of a history; exits with 1 where something became slower.

    Args:
      a: a commit, or a file of JSON lines.
      b: likewise, the later one.
      history: where commits are looked for.
      everything: also show what stayed.
    """
    if compare(a, b, history, everything):
        raise SystemExit(1)


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))
