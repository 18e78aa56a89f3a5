"""Batches of calibration data, and how far the work on them is."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized

import jax
import numpy as np

from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.arguments import check_flag, shown

Batches = Iterable[PyTree]
"""What yields a call's positional arguments: a tuple of them, or the only one."""
_SECONDS = 0.5
"""Between two lines of progress."""


def check_batches(batches: object) -> None:
    """Raise TypeError for what yields no batches; an array would yield single examples."""
    wrong = isinstance(batches, Mapping | str) or hasattr(batches, "dtype")
    if wrong or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must yield batches, got {shown(batches)}. Pass a list of arrays, [x], or a "
            "generator; of a model with several inputs, of tuples."
        )


def arguments(batches: Batches, what: str, progress: bool) -> Iterator[tuple[int, tuple]]:
    """Number the batches from 0, and yield each as the arguments of a call.

    Args:
      batches: yields arrays, or tuples of arguments.
      what: the name of the work, for messages.
      progress: write to stderr how far it is.

    Raises:
      TypeError: `batches` yields no batches, or one without arrays.
      ValueError: there is none, or an array in one is empty.
    """
    check_flag("progress", progress)
    check_batches(batches)
    total, count = len(batches) if isinstance(batches, Sized) else None, 0
    line = Progress(what, "batch", total, progress)
    for count, batch in enumerate(batches, 1):
        args = batch if isinstance(batch, tuple) else (batch,)
        arrays = [v for v in jax.tree.leaves(args) if hasattr(v, "dtype")]
        if not arrays:
            raise TypeError(f"{what}: batch {count - 1} holds no array, got {shown(batch)}.")
        empty = [np.shape(v) for v in arrays if 0 in np.shape(v)]
        if empty:
            raise ValueError(
                f"{what}: batch {count - 1} holds an array of shape {empty[0]}, in which there is "
                "no example. Leave it out."
            )
        yield count - 1, args
        line.show(count)
    if not count:
        raise ValueError(
            f"{what}: batches yielded nothing. Pass one batch or more; a generator yields its "
            "batches once, so make a new one for each call."
        )
    line.end(count)


class Progress:
    """A line on the terminal: how much of the work is done.

    Args:
      what: the name of the work.
      unit: what is counted.
      total: how many there are; None: nobody knows.
      shown: False: nothing is written.
    """

    def __init__(self, what: str, unit: str, total: int | None, shown: bool):
        self._what = what
        self._unit = unit
        self._of = "" if total is None else f" of {total}"
        self._shown = shown
        self._start = self._last = time.monotonic()

    def show(self, count: int) -> None:
        """Tell how many are done; seldom enough to cost nothing."""
        if time.monotonic() - self._last >= _SECONDS:
            self._last = time.monotonic()
            self._write(count, "")

    def end(self, count: int) -> None:
        """Tell how many were done, and end the line."""
        self._write(count, "\n")

    def _write(self, count: int, end: str) -> None:
        if self._shown:
            seconds = time.monotonic() - self._start
            text = f"\r{self._what}: {self._unit} {count}{self._of}, {seconds:.1f} s"
            sys.stderr.write(text + end)
            sys.stderr.flush()
