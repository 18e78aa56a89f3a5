"""A run directory is written by one process at a time."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from experiments.errors import ExperimentError

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

NAME = ".lock"
"""The file that is locked. It stays, names who locked it last, and blocks nothing by being there:
the system ends a lock with the process that holds it, however that ends."""

_HELD = (errno.EAGAIN, errno.EACCES)
"""What locking raises where another process holds the lock; else the file system has no locks."""


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run's directory.

    Where the system or the file system knows no locks, nothing is locked.

    Args:
      run: the directory, which exists.

    Raises:
      ExperimentError: another process trains there.
      OSError: the directory cannot be written.
    """
    with (run / NAME).open("a+") as file:
        _lock(run, file.fileno())
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(run: Path, descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return
        holder = (run / NAME).read_text() or "another process"
        raise ExperimentError(
            f"{run} is in use: {holder} trains in it. Wait until it has ended, or end it, and give "
            "--resume again; or train under another --name."
        ) from error
