"""Figures of an analysis, drawn with matplotlib, as PNG files."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simqat_jax.analysis.measurement import Measurement
from simqat_jax.analysis.measures import decibels
from simqat_jax.analysis.result import Analysis, RangeAt, TensorAnalysis
from simqat_jax.files import atomic_file, import_extra
from simqat_jax.ir.table import shortened

_ACROSS, _DOWN = 4, 6
"""Histograms or ranges of a figure; of more there are more figures."""
_MOST_LAYERS = 40
_TITLE = 36
"""Letters of a title, at most."""
_BLUE, _RED = "#3b7dd8", "#c2410c"
_TICKS = 32
"""Codes that are marked in a histogram, at most."""
Figure = Any
"""A `matplotlib.figure.Figure`; matplotlib may be missing."""


def write_pngs(analysis: Analysis, measurements: Sequence[Measurement], folder: Path) -> None:
    """Write what there is to draw: models, layers, tensors and ranges.

    Raises:
      ImportError: the extra `report` is not installed.
      OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(analysis, measurements):
        with atomic_file(folder / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=150)


def figures(
    analysis: Analysis, measurements: Sequence[Measurement]
) -> Iterator[tuple[str, Figure]]:
    """Yield what there is to draw, by name."""
    if any(_measured(measurements).values()):
        yield "models", _models(measurements)
    yield "layers", analysis.plot(_MOST_LAYERS)
    yield from _pages("tensors", list(analysis.tensors.values()), _histogram)
    ranges = [(name, points) for name, points in analysis.ranges.items() if points]
    yield from _pages("ranges", ranges, _range)


def _measured(models: Sequence[Measurement]) -> dict[str, list[tuple[str, float]]]:
    """Return what was measured, by what it is: the models' names and numbers."""
    columns = {
        "accuracy, %": [(m.name, m.accuracy and 100 * m.accuracy) for m in models],
        "size, kB": [(m.name, m.nbytes and m.nbytes / 1e3) for m in models],
        "latency (p50), ms": [(m.name, m.p50_ms) for m in models],
    }
    return {k: [(n, v) for n, v in pairs if v is not None] for k, pairs in columns.items()}


def _models(models: Sequence[Measurement]) -> Figure:
    columns = {title: pairs for title, pairs in _measured(models).items() if pairs}
    figure = _figure(4 * len(columns), 1 + 0.4 * len(models))
    for axes, (title, pairs) in zip(
        figure.subplots(1, len(columns), squeeze=False)[0], columns.items(), strict=True
    ):
        names, values = zip(*reversed(pairs), strict=True)
        places = range(len(names))  # several models may have one name
        bars = axes.barh(places, values, color=_BLUE)
        axes.set_yticks(places, names)
        axes.bar_label(bars, fmt="{:,.4g}", padding=3)
        axes.margins(x=0.25)
        axes.set_xlabel(title)
    return figure


def _pages(name: str, parts: Sequence[Any], draw: Any) -> Iterator[tuple[str, Figure]]:
    """Yield figures of some parts each."""
    size = _ACROSS * _DOWN
    pages = [parts[k : k + size] for k in range(0, len(parts), size)]
    for number, page in enumerate(pages, 1):
        across = min(_ACROSS, len(page))
        down = math.ceil(len(page) / across)
        figure = _figure(3 * across, 2 * down)
        grid = figure.subplots(down, across, squeeze=False).reshape(-1)
        for axes, part in zip(grid, page, strict=False):
            draw(axes, part)
        for axes in grid[len(page) :]:
            axes.set_axis_off()
        yield name if len(pages) == 1 else f"{name}-{number}", figure


def marked_codes(tensor: TensorAnalysis) -> range:
    """Return the codes of a grid that are marked, counted from the lowest: all, or each 2nd, ..."""
    codes = tensor.spec.qmax - tensor.spec.qmin + 1
    every = 1
    while codes > every * _TICKS:
        every *= 2
    return range(0, codes, every)


def clipped_counts(tensor: TensorAnalysis) -> tuple[float, float]:
    """Return how many values lie below and above the grid."""
    everything = sum(tensor.counts) / ((1 - tensor.clipped) or 1)
    return everything * tensor.below, everything * tensor.above


def _histogram(axes: Any, tensor: TensorAnalysis) -> None:
    """Draw how often values lie where, as the page does: codes as lines, what is clipped in red."""
    marked = marked_codes(tensor)
    (lo, hi), steps = tensor.grid, marked.stop - 1
    half = (hi - lo) / (2 * steps or 1)  # bins reach half a step beyond the lowest code
    edges = np.linspace(lo - half, hi + half, len(tensor.counts) + 1)
    axes.stairs(np.sqrt(tensor.counts), edges, fill=True, color=_BLUE)
    across = axes.get_xaxis_transform()  # values along x, shares of the height along y
    places = lo + (hi - lo) * np.array(marked) / (steps or 1)
    axes.vlines(places, 0, 1, "0.4", lw=0.3, transform=across)
    margin = 3 * (edges[1] - edges[0])
    for count, edge, out in zip(
        clipped_counts(tensor), edges[[0, -1]], (-margin, margin), strict=True
    ):
        if count:
            axes.axvspan(edge, edge + out, color=_RED, alpha=0.2, lw=0)
            axes.bar(edge, np.sqrt(count), out, align="edge", color=_RED)
    axes.set_yticks([])
    axes.set_title(shortened(tensor.name, _TITLE), fontsize=8)
    axes.tick_params(labelsize=7)
    text = f"{decibels(tensor.sqnr)}, {tensor.clipped:.2%} clipped"
    text += f", a line for {marked.step} codes" if marked.step > 1 else ""
    axes.set_xlabel(text, fontsize=7, color=_RED if tensor.clipped > 0.001 else "black")


def _range(axes: Any, part: tuple[str, Sequence[RangeAt]]) -> None:
    name, points = part
    steps = [point.step for point in points]
    lows, highs = [point.lo for point in points], [point.hi for point in points]
    axes.fill_between(steps, lows, highs, color=_BLUE, alpha=0.3)
    for values in (lows, highs):
        axes.plot(steps, values, color=_BLUE, marker=".")
    axes.set_title(shortened(name, _TITLE), fontsize=8)
    axes.tick_params(labelsize=7)
    axes.set_xlabel("step", fontsize=7)


def _figure(width: float, height: float) -> Figure:
    module: Any = import_extra("matplotlib.figure", "report")
    return module.Figure(figsize=(width, height), layout="constrained")
