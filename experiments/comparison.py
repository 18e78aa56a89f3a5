"""A quantized network every way it runs, beside the float one: evaluation, integers, files."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.data import in_batches

_CALLS, _SECONDS = 200, 5.0
"""Latency is that of so many calls, or of as many as this time allows."""
_RANGES = ("quant_stats", "quant_params")

Function = Callable[[np.ndarray], ArrayLike]
"""From images to logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network with its variables, quantized or trained so.

    Attributes:
      module: the float model; its argument `train` is False here.
      config: how it is quantized, for either backend.
      variables: `params`, `quant_stats` and what else the model has.
      baseline: variables of the float network that training started from or runs beside; None:
        there is none, or `variables` are its own.
      trained: whether `variables` were trained quantized, and so are no float network's.
    """

    module: nn.Module
    config: sq.SimQATConfig
    variables: dict[str, Any]
    baseline: dict[str, Any] | None = None
    trained: bool = False

    @property
    def floats(self) -> dict[str, Any]:
        """The variables without ranges, which the float model takes."""
        return {name: self.variables[name] for name in self.variables if name not in _RANGES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled:
    """Inputs of the network, float32, their classes, and how many run at a time."""

    x: np.ndarray
    labels: np.ndarray
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the network; None: not of float ones, which others are compared with."""

    what: str
    accuracy: float
    agreement: float | None
    """Share of images whose class is that of the same parameters in float."""
    sqnr_db: float | None
    """Power of their logits in float by that of the differences from them, decibels."""
    differing: int | None
    """Output codes that are not those of quantized evaluation for the same runtime."""
    bytes: int
    latency_us: tuple[float, float, float]
    """Smallest, median and 99th percentile of one image, microseconds."""


def compare(network: Network, images: Labelled, folder: Path) -> list[Row]:
    """Write `model.onnx`, `model.tflite` and both integer models, and run all of them on images.

    The first rows are float: the baseline, if there is one, then the parameters that were
    quantized, which all others are compared with.
    """
    rows = []
    if network.baseline is not None:
        rows.append(_float_row("float baseline, JAX", network, network.baseline, images)[0])
    what = "SimQAT's parameters in float, JAX" if network.trained else "float, JAX"
    row, logits = _float_row(what, network, network.floats, images)
    rows.append(row)
    for backend in ("tflite", "onnx"):
        want = None
        for what, function, size in _ways(network, backend, folder, images.x[:1]):
            found = in_batches(function, images.x, images.batch)
            want = found if want is None else want
            rows.append(
                Row(
                    what=what,
                    accuracy=_accuracy(found, images.labels),
                    agreement=_accuracy(found, logits.argmax(axis=-1)),
                    sqnr_db=_sqnr_db(logits, found),
                    differing=int((found != want).sum()),
                    bytes=size,
                    latency_us=_latency(function, images.x[:1]),
                )
            )
    return rows


def _float_row(
    what: str, network: Network, variables: dict[str, Any], images: Labelled
) -> tuple[Row, np.ndarray]:
    """Run the float model; return its row and its logits."""
    apply = jax.jit(functools.partial(network.module.apply, train=False))
    run = functools.partial(apply, variables)
    logits = in_batches(run, images.x, images.batch)
    row = Row(
        what=what,
        accuracy=_accuracy(logits, images.labels),
        agreement=None,
        sqnr_db=None,
        differing=None,
        bytes=sum(a.nbytes for a in jax.tree.leaves(variables)),
        latency_us=_latency(run, images.x[:1]),
    )
    return row, logits


def show(rows: list[Row], title: str, console: Console | None = None) -> None:
    """Print the table of a comparison."""
    reference = [row.what for row in rows if row.differing is None][-1]
    caption = f"As float, SQNR: against the row {reference!r}."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    columns = ("top-1", "as float", "SQNR, dB", "codes that differ", "kB")
    table.add_column("")
    for column in (*columns, "µs an image (min, median, p99)"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.accuracy:.2%}",
            "" if row.agreement is None else f"{row.agreement:.2%}",
            "" if row.sqnr_db is None else f"{row.sqnr_db:.2f}",
            "" if row.differing is None else f"{row.differing:,}",
            f"{row.bytes / 1000:,.0f}",
            ", ".join(f"{t:,.0f}" for t in row.latency_us),
        )
    (console or Console()).print(table)


def _ways(
    network: Network, backend: Literal["tflite", "onnx"], folder: Path, sample: np.ndarray
) -> Iterator[tuple[str, Function, int]]:
    """Yield the ways to run it for one runtime, evaluation first: name, function, bytes."""
    variables = network.variables
    qmodel = sq.SimQAT(dataclasses.replace(network.config, backend=backend)).apply(network.module)
    evaluate = functools.partial(jax.jit(functools.partial(qmodel.apply, train=False)), variables)
    size = sum(a.nbytes for a in jax.tree.leaves(variables["params"]))
    yield f"SimQAT evaluation ({backend}), JAX", evaluate, size
    integer = sq.convert(qmodel, variables, sample, train=False)
    path = folder / f"model.{backend}"
    integer.save(path.with_suffix(f".{backend}.integer"))
    yield f"integer model ({backend}), JAX", integer, integer.nbytes
    export = sq.export_onnx if backend == "onnx" else sq.export_tflite
    export(integer, path)
    file = sq.open_file(path, isolated=False)
    yield file.name, lambda x: file.run([np.asarray(x)])[0], path.stat().st_size


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=-1) == labels))


def _sqnr_db(floats: np.ndarray, quantized: np.ndarray) -> float:
    signal, noise = (np.square(a, dtype=np.float64).sum() for a in (floats, quantized - floats))
    return float(10 * np.log10(signal / noise))


def _latency(function: Function, image: np.ndarray) -> tuple[float, float, float]:
    jax.block_until_ready(function(image))  # compiles
    times = []
    end = time.perf_counter() + _SECONDS
    while not times or (len(times) < _CALLS and time.perf_counter() < end):
        start = time.perf_counter()
        jax.block_until_ready(function(image))
        times.append(1e6 * (time.perf_counter() - start))
    times = times[len(times) // 20 :]  # the first ones are cold
    return min(times), float(np.median(times)), float(np.percentile(times, 99))
