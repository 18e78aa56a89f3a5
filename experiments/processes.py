"""Several processes that train one network: how they find each other, agree, and end together."""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

import simqat_jax as sq
from experiments.errors import CommonError, ExperimentError, Preempted

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 20
"""Without a sign of life for so long a process is lost, and JAX ends the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """How the processes find each other.

    Raises:
      ExperimentError: half of what is needed, at construction.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0; None: what the cluster's environment says."""
    count: int | None = None
    index: int | None = None
    timeout: int = 300
    """Seconds in which all must have come."""

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.count, self.index)]
        if any(given) and not all(given):
            raise ExperimentError(
                "--coordinator, --num-processes and --process-id belong together: give all three, "
                "or --distributed alone where the cluster's environment names them."
            )
        if self.coordinator is not None and not _is_address(self.coordinator):
            raise ExperimentError(f"--coordinator must be HOST:PORT, got {self.coordinator!r}.")
        if self.count is not None and self.index is not None:
            if self.count < 1:
                raise ExperimentError(f"--num-processes must be 1 or more, got {self.count}.")
            if not 0 <= self.index < self.count:
                raise ExperimentError(
                    f"--process-id must be 0 to {self.count - 1} with --num-processes "
                    f"{self.count}, got {self.index}."
                )
        if self.timeout < 1:
            raise ExperimentError(f"--connect-timeout must be 1 or more, got {self.timeout}.")


@contextlib.contextmanager
def connected(connection: Connection | None) -> Iterator[None]:
    """Connect the processes of a run, and end them together.

    What every process raises (CommonError, Preempted) ends all of them in order, and process 0
    tells it. What one meets alone ends it at once: to wait for the others, who wait for it, would
    not end. They learn of it by their connections, or by its heartbeat.

    Args:
      connection: None: there is one process.
    """
    if connection is None:
        yield
        return
    _connect(connection)
    try:
        yield
    except (CommonError, Preempted):
        jax.distributed.shutdown()
        if jax.process_index() > 0:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # told by process 0, to the end
        raise
    except ExperimentError as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("\ninterrupted. The same command with --resume continues the run.", 130)
    except jax.errors.JaxRuntimeError as error:
        _end(f"error: {_lost(error)}", 1)
    except BaseException:
        _end(traceback.format_exc(), 1)
    jax.distributed.shutdown()


def together(function: Callable[[], Result]) -> Result:
    """Call a function on every process; where one fails, all fail with its message.

    Args:
      function: what needs no other process.

    Raises:
      ExperimentError: a process raised one.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, None
    try:
        result = function()
    except ExperimentError as error:
        failure = str(error)
    failures = exchange(failure)
    told = [f"process {i}: {said}" for i, said in enumerate(failures) if said is not None]
    if told:
        same = len(set(failures)) == 1
        raise CommonError(str(failures[0]) if same else told[0])
    return result  # pyright: ignore[reportReturnType]  # None where the function returns None


def exchange(value: Any) -> list[Any]:
    """Return the JSON value of every process, in their order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size])).reshape(-1)
    padded = np.zeros(max(sizes), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(rows, sizes, strict=True)]


def check_agreement(facts: dict[str, Any]) -> None:
    """Check that every process has the same facts.

    Raises:
      CommonError: one has not; lists what differs from process 0.
    """
    first, *others = exchange(facts)
    lines = [
        f"  {name}: {first.get(name)!r} in process 0, {other.get(name)!r} in process {index}"
        for index, other in enumerate(others, 1)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if lines:
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CommonError(
            "the processes of this run differ:\n" + "\n".join(lines[:10] + more) + "\n"
            "Start all with the same command, code and data, on a file system that they share."
        )


def code() -> dict[str, str]:
    """Return what identifies the code that runs here: versions and a digest of the sources."""
    digest = hashlib.sha256()
    for package in (Path(__file__).parent, Path(str(sq.__file__)).parent):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return {"code": digest.hexdigest()[:16], "jax": jax.__version__}


def _connect(connection: Connection) -> None:
    # JAX itself aborts with a stack trace: it gets more time, so that this comes first.
    watchdog = threading.Timer(connection.timeout, lambda: _end(f"error: {_late(connection)}", 1))
    watchdog.daemon = True
    watchdog.start()
    try:
        jax.distributed.initialize(
            coordinator_address=connection.coordinator,
            num_processes=connection.count,
            process_id=connection.index,
            initialization_timeout=connection.timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ExperimentError(
            f"cannot connect the processes: {said}. Where no Slurm, Open MPI, Kubernetes or "
            "TPU environment names them, give --coordinator, --num-processes and --process-id in "
            "place of --distributed."
        ) from error
    finally:
        watchdog.cancel()


def _late(connection: Connection) -> str:
    """Return who has not come in time, and the remedy."""
    where = connection.coordinator
    check = (
        "that process 0 runs, that its address and port can be reached from here, and that "
        "--num-processes is the number that was started"
    )
    if where is None:
        said = "not all processes that the cluster's environment names have found each other"
        check = "that all run, and that the first one's host can be reached from here, on any port"
    elif connection.index == 0:
        said = f"not all {connection.count} processes came to the coordinator {where}"
    else:
        said = f"the coordinator {where} does not answer"
    late = f"{said} within {connection.timeout} s"
    return f"{late}. Check {check}; --connect-timeout waits longer."


def _end(message: str, status: int) -> NoReturn:
    """End this process without waiting for the others, as Python's own exit would."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(status)


def _lost(error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return (
        f"process {jax.process_index()} on {socket.gethostname()} cannot go on: {said}. Where "
        "another process was lost, start all again with --resume: the last checkpoint is kept."
    )


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdigit() and 0 < int(port) < 65536
