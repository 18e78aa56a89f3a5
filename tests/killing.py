"""Runs in processes of their own that are ended on the way, and whether they end as others do.

PYTHONPATH=.:tests python tests/killing.py --rounds 10  # what `make test-faults` does
"""

import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
OPTIONS = "--config tiny --phases qat --epochs 8 --checkpoint-every 2".split()
STEPS = 48
ENDED_WITHIN = 60
"""Seconds in which the others end where a process was lost, see docs/how_to/scaling.md."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Processes that train one network.

    Attributes:
      directory: of the run.
      processes: in their order.
    """

    directory: Path
    processes: Sequence[subprocess.Popen]

    def wait_for(self, step: int, seconds: float = 300) -> None:
        """Wait until a checkpoint is there."""
        deadline = time.monotonic() + seconds
        while not (self.directory / "qat" / str(step)).exists():
            ended = [p for p in self.processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no checkpoint {step}: {self.end(0)}")
            time.sleep(0.002)

    def end(self, seconds: float = 300) -> tuple[list[int], list[str]]:
        """Return the statuses of all processes and what they wrote to stderr.

        Those that have not ended in time are killed: their status is that of SIGKILL.
        """
        deadline = time.monotonic() + seconds
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
        said = [process.communicate()[1] for process in self.processes]
        return [process.returncode for process in self.processes], said


def start(
    directory: Path,
    *options: str,
    count: int = 1,
    devices: int = 1,
    own: Mapping[int, Sequence[str]] | None = None,
    environment: Mapping[int, Mapping[str, str]] | None = None,
) -> Run:
    """Start a run.

    Args:
      directory: of the run.
      options: of all processes.
      count: how many processes.
      devices: of each.
      own: options of one alone, by its number.
      environment: variables of one alone, by its number.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(TESTS / "tiny_run.py"), *OPTIONS, *options]
    command += ["--runs-dir", str(directory.parent), "--name", directory.name]
    variables = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    processes = []
    for index in range(count):
        place = f"--coordinator {address} --num-processes {count} --process-id {index}".split()
        extra = [*(place if count > 1 else []), *(own or {}).get(index, ())]
        processes.append(
            subprocess.Popen(
                [*command, *extra],
                env=variables | dict((environment or {}).get(index, {})),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return Run(directory, processes)


def digest(directory: Path) -> str:
    """Return the hash of all arrays of the last checkpoint."""
    record = directory / "qat" / str(STEPS) / "progress" / "metadata"
    return json.loads(record.read_text())["digest"]


def _interrupted(directory: Path, count: int, draw: random.Random) -> str:
    """Train a run that is ended once in each of two parts; return the last digest."""
    for part in range(3):
        run = start(directory, *(["--resume"] if part else []), count=count)
        if part < 2:
            run.wait_for(2 * draw.randint(1 + 8 * part, 7 + 8 * part))
            time.sleep(draw.random() / 10)
            sent = draw.choice((signal.SIGKILL, signal.SIGTERM))
            chosen = draw.choice((run.processes, [draw.choice(run.processes)]))
            for process in chosen:
                process.send_signal(sent)
            run.end(ENDED_WITHIN)
        else:
            statuses, said = run.end()
            assert statuses == [0] * count, said
    return digest(directory)


def main() -> None:
    """Interrupt runs of 1, 2 and 4 processes; print how many ended with equal bits."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 10
    failed = 0
    for count in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            whole = start(Path(folder) / "whole", count=count)
            assert whole.end()[0] == [0] * count
            expected, equal = digest(whole.directory), 0
            for i in range(rounds):
                draw = random.Random(100 * count + i)
                equal += _interrupted(Path(folder) / str(i), count, draw) == expected
                print(f"{count} processes: {equal} of {i + 1} runs have equal bits", flush=True)
            failed += rounds - equal
    sys.exit(failed)


if __name__ == "__main__":
    main()
