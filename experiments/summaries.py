"""Losses, accuracies and ranges for TensorBoard (extra `tensorboard`)."""

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import simqat_jax as sq
from experiments import phases
from experiments.checkpoints import Progress
from experiments.errors import ExperimentError
from experiments.phases import Phase, TrainState
from experiments.training import Report

FOLDER = "tensorboard"
"""In a run's directory; a folder for each phase is in it."""


def writer_package() -> ModuleType:
    """Return the package that writes.

    Raises:
      ExperimentError: it is not installed.
    """
    try:
        return importlib.import_module("tensorboardX")
    except ImportError as error:
        raise ExperimentError(
            "--tensorboard needs tensorboardX: pip install -e '.[tensorboard]'."
        ) from error


@contextlib.contextmanager
def written(phase: Phase, run: Path) -> Iterator[Report]:
    """Yield a report that writes the loss every few steps, and all else after every epoch.

    What a stopped run has written beyond its last checkpoint is left out by TensorBoard.
    """
    package = writer_package()
    writers: list[Any] = []
    closed = 0

    def report(progress: Progress, state: TrainState) -> None:
        nonlocal closed
        step = progress.epoch * phase.steps_per_epoch + progress.step
        if not writers:
            folder = str(run / FOLDER / phase.name)
            writers.append(package.SummaryWriter(folder, purge_step=step + 1 if step else None))
            closed = progress.epoch
        (writer,) = writers
        if progress.step:
            writer.add_scalar("loss/running", progress.loss_sum / progress.step, step)
        for record in progress.history[closed:]:
            writer.add_scalar("loss/epoch", record["loss"], step)
            writer.add_scalar("accuracy/top-1", record["accuracy"], step)
            writer.add_scalar("accuracy/top-5", record["top5_accuracy"], step)
            for name, value in _ranges(phase, state).items():
                writer.add_scalar(name, value, step)
        closed = progress.epoch

    try:
        yield report
    finally:
        for writer in writers:
            writer.close()


def _ranges(phase: Phase, state: TrainState) -> dict[str, float]:
    """Return both ends of every range that has been observed, in real units."""
    if not isinstance(phase.model, sq.QuantizedModule):
        return {}
    plan = phase.model.plan(state.variables, phases.model_input(phase), train=False)
    ends = {
        f"range/{name}/{end}": getattr(quantizer, end)
        for name, quantizer in plan.quantizers.items()
        for end in ("lo", "hi")
    }
    return {name: value for name, value in ends.items() if value is not None}
