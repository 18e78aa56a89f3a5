"""What a call takes: time, and memory beside what was held before."""

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Taken(Generic[T]):
    """What a call returned and took.

    Attributes:
      result: what it returned.
      wall: seconds on the clock.
      processor: seconds of all cores, this process's alone.
      peak: bytes by which memory grew at most; None where there is no `/proc` of Linux.
    """

    result: T
    wall: float
    processor: float
    peak: int | None


def taken(function: Callable[[], T]) -> Taken[T]:
    """Call a function, and return what that took."""
    gc.collect()
    counts = _RESET.exists()
    if counts:
        _RESET.write_text("5")  # the peak is counted from here
    before = _kilobytes("VmRSS") if counts else 0
    start = time.perf_counter(), time.process_time()
    result = function()
    wall, processor = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = 1024 * max(_kilobytes("VmHWM") - before, 0) if counts else None
    return Taken(result, wall, processor, peak)


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
