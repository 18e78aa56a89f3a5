"""One process trains in a directory; one that has ended, however, keeps nobody out."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from experiments import configs, locks, runs
from experiments.errors import ExperimentError

ROOT = Path(__file__).parents[2]
HOLD = """
import pathlib, sys
from experiments import locks
with locks.locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(run: Path) -> Iterator[subprocess.Popen]:
    """Another process that has locked a directory."""
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_run_in_use_is_left_alone(tmp_path: Path) -> None:
    experiment = configs.get("lenet5_mnist")
    with runs.open_run(tmp_path, "run", experiment, resume=False) as run:
        pass
    before = (run / "config.json").stat().st_mtime_ns
    with held(run) as process:
        with (
            pytest.raises(ExperimentError) as caught,
            runs.open_run(tmp_path, "run", experiment, resume=True),
        ):
            pytest.fail("two processes train in one directory")
        message = str(caught.value)
        assert message.startswith(f"{run} is in use: process {process.pid} on ")
        assert "--resume" in message and "\n" not in message
    assert (run / "config.json").stat().st_mtime_ns == before


def test_a_killed_process_keeps_nobody_out(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locks.locked(tmp_path):
            assert (tmp_path / locks.NAME).exists()


def test_a_lock_ends_with_its_context_also_within_a_process(tmp_path: Path) -> None:
    with locks.locked(tmp_path), pytest.raises(ExperimentError, match="is in use"):
        locks.locked(tmp_path).__enter__()
    with locks.locked(tmp_path):
        pass


@pytest.mark.parametrize("absent", [True, False])
def test_where_there_are_no_locks_nothing_is_locked(
    absent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    if absent:
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with locks.locked(tmp_path), locks.locked(tmp_path):
        pass
