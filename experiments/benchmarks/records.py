"""What benchmarks report: a table on the screen, and a history as JSON lines."""

import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.benchmarks.timing import Figure
from experiments.errors import ExperimentError

HISTORY = Path("runs/benchmarks.jsonl")
"""Where benchmarks add what they measure."""
_WIDTH = 200
"""Of a table that goes into a file."""
_PACKAGES = ("jax", "flax", "numpy", "onnxruntime", "ai-edge-litert", "openvino")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one thing.

    Attributes:
      case: what it is, as model and batch size.
      figures: by name and unit, of which less is better: "step, ms". Names with a "/" are ratios of
        one process, which another machine may have too.
    """

    case: Mapping[str, str]
    figures: Mapping[str, Figure]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A row, and where it is from.

    Attributes:
      benchmark: the command's name.
      row: what was measured.
      commit: the first digits of the commit, with a "+" where files differ from it.
      machine: processor, and how many of its cores.
      versions: of what was measured with.
      when: the time, UTC.
    """

    benchmark: str
    row: Row
    commit: str
    machine: str
    versions: Mapping[str, str]
    when: str

    @property
    def key(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What the same is called in another record."""
        return self.benchmark, tuple(self.row.case.items())


def report(benchmark: str, title: str, rows: Sequence[Row], history: Path | None) -> None:
    """Print a table of rows, and add them to a history.

    Args:
      benchmark: the command's name.
      title: of the table.
      rows: all with the same keys of `case`.
      history: the file; None: add them nowhere.
    """
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _WIDTH
    Console(width=width).print(_table(title, rows))
    if history is None:
        return
    origin = {"commit": _commit(), "machine": _machine(), "versions": _versions()}
    origin |= {"benchmark": benchmark, "when": datetime.now(UTC).isoformat(timespec="seconds")}
    records = [Record(row=row, **origin) for row in rows]
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("a") as file:
        file.writelines(json.dumps(dataclasses.asdict(record)) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    """Return the records of a history, oldest first.

    Raises:
      ExperimentError: it is none.
    """
    try:
        lines = path.read_text().splitlines()
        return [_record(json.loads(line)) for line in lines if line.strip()]
    except FileNotFoundError as error:
        raise ExperimentError(
            f"{path} does not exist. Benchmarks write it: run one, or name another --history."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ExperimentError(
            f"{path} is no history of benchmarks: {error}. Remove the line, or name another file."
        ) from error


def _record(known: dict) -> Record:
    row = known.pop("row")
    figures = {name: Figure(**figure) for name, figure in row["figures"].items()}
    return Record(row=Row(case=row["case"], figures=figures), **known)


def _table(title: str, rows: Sequence[Row]) -> Table:
    cases = list(rows[0].case)
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    table = Table(*cases, title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        figures = (row.figures.get(name) for name in names)
        table.add_row(*row.case.values(), *("" if f is None else text(f) for f in figures))
    return table


def text(figure: Figure) -> str:
    """Write a figure: its median, and its quartiles where they are others."""
    if figure.low == figure.high:
        return _digits(figure.median)
    return f"{_digits(figure.median)} ({_digits(figure.low)}-{_digits(figure.high)})"


def _digits(value: float) -> str:
    """Write three digits or more."""
    for decimals in range(3):
        if abs(value) >= 100 / 10**decimals or (decimals == 0 and value == int(value)):
            return f"{value:,.{decimals}f}"
    return f"{value:.3f}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=10", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
