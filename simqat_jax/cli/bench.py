"""Measure the latency of files in their runtimes."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from simqat_jax.analysis.measurement import Measurement
from simqat_jax.ir.sheet import Line, Sheet
from simqat_jax.ir.table import Column
from simqat_jax.numerics.arguments import check_whole
from simqat_jax.targets.listing import FileEnd
from simqat_jax.targets.open_file import open_file, target_of

_WARM_UP = 10
_COLUMNS = (
    Column("file", "path"),
    Column("runtime", "words"),
    Column("p50 ms"),
    Column("p99 ms"),
    Column("p50, ratio"),
    Column("bytes"),
)


class Timed(NamedTuple):
    """What was measured of a file.

    Attributes:
      runtime: its name, with its version.
      found: the file's name, its size and its latencies.
    """

    runtime: str
    found: Measurement


def bench(files: Sequence[Path], threads: int, batch: int, calls: int) -> list[Timed]:
    """Measure the latency of files.

    The calls of the files alternate, so that a busy machine slows all of them.

    Args:
      files: *.onnx or *.tflite; what others are compared with stands last.
      threads: of each runtime.
      batch: examples a call.
      calls: how many of each file are measured.

    Raises:
      TypeError: a number that is none.
      ValueError: one below 1; a file that its runtime does not read or run.
      FileNotFoundError: no such file.
    """
    check_whole("threads", threads, 1)
    check_whole("batch", batch, 1)
    check_whole("calls", calls, 1)
    runs = [_call(path, threads, batch) for path in files]
    for run in (run for run, _ in runs for _ in range(_WARM_UP)):
        run()
    times = np.array([[_seconds(run) for run, _ in runs] for _ in range(calls)]) * 1e3
    medians, tails = np.percentile(times, (50, 99), axis=0).tolist()
    return [
        Timed(name, Measurement(name=path.name, nbytes=path.stat().st_size, p50_ms=p50, p99_ms=p99))
        for path, (_, name), p50, p99 in zip(files, runs, medians, tails, strict=True)
    ]


def table(files: Sequence[Path], timed: Sequence[Timed], foot: str) -> str:
    """Return a table of what `bench` measured of files."""
    last = timed[-1].found.p50_ms
    lines = []
    for path, (runtime, found) in zip(files, timed, strict=True):
        assert found.p50_ms is not None and found.p99_ms is not None and last is not None
        figures = f"{found.p50_ms:.3f}", f"{found.p99_ms:.3f}", f"{found.p50_ms / last:.2f}"
        lines.append(Line((str(path), runtime, *figures, f"{found.nbytes:,}")))
    return Sheet((), _COLUMNS, tuple(lines), (foot,)).text()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _call(path: Path, threads: int, batch: int) -> tuple[Callable[[], object], str]:
    """Return a call of a file on random inputs, and its runtime's name."""
    careful = open_file(path, threads)  # in a process of its own, which a damaged file may end
    rng = np.random.default_rng(0)
    arrays = [_random(i, batch, rng) for i in target_of(path).listing(path).inputs]
    try:
        careful.run(arrays)
    except ValueError as error:
        reason = f"{path} does not run on random inputs of {batch} examples: {error}"
        raise ValueError(reason) from error
    here = open_file(path, threads, isolated=False)
    return lambda: here.run(arrays), here.name


def _random(given: FileEnd, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Return values for an input: small real numbers, any codes, of other integers zeros."""
    shape = tuple(batch if d < 0 else d for d in given.shape or ())
    dtype = np.dtype(given.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.itemsize == 1 and dtype.kind in "iu":
        ends = np.iinfo(dtype)
        return rng.integers(ends.min, ends.max, shape, dtype, endpoint=True)
    return np.zeros(shape, dtype)
