"""Training steps beside those of other tools: each against its own framework's float step.

Every tool runs in a process and an environment of its own, where what is not installed is left out:
`make peers` (qwix) and `make peers-torch` (torch.ao, PT2E, Brevitas, NNCF).

Example:
  make peers peers-torch
  python -m experiments.benchmarks.peers.train_step --model lenet5 --data mnist5k
  python -m experiments.benchmarks.peers.train_step --model resnet20 --batch-size 64
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
import tyro

import simqat_jax as sq
from experiments.benchmarks.peers.lessons import accuracy, taught
from experiments.benchmarks.peers.orders import test_batches
from experiments.benchmarks.records import HISTORY, Row, report
from experiments.benchmarks.timing import Figure, Times, timed
from experiments.benchmarks.train_step import WORKLOADS
from experiments.benchmarks.trainer import Trainer
from experiments.data import Dataset, load
from experiments.errors import ExperimentError, run_or_exit

Found = dict[str, dict[str, Any]]
"""Of each tool: "wall" and "processor" seconds of each round, and what it learned, or "error"."""


def _data(name: str, path: Path) -> str:
    data = cast(Dataset, load(name))
    if data.test_images.shape[1:] != (32, 32, 1):
        raise ExperimentError(f"--data {name} holds no digits: LeNet5 learns mnist5k or mnist.")
    np.savez(
        path,
        images=data.train_images.astype(np.float32),
        labels=data.train_labels.astype(np.int32),
        test_images=data.test_images.astype(np.float32),
        test_labels=data.test_labels.astype(np.int32),
    )
    return str(path)


def ours(model: str, batch_size: int, rounds: int, data: str) -> Found:
    """Return what this library's step takes, and what float learns, first."""
    workload = WORKLOADS[model]
    qmodel = sq.SimQAT().apply(workload.model())
    modules = {"JAX, float": workload.model(), "simqat_jax": qmodel}
    trainers = {name: Trainer(m, workload.image, batch_size) for name, m in modules.items()}
    for trainer in trainers.values():
        trainer.trace()
        trainer.compile()
    found: Found = {}
    for name, times in timed(trainers, rounds).items():
        found[name] = {"wall": times.wall.tolist(), "processor": times.processor.tolist()}
    if not data:
        return found
    arrays = dict(np.load(data))
    for name, trainer in trainers.items():
        logits, labels = taught(trainer, arrays, batch_size)
        found[name]["accuracy"] = accuracy(logits, labels)
        if name == "simqat_jax":
            images, _ = test_batches(arrays, batch_size)
            variables = {"params": trainer.state[0], **trainer.state[1]}
            integer = sq.convert(qmodel, variables, images[0], train=False)
            classes = np.concatenate([np.asarray(integer(x)).argmax(-1) for x in images])
            changed = int((classes != logits.argmax(-1)).sum())
            found[name] |= {"changed": changed, "of": len(labels)}
    return found


def theirs(python: Path, module: str, arguments: list[str]) -> Found:
    """Return what the tools of another environment take; none where it is not there."""
    if not python.exists():
        print(f"{python} does not exist: left out. See the Makefile for what makes it.")
        return {}
    command = [str(python), "-m", f"experiments.benchmarks.peers.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)
    if process.returncode:
        print(f"{module} failed, see above: left out.")
        return {}
    return json.loads(process.stdout.splitlines()[-1])


def rows(found: Found, case: dict[str, str]) -> list[Row]:
    """Return the rows of the tools of one process; the first one is what they are compared with."""

    def times(name: str) -> Times:
        return Times(*(np.asarray(found[name][kind]) for kind in ("wall", "processor")))

    measured = [name for name in found if "wall" in found[name]]
    made = []
    for name in measured:
        figures = {
            "step, ms": Figure.of(times(name).wall).times(1e3),
            "step / float": times(name).ratio(times(measured[0])),
            "processor / float": times(name).processor_ratio(times(measured[0])),
        }
        if "accuracy" in found[name]:
            figures["wrong, %"] = Figure.exactly(100 * (1 - found[name]["accuracy"]))
        if "changed" in found[name]:
            title = f"changed by conversion, of {found[name]['of']:,}"
            figures[title] = Figure.exactly(found[name]["changed"])
        made.append(Row(case={**case, "tool": name}, figures=figures))
    for name in found.keys() - set(measured):
        print(f"{name} failed: {found[name]['error']}")
    return made


def main(
    model: Literal["lenet5", "resnet20"] = "lenet5",
    batch_size: int = 32,
    rounds: int = 30,
    data: str | None = None,
    peers: Path = Path(".venv-peers/bin/python"),
    torch: Path = Path(".venv-torch/bin/python"),
    history: Path | None = HISTORY,
) -> None:
    """Print each tool's step, and its ratio to the float step of its own framework.

    Args:
      model: the network.
      batch_size: images in a step.
      rounds: interleaved timings of each step.
      data: mnist5k or mnist: what LeNet5 learns for two epochs, to show what it gets wrong then,
        and how many predictions conversion to integers changes.
      peers: Python of `make peers`.
      torch: Python of `make peers-torch`.
      history: JSON lines to add to; "None": nowhere.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = "" if data is None else _data(data, Path(folder, "data.npz"))
        arguments = [model, str(batch_size), str(rounds), path]
        found = [
            ours(model, batch_size, rounds, path),
            theirs(peers, "qwix_steps", arguments),
            theirs(torch, "torch_steps", arguments),
        ]
    case = {"model": model, "batch": str(batch_size)}
    made = [row for part in found if part for row in rows(part, case)]
    title = f"training steps, two epochs of {data or 'nothing'}, jax {jax.__version__}"
    report("peers.train_step", title, made, history)


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))
