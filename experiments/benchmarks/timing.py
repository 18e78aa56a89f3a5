"""Interleaved timing: medians and ratios of several functions from one process."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, float]:
    """Return the median seconds per call of each function.

    Every round calls each function `calls` times, in an order that changes, so that what else the
    machine does falls on all of them alike.

    Args:
      functions: name and function; its result is waited for.
      rounds: how many times each is timed.
      calls: how many calls one timing covers.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for function in functions.values():
        jax.block_until_ready(function())
    for round_index in range(rounds):
        for name in names if round_index % 2 else reversed(names):
            start = time.perf_counter()
            jax.block_until_ready([functions[name]() for _ in range(calls)])
            times[name].append((time.perf_counter() - start) / calls)
    return {name: float(np.median(values)) for name, values in times.items()}
