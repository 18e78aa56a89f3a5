"""Time training steps on a mesh of virtual CPU devices, and over processes.

Examples:
  python -m experiments.benchmarks.scaling  # 1, 2, 4 and 8 devices, 1 and 2 processes

On two cores this shows what dividing a step costs, not what it brings. Wall time is that of process
0, processor time the sum of all processes; both are medians over rounds, without compilation.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import configs, data, mesh, phases, processes
from experiments.errors import run_or_exit
from experiments.steps import make_train_step

_GRID = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2))
"""(devices, processes)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    config: str = "lenet5_mnist"
    data: str = "mnist5k"
    batch_size: int = 64
    rounds: int = 5
    steps: int = 10
    """In a round."""
    worker: tuple[int, int, int] | None = None
    """Of this command alone: port of the coordinator, number of processes, number of this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds a step."""

    wall: float
    processor: float


def measure(arguments: Arguments) -> Times:
    """Return the times of a quantized training step on all devices, in this process."""
    experiment = configs.get(arguments.config, data=arguments.data, batch_size=arguments.batch_size)
    layout = mesh.parse(None)
    phase = phases.build("qat", experiment, data.load(experiment.data), Path(), layout=layout)
    size = experiment.batch_size
    read = list(phase.dataset.train_batches(size, 0, 0, 0, layout.rows(size)))[: arguments.steps]
    step, state = make_train_step(phase), layout.place(phases.init_state(phase))
    state, _ = step(state, layout.put(read[0], size))
    walls, processors = [], []
    for _ in range(arguments.rounds):
        jax.block_until_ready(state)
        wall, processor = time.perf_counter(), time.process_time()
        for batch in read:
            state, _ = step(state, layout.put(batch, size))
        jax.block_until_ready(state)
        walls.append((time.perf_counter() - wall) / len(read) * 1e3)
        processors.append((time.process_time() - processor) / len(read) * 1e3)
    return Times(wall=float(np.median(walls)), processor=float(np.median(processors)))


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.worker is not None:
        _work(arguments, *arguments.worker)
        return
    table = Table(title=f"{arguments.config}, batch {arguments.batch_size}, ms a step")
    for column in ("devices", "processes", "wall", "processor"):
        table.add_column(column, justify="right")
    for devices, count in _GRID:
        times = _start(devices, count)
        processor = sum(t.processor for t in times)
        table.add_row(str(devices), str(count), f"{times[0].wall:.1f}", f"{processor:.1f}")
    Console().print(table)


def _start(devices: int, count: int) -> list[Times]:
    """Return the times of each of `count` processes that share `devices`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={devices // count}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}",
    }
    command = [sys.executable, "-m", "experiments.benchmarks.scaling", *sys.argv[1:]]
    started = [
        subprocess.Popen(
            [*command, "--worker", str(port), str(count), str(index)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    printed = [process.communicate()[0] for process in started]
    return [Times(**json.loads(text.splitlines()[-1])) for text in printed]


def _work(arguments: Arguments, port: int, count: int, index: int) -> None:
    connection = processes.Connection(coordinator=f"127.0.0.1:{port}", count=count, index=index)
    with processes.connected(connection if count > 1 else None):
        print(json.dumps(dataclasses.asdict(measure(arguments))), flush=True)


if __name__ == "__main__":
    run_or_exit(main)
