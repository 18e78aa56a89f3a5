"""What a training run shows: a bar, a line for each epoch, the plan in short, a final table."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import simqat_jax as sq
from experiments import checkpoints, runs
from experiments.configs import Experiment
from experiments.phases import Phase, TrainState
from experiments.training import Report

_BAR = 12
"""Columns of the bar itself: with all beside it a line of 80 holds it."""
_FEW = 4
"""So many operations that stay float are named."""


@contextlib.contextmanager
def shown(phase: Phase, console: Console) -> Iterator[Report]:
    """Yield a report that moves a progress bar and prints one line for each finished epoch."""
    steps, epochs = phase.steps_per_epoch, phase.epochs
    printed = 0
    with Progress(
        TextColumn("{task.description}"),
        TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(_BAR),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(phase.name, total=epochs * steps, loss="", epoch=1, epochs=epochs)

        def report(progress: checkpoints.Progress, state: TrainState) -> None:
            del state
            nonlocal printed
            for record in progress.history[printed:]:
                line = epoch_line(phase.name, record, epochs)
                console.print(line, highlight=False, soft_wrap=True)
            printed = len(progress.history)
            loss = f"loss {progress.loss_sum / progress.step:.4f}" if progress.step else ""
            done = progress.epoch * steps + progress.step
            epoch = min(progress.epoch + 1, epochs)
            bar.update(task, completed=done, loss=loss, epoch=epoch)

        yield report


def epoch_line(name: str, record: dict, epochs: int) -> str:
    """Return an epoch's figures in a line of a terminal: at most 80 characters."""
    return (
        f"{name:12} {record['epoch']:{len(str(epochs))}}/{epochs}  loss {record['loss']:.4f}  "
        f"top-1 {record['accuracy']:.2%}  top-5 {record['top5_accuracy']:.2%}  "
        f"{record['epoch_seconds']:.1f} s"
    )


def plan_summary(plan: sq.Plan, path: Path) -> str:
    """Return a plan in a few lines, and where all of it is."""
    named = list(dict.fromkeys(name for name, _ in plan.floats))
    more = f" and {len(named) - _FEW} more" if len(named) > _FEW else ""
    floats = f": {', '.join(named[:_FEW])}{more}" if named else ""
    widths = [
        f"{plural} {_widths(plan, role)}"
        for role, plural in (("weight", "weights"), ("activation", "activations"))
    ]
    return (
        f"plan: {len(plan.rows)} operations, {len(plan.floats)} of them float{floats}\n"
        f"      {'; '.join(widths)}\n"
        f"      all of it: {path}"
    )


def _widths(plan: sq.Plan, role: str) -> str:
    counts = Counter(q.spec.num_bits for q in plan.quantizers.values() if q.role == role)
    if len(counts) == 1:
        return f"{next(iter(counts))} bits"
    return ", ".join(f"{bits} bits ({count})" for bits, count in sorted(counts.items())) or "none"


def final_table(experiment: Experiment, results: dict[str, checkpoints.Progress]) -> Table:
    """Return the final comparison: last epoch's accuracy and the time of a step."""
    title = f"{experiment.config} on {experiment.data}, seed {experiment.seed}"
    table = Table(title=title, caption=f"on {jax.devices()[0]}")
    table.add_column("phase")
    for column in ("epochs", "top-1", "against float, points", "top-5", "ms/step", "compile s"):
        table.add_column(column, justify="right")
    baseline = results["float"].history[-1]["accuracy"] if "float" in results else None
    for name, progress in results.items():
        last = progress.history[-1]
        against = ""
        if name != "float" and baseline is not None:
            against = f"{(last['accuracy'] - baseline) * 100:+.2f}"
        table.add_row(
            name,
            str(last["epoch"]),
            f"{last['accuracy']:.2%}",
            against,
            f"{last['top5_accuracy']:.2%}",
            f"{runs.seconds_per_step(progress) * 1e3:.2f}",
            f"{progress.compile_seconds:.1f}",
        )
    return table
