"""Write an analysis as a page of HTML that needs no network."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

from simqat_jax.analysis.drawings import clipped_counts, marked_codes, write_pngs
from simqat_jax.analysis.measurement import Measurement, check_measurements
from simqat_jax.analysis.measures import decibels
from simqat_jax.analysis.result import Analysis, RangeAt, TensorAnalysis
from simqat_jax.files import as_path, atomic_file, import_extra
from simqat_jax.numerics.arguments import check_kind, check_mapping

_WIDTH, _HEIGHT = 64, 24
"""Of a drawing, in its own units."""


def report(
    analysis: Analysis,
    path: str | os.PathLike[str],
    *,
    title: str = "Why accuracy moved",
    measurements: Sequence[Measurement] = (),
    facts: Mapping[str, object] | None = None,
    pngs: str | os.PathLike[str] | None = None,
) -> None:
    """Write one HTML file that holds all that an analysis found.

    It opens from disk and fetches nothing: no fonts, no scripts.

    Args:
      analysis: what `analyze` returned, or `Analysis.load`.
      path: of the file; one that exists is replaced.
      title: the page's heading.
      measurements: what was measured of the float model, the quantized one, its file ..., each
        compared with the first.
      facts: what else it is to say on top, by name: `{"data": "1,000 digits"}`.
      pngs: a folder to which its figures are written besides, as "layers.png" and others; it is
        made if it is not there.

    Raises:
      TypeError: no Analysis, no path, no measurements, no dictionary of facts.
      ImportError: the extra `report` is not installed.
      FileNotFoundError: there is no directory to write it to.
    """
    check_kind("analysis", analysis, Analysis, "analyze(...) returns one.")
    facts = {} if facts is None else facts
    check_mapping("facts", facts, "Write facts={'data': '1,000 digits'}, for example.")
    check_measurements(measurements)
    target = as_path(path)
    jinja2 = import_extra("jinja2", "report")
    source = files("simqat_jax.analysis").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = _columns(measurements)
    page = environment.from_string(source).render(
        title=title,
        facts=facts,
        analysis=analysis,
        titles=list(columns),
        models=[(m.name, [c[n] for c in columns.values()]) for n, m in enumerate(measurements)],
        longest=_longest([layer.alone_quantized for layer in analysis.layers]),
        largest=_longest([layer.gain for layer in analysis.layers]),
        drawings={name: _drawing(tensor) for name, tensor in analysis.tensors.items()},
        curves={name: _curve(points) for name, points in analysis.ranges.items() if points},
        decibels=decibels,
        isfinite=math.isfinite,
    )
    with atomic_file(target) as file:
        file.write(page.lstrip().encode())
    if pngs is not None:
        write_pngs(analysis, measurements, as_path(pngs))


class _Cell(NamedTuple):
    """A figure of a model.

    Attributes:
      text: the figure.
      note: what it is against the first model's.
      share: of the length of a bar.
    """

    text: str = ""
    note: str = ""
    share: float = 0.0


def _columns(models: Sequence[Measurement]) -> dict[str, list[_Cell]]:
    """Return what was measured, by the title of a column: a cell for each model."""
    columns = {
        "accuracy": [_accuracy(m.accuracy, models[0].accuracy) for m in models],
        "size": _ratios([m.nbytes for m in models], "{:,} bytes"),
        "latency, p50": _ratios([m.p50_ms for m in models], "{:.3g} ms"),
        "latency, p99": _ratios([m.p99_ms for m in models], "{:.3g} ms"),
    }
    return {title: cells for title, cells in columns.items() if any(c.text for c in cells)}


def _accuracy(value: float | None, first: float | None) -> _Cell:
    if value is None:
        return _Cell()
    same = first is None or value == first
    note = "" if same or first is None else f"{100 * (value - first):+.2f} points"
    return _Cell(f"{100 * value:.2f} %", note, value)


def _ratios(values: Sequence[float | None], form: str) -> list[_Cell]:
    most = max((v for v in values if v is not None), default=0) or 1
    first = values[0] if values else None

    def one(value: float | None) -> _Cell:
        if value is None:
            return _Cell()
        note = f"{value / first:.2f} times" if first and value != first else ""
        return _Cell(form.format(value), note, value / most)

    return [one(value) for value in values]


class _Drawing(NamedTuple):
    """A histogram over its grid.

    Attributes:
      bars: the path of an SVG.
      outside: likewise, of what lies below and above the grid.
      ticks: likewise, of marks below it: codes.
      every: codes from one mark to the next.
      codes: how many there are.
      zero: where real zero is.
    """

    bars: str
    outside: str
    ticks: str
    every: int
    codes: int
    zero: float


class _Curve(NamedTuple):
    """A range over training.

    Attributes:
      band: the path of an SVG: from lowest to highest values.
      first: the first and the last step.
      last: likewise.
      lo: the lowest value of all steps.
      hi: the highest one.
    """

    band: str
    first: int
    last: int
    lo: float
    hi: float


def _longest(values: Sequence[float]) -> float:
    """Return what a bar of full length stands for."""
    return max((abs(v) for v in values if math.isfinite(v)), default=0) or 1


def _drawing(tensor: TensorAnalysis) -> _Drawing:
    """Draw how often values lie where: by the square root, so that tails can be seen."""
    assert len(tensor.counts) == _WIDTH, "a bar for each unit"
    below, above = clipped_counts(tensor)
    most = math.sqrt(max(*tensor.counts, below, above, 1))

    def top(count: float) -> str:
        return f"{_HEIGHT * (1 - math.sqrt(count) / most):.2f}"

    bars = "".join(f"V{top(count)}h1" for count in tensor.counts)
    outside = [
        f"M{x},{_HEIGHT}V{top(count)}h1V{_HEIGHT}Z"
        for x, count in ((-2, below), (_WIDTH + 1, above))
        if count
    ]
    marked = marked_codes(tensor)
    codes = marked.stop
    ticks = [f"M{_WIDTH * (code + 0.5) / codes:.2f},24v2" for code in marked]
    (lo, hi), width = tensor.grid, _WIDTH / codes
    zero = width * (0.5 + (codes - 1) * -lo / (hi - lo)) if hi > lo else 0
    bars = f"M0,{_HEIGHT}{bars}V{_HEIGHT}Z"
    return _Drawing(bars, "".join(outside), "".join(ticks), marked.step, codes, zero)


def _curve(points: Sequence[RangeAt]) -> _Curve:
    """Draw a range over the steps of training; of one step, as if it had been there before."""
    points = [points[0], points[0], *points[1:]] if len(points) == 1 else list(points)
    steps = [point.step for point in points]
    first, last = min(steps), max(steps)
    lo, hi = min(point.lo for point in points), max(point.hi for point in points)
    even = last == first

    def at(number: int, value: float) -> str:
        x = number / (len(points) - 1) if even else (steps[number] - first) / (last - first)
        return f"{_WIDTH * x:.2f},{_HEIGHT * (hi - value) / ((hi - lo) or 1):.2f}"

    upper = [at(number, point.hi) for number, point in enumerate(points)]
    lower = [at(number, point.lo) for number, point in enumerate(points)]
    return _Curve(f"M{'L'.join([*upper, *lower[::-1]])}Z", first, last, lo, hi)
