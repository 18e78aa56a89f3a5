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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simqat_jax.files import as_path, import_extra
from simqat_jax.numerics.arguments import check_flag, check_whole
from simqat_jax.targets import TARGETS, serve
from simqat_jax.targets.target import OpenFile, Session, Target


def open_file(
    path: str | os.PathLike[str], threads: int | None = None, *, isolated: bool = True
) -> OpenFile:
    """Open an exported file in its runtime, on the CPU.

    A damaged file can make its runtime end the process that it runs in. The file therefore runs in
    a process of its own, which takes a fifth of a second to start and ends with the OpenFile.

    Args:
      path: *.onnx or *.tflite.
      threads: how many threads to run on; None: as many as the runtime takes by itself.
      isolated: False: run the file in this process, where a call takes less time: for files that
        nobody else has had in hand, and to measure times.

    Raises:
      FileNotFoundError: no such file.
      TypeError: `path` is no path, `threads` no whole number, `isolated` no bool.
      ValueError: neither *.onnx nor *.tflite, a file that the runtime does not read, `threads`
        below 1.
      ImportError: the extra `export` is missing.
    """
    path = as_path(path)
    target = target_of(path)
    if threads is not None:
        check_whole("threads", threads, 1, ", or None")
    check_flag("isolated", isolated)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    for package in target.packages:
        import_extra(package)
    settings = {"threads": threads, **target.settings()}
    name, float_inputs, run = (_isolated if isolated else _here)(target, path, settings)
    return OpenFile(name, run, float_inputs, target.offset, target.dtype)


def target_of(path: Path) -> Target:
    """Return the target whose files have the suffix of `path`.

    Raises:
      ValueError: there is none.
    """
    if path.suffix not in TARGETS:
        known = " nor ".join(f"*{suffix}" for suffix in TARGETS)
        raise ValueError(f"{path} is neither {known}.")
    return TARGETS[path.suffix]


def _here(target: Target, path: Path, settings: dict[str, Any]) -> Session:
    try:
        return target.open(str(path), **settings)
    except Exception as error:  # of a runtime, which has classes of its own
        raise ValueError(_refused(path, str(error))) from error


def _isolated(target: Target, path: Path, settings: dict[str, Any]) -> Session:
    process = _Process(target, path, settings)
    return process.message["name"], process.message["float_inputs"], process.run


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

    def __init__(self, target: Target, path: Path, settings: dict[str, Any]):
        arguments = inspect.getfile(target.open), target.open.__name__, str(path)
        self._path = path
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
        try:
            if arrays is not None:
                serve.send(inputs, {}, arrays)
            message, results = serve.receive(outputs)
        except (EOFError, OSError, ValueError) as error:
            raise ValueError(_refused(self._path, self._how_it_ended())) from error
        except BaseException:  # its answer to this question must not be that to the next
            self._end()
            raise
        if "error" in message:
            self._end()
            raise ValueError(_refused(self._path, message["error"]))
        return message, results

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
