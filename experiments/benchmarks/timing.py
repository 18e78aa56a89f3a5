"""Interleaved timing: what several functions take in one process, and how it spreads."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was measured several times: the median, and where the middle half of it lies.

    Attributes:
      median: of all.
      low: the first quartile.
      high: the third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Figure":
        """Return the figure of some values."""
        low, median, high = np.quantile(np.asarray(values, float), (0.25, 0.5, 0.75))
        return cls(float(median), float(low), float(high))

    @classmethod
    def exactly(cls, value: float) -> "Figure":
        """Return the figure of what is the same each time, as a number of bytes."""
        return cls(float(value), float(value), float(value))

    def times(self, factor: float) -> "Figure":
        """Return the figure in another unit."""
        return Figure(self.median * factor, self.low * factor, self.high * factor)


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds a call, of each round.

    Attributes:
      wall: on the clock.
      processor: of all cores, this process's alone: what counts where others use them too.
    """

    wall: np.ndarray
    processor: np.ndarray

    @property
    def median(self) -> float:
        """The median on the clock."""
        return float(np.median(self.wall))

    def ratio(self, base: "Times") -> Figure:
        """Return the ratio to another function's time, round by round."""
        return Figure.of(self.wall / base.wall)

    def processor_ratio(self, base: "Times") -> Figure:
        """Return the ratio of processor time, round by round."""
        return Figure.of(self.processor / base.processor)


def timed(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, Times]:
    """Return what each function takes.

    Every round calls each function `calls` times, in an order that changes, so that what else the
    machine does falls on all of them alike.

    Args:
      functions: name and function; its result is waited for.
      rounds: how many times each is timed.
      calls: how many calls one timing covers.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    names = list(functions)
    for function in functions.values():
        _wait(function())
    for round_index in range(rounds):
        for name in names if round_index % 2 else reversed(names):
            start = time.perf_counter(), time.process_time()
            _wait([functions[name]() for _ in range(calls)])
            end = time.perf_counter(), time.process_time()
            found[name].append(((end[0] - start[0]) / calls, (end[1] - start[1]) / calls))
    return {name: Times(*np.asarray(values).T) for name, values in found.items()}


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, float]:
    """Return the median seconds per call of each function, see `timed`."""
    return {name: times.median for name, times in timed(functions, rounds, calls).items()}


def _wait(results: object) -> None:
    """Wait for results of JAX, where it runs; others have been computed."""
    if "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(results)


@dataclasses.dataclass(frozen=True)
class Latencies:
    """Seconds of calls that are complete when they return.

    Attributes:
      rounds: the median call of each round, and processor time a call.
      calls: all calls on the clock.
    """

    rounds: Times
    calls: np.ndarray

    def quantile(self, share: float) -> float:
        """Return in what time this share of the calls is done."""
        return float(np.quantile(self.calls, share))


def latencies(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int
) -> dict[str, Latencies]:
    """Return what single calls take, interleaved as by `timed`.

    Args:
      functions: name and function.
      rounds: how many times each gets its turn.
      calls: how many calls a turn has.
    """
    clock, names = time.perf_counter, list(functions)
    walls = {name: np.empty((rounds, calls)) for name in names}
    processor = {name: np.empty(rounds) for name in names}
    for function in functions.values():
        function()
    for i in range(rounds):
        for name in names if i % 2 else reversed(names):
            function, marks, start = functions[name], [clock()], time.process_time()
            for _ in range(calls):
                function()
                marks.append(clock())
            processor[name][i] = (time.process_time() - start) / calls
            walls[name][i] = np.diff(marks)
    return {
        name: Latencies(Times(np.median(walls[name], axis=1), processor[name]), walls[name].ravel())
        for name in names
    }
