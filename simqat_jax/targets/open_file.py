"""Open an exported file in its runtime, by default in a process of its own."""

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simqat_jax.files import as_path, import_extra
from simqat_jax.numerics.arguments import check_flag, check_seconds, check_whole, shown
from simqat_jax.targets import TARGETS, serve
from simqat_jax.targets.target import OpenFile, Session, Target

TIMEOUT = 600.0
"""Seconds that a file may take to open, and for each call, in a process of its own."""


def open_file(
    path: str | os.PathLike[str],
    threads: int | None = None,
    *,
    isolated: bool = True,
    timeout: float | None = TIMEOUT,
) -> OpenFile:
    """Open an exported file in its runtime, on the CPU.

    A damaged file can make its runtime end the process that it runs in, or run for ever. The file
    therefore runs in a process of its own, which takes a fifth of a second to start and ends with
    the OpenFile, or where it takes longer than `timeout`: then opening, or the call, raises
    ValueError.

    Args:
      path: `*.onnx` or `*.tflite`.
      threads: how many threads to run on; None: as many as the runtime takes by itself.
      isolated: False: run the file in this process, where a call takes less time: for files that
        nobody else has had in hand, and to measure times.
      timeout: seconds that opening it, and each call, may take in a process of its own; None: any.

    Raises:
      FileNotFoundError: no such file.
      TypeError: `path` is no path, `threads` no whole number, `isolated` no bool, `timeout` no
        number.
      ValueError: neither `*.onnx` nor `*.tflite`, a file that the runtime does not read, or not
        within `timeout`; `threads` below 1, `timeout` not above 0.
      ImportError: the extra `export` is missing.
    """
    path = as_path(path)
    target = target_of(path)
    if threads is not None:
        check_whole("threads", threads, 1, ", or None")
    check_flag("isolated", isolated)
    check_seconds("timeout", timeout)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    for package in target.packages:
        import_extra(package)
    settings = {"threads": threads, **target.settings()}
    session = _isolated(target, path, settings, timeout) if isolated else None
    name, input_types, run = session or _here(target, path, settings)

    def checked(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return run(_inputs(path, arrays, len(input_types)))

    return OpenFile(name, checked, tuple(input_types))


def target_of(path: Path) -> Target:
    """Return the target whose files have the suffix of `path`.

    Raises:
      ValueError: there is none.
    """
    if path.suffix not in TARGETS:
        known = " nor ".join(f"*{suffix}" for suffix in TARGETS)
        raise ValueError(f"{path} is neither {known}.")
    return TARGETS[path.suffix]


def _inputs(path: Path, arrays: Any, count: int) -> list[np.ndarray]:
    """Return what a file is run on.

    Raises:
      TypeError: it is no list of arrays.
      ValueError: it has not `count` arrays.
    """
    whole = isinstance(arrays, list | tuple) and all(hasattr(a, "dtype") for a in arrays)
    if not whole:
        raise TypeError(
            f"run takes a list of arrays, one for each input of {path}, got {shown(arrays)}. "
            "Write run([x])."
        )
    if len(arrays) != count:
        raise ValueError(f"{path} takes {count} arrays, got {len(arrays)}.")
    return list(map(np.asarray, arrays))


def _here(target: Target, path: Path, settings: dict[str, Any]) -> Session:
    try:
        return target.open(str(path), **settings)
    except Exception as error:  # of a runtime, which has classes of its own
        raise ValueError(_refused(path, str(error))) from error


def _isolated(
    target: Target, path: Path, settings: dict[str, Any], timeout: float | None
) -> Session:
    process = _Process(target, path, settings, timeout)
    return process.message["name"], process.message["input_types"], process.run


def _refused(path: Path, reason: str) -> str:
    return (
        f"{path} is damaged, or no file of simqat_jax that takes these inputs: "
        f"{' '.join(reason.split()).rstrip('.')}. Export the model again."
    )


class _Process:
    """A process that runs a file; it ends with this object.

    Attributes:
      message: what it said once the file was open.
    """

    def __init__(self, target: Target, path: Path, settings: dict[str, Any], timeout: float | None):
        arguments = inspect.getfile(target.open), target.open.__name__, str(path)
        self._path = path
        self._timeout = timeout
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-P", serve.__file__, *arguments, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        self._end = weakref.finalize(self, _end, self._process)
        self.message, _ = self._answer()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run the file on input arrays."""
        with self._turn:
            return self._answer(arrays)[1]

    def _answer(
        self, arrays: Sequence[np.ndarray] | None = None
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        inputs, outputs = self._process.stdin, self._process.stdout
        assert inputs is not None and outputs is not None, "both are pipes"
        late = threading.Event()
        try:
            with self._limited(late):
                if arrays is not None:
                    serve.send(inputs, {}, arrays)
                message, results = serve.receive(outputs)
        except (EOFError, OSError, ValueError) as error:
            ended = self._how_it_ended()
            raise ValueError(
                self._too_slow() if late.is_set() else _refused(self._path, ended)
            ) from error
        except BaseException:  # its answer to this question must not be that to the next
            self._end()
            raise
        if "error" in message:
            self._end()
            raise ValueError(_refused(self._path, message["error"]))
        return message, results

    @contextlib.contextmanager
    def _limited(self, late: threading.Event) -> Iterator[None]:
        """End the process where this takes too long, which ends all reading and writing."""
        if self._timeout is None:
            yield
            return

        process = self._process

        def end() -> None:  # without `self`: a timer's thread outlives it for a moment
            late.set()
            process.kill()

        timer = threading.Timer(self._timeout, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _too_slow(self) -> str:
        return (
            f"{self._path} was stopped: its runtime gave no answer within {self._timeout:g} "
            "seconds. Give it more time with timeout=..., or export the model again."
        )

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its pipes may be closed before it has ended
        self._end()
        status = self._process.returncode
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"its runtime ended with {name}"


def _end(process: subprocess.Popen) -> None:
    """End a process, if it has not ended yet, and close what leads to it."""
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # of what was not read any more
            if stream is not None:
                stream.close()
    process.kill()
    process.wait()
