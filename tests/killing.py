"""Runs in processes of their own that are ended on the way, and whether they end as others do.

`make test-faults` runs the loop. Each round trains a network in 1, 2 and 4 processes and ends each
of these runs six times: SIGTERM or SIGKILL, to one process or to all, in training or while they
start. What was done is kept in a file, so that the loop itself can be ended and started again;
of another version of the code give it another file.

    PYTHONPATH=.:tests python tests/killing.py --rounds 3 --kept runs/endings.jsonl
"""

import argparse
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).parent
OPTIONS = "--config tiny --phases qat --epochs 8 --checkpoint-every 2".split()
STEPS = 48
ENDED_WITHIN = 60
"""Seconds in which the others end where a process was lost, see docs/how_to/scaling.md."""
STARTING = 240
"""Seconds in which they end where it was lost before it came, `--connect-timeout` included, or
where all save first, on a machine that others use as well."""
WAITING = 1200
"""Seconds for a checkpoint to come, on a machine that others use as well."""
ENDINGS = 6
"""Of each run of the loop."""


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
        """Wait until a checkpoint of a step, or of a later one, is there."""
        deadline = time.monotonic() + seconds
        while not any(number >= step for number in self._checkpoints()):
            ended = [p for p in self.processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"no checkpoint {step}: {self.end(0)}")
            time.sleep(0.002)

    def _checkpoints(self) -> Iterator[int]:
        """Yield the steps of which there are checkpoints."""
        for path in (self.directory / "qat").glob("*"):
            if path.name.isdecimal():
                yield int(path.name)

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
    variables = os.environ | {
        "XLA_FLAGS": flags,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # what they compute is of seconds
    }
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run is ended on the way.

    Attributes:
      sent: the signal.
      chosen: the processes it is sent to.
      step: the checkpoint after which it is sent; None: while the processes start.
      delay: seconds after that.
    """

    sent: signal.Signals
    chosen: tuple[int, ...]
    step: int | None
    delay: float

    def __str__(self) -> str:
        when = "start" if self.step is None else f"step {self.step}"
        return f"{self.sent.name} to {self.chosen} {self.delay:.2f} s after {when}"

    def come(self, run: Run) -> tuple[list[int], list[str]]:
        """End a run; return the statuses and what was said, as its `end` does."""
        if self.step is not None:
            run.wait_for(self.step, WAITING)
        time.sleep(self.delay)
        for index in self.chosen:
            run.processes[index].send_signal(self.sent)
        return run.end(self.within)

    @property
    def within(self) -> int:
        """Seconds in which all are to end."""
        lost = self.sent is signal.SIGKILL and self.step is not None
        return ENDED_WITHIN if lost else STARTING

    def fault(self, statuses: Sequence[int]) -> str | None:
        """Return what is wrong with how the processes have ended; None: nothing."""
        killed = self.chosen if self.sent is signal.SIGKILL else ()
        late = [i for i, s in enumerate(statuses) if s == -signal.SIGKILL and i not in killed]
        if late:
            return f"processes {late} had not ended after {self.within} s"
        if 0 in statuses:
            return "a run that was ended looks finished"
        if self.sent is signal.SIGTERM and self.step is not None and set(statuses) != {143}:
            return "SIGTERM in training has not ended all with 143"
        return None


def drawn(count: int, part: int, draw: random.Random) -> Ending:
    """Return an ending by chance.

    Args:
      count: of the processes.
      part: of the run: later parts end later.
      draw: where chance comes from.
    """
    steps = STEPS // ENDINGS
    training = draw.random() < 0.75
    return Ending(
        sent=draw.choice((signal.SIGKILL, signal.SIGTERM)),
        chosen=draw.choice((tuple(range(count)), (draw.randrange(count),))),
        step=steps * part + 2 * draw.randint(1, steps // 2 - 1) if training else None,
        delay=draw.random() / 10 if training else 10 * draw.random(),
    )


def interrupted(directory: Path, count: int, endings: Sequence[Ending]) -> Iterator[str]:
    """Train a run that is ended so, one after the other; yield what is wrong."""
    for ending in (*endings, None):
        resume = ["--resume"] if (directory / "config.json").exists() else []
        run = start(directory, *resume, "--connect-timeout", "45", count=count)
        if ending is None:
            statuses, said = run.end(WAITING)
            fault = None if set(statuses) == {0} else "the run has not come to its end"
        else:
            try:
                statuses, said = ending.come(run)
            except AssertionError as error:
                yield f"{ending}: {error}"
                return
            # A signal may come so late that all steps are done before the processes agree on one.
            finished = set(statuses) == {0} and (directory / "qat" / str(STEPS)).exists()
            fault = None if finished else ending.fault(statuses)
        if fault is not None:
            yield f"{ending}: {fault}: {statuses} {said}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What became of a run of the loop.

    Attributes:
      count: of its processes.
      number: of its round; nothing ends the runs of round 0.
      endings: how it was ended, one after the other.
      faults: what was wrong with that.
      digest: of its last checkpoint; None: there is none.
    """

    count: int
    number: int
    endings: Sequence[str]
    faults: Sequence[str]
    digest: str | None


def kept_of(count: int, number: int) -> Kept:
    """Train a run of the loop, which the numbers decide."""
    draw = random.Random(100 * count + number)
    endings = [drawn(count, part, draw) for part in range(ENDINGS)] if number else []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        faults = list(interrupted(directory, count, endings))
        ended = (directory / "qat" / str(STEPS)).exists()
        return Kept(
            count=count,
            number=number,
            endings=list(map(str, endings)),
            faults=faults,
            digest=digest(directory) if ended else None,
        )


def main() -> None:
    """Interrupt runs; print what became of each, and exit with 1 where that is not right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4), help="of the runs")
    parser.add_argument("--kept", type=Path, default=Path("runs/endings.jsonl"))
    options = parser.parse_args()
    options.kept.parent.mkdir(parents=True, exist_ok=True)
    options.kept.touch()
    found = [Kept(**json.loads(line)) for line in options.kept.read_text().splitlines()]
    done = {(run.count, run.number): run for run in found}
    endings, wrong = 0, 0
    for number in range(options.rounds + 1):
        for count in options.processes:
            if (count, number) not in done:
                done[count, number] = kept_of(count, number)
                with options.kept.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(done[count, number])) + "\n")
            run = done[count, number]
            equal = run.digest is not None and run.digest == done[count, 0].digest
            ended = f"{count} processes, ended {len(run.endings)} times"
            told = f"round {number}: {ended}: {'equal' if equal else 'other'} bits"
            print("\n  ".join([told, *run.faults]), flush=True)
            endings += len(run.endings)
            wrong += not equal or bool(run.faults)
    print(f"{endings} endings; {wrong} runs are not as they should be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
