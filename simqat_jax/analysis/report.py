"""Write an analysis as a page of HTML that needs no network."""

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import NamedTuple

from simqat_jax.analysis.result import Analysis, RangeAt, TensorAnalysis
from simqat_jax.analysis.table import decibels
from simqat_jax.files import as_path, atomic_file, import_extra
from simqat_jax.numerics.arguments import check_kind, check_mapping

_WIDTH, _HEIGHT = 64, 24
"""Of a drawing, in its own units."""


def report(
    analysis: Analysis,
    path: str | os.PathLike,
    *,
    title: str = "Why accuracy moved",
    facts: Mapping[str, object] | None = None,
) -> None:
    """Write one HTML file that holds all that an analysis found.

    It opens from disk and fetches nothing: no fonts, no scripts.

    Args:
      analysis: what `analyze` returned.
      path: of the file; one that exists is replaced.
      title: the page's heading.
      facts: what else it is to say on top, by name: `{"accuracy, float": "99.1 %"}`.

    Raises:
      TypeError: no Analysis, no path, no dictionary of facts.
      ImportError: the extra `report` is not installed.
      FileNotFoundError: there is no directory to write it to.
    """
    check_kind("analysis", analysis, Analysis, "analyze(...) returns one.")
    facts = {} if facts is None else facts
    check_mapping("facts", facts, "Write facts={'accuracy, float': '99.1 %'}, for example.")
    target = as_path(path)
    jinja2 = import_extra("jinja2", "report")
    source = files("simqat_jax.analysis").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(
        title=title,
        facts=facts,
        analysis=analysis,
        longest=_longest([layer.alone_quantized for layer in analysis.layers]),
        largest=_longest([layer.gain for layer in analysis.layers]),
        drawings={name: _drawing(tensor) for name, tensor in analysis.tensors.items()},
        curves={name: _curve(points) for name, points in analysis.ranges.items() if points},
        decibels=decibels,
        isfinite=math.isfinite,
    )
    with atomic_file(target) as file:
        file.write(page.lstrip().encode())


class _Drawing(NamedTuple):
    """A histogram over its grid.

    Attributes:
      bars: the path of an SVG.
      zero: where real zero is.
    """

    bars: str
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
    most = math.sqrt(max(*tensor.counts, 1))
    tops = [_HEIGHT * (1 - math.sqrt(count) / most) for count in tensor.counts]
    bars = "".join(f"V{top:.2f}h1" for top in tops)
    (lo, hi), width = tensor.grid, _WIDTH / len(tops)
    assert width == 1, "a bar for each unit"
    return _Drawing(f"M0,{_HEIGHT}{bars}V{_HEIGHT}Z", _WIDTH * -lo / (hi - lo) if hi > lo else 0)


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
