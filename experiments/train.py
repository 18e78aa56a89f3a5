"""Train a float baseline and its quantization-aware twins, and compare them.

    python -m experiments.train --config lenet5_mnist

Three phases: `float`, the baseline; `qat`, SimQAT from scratch; `qat_finetune`, SimQAT from the
baseline's parameters. All checkpoints, config.json and results.json go to RUNS_DIR/NAME.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import simqat_jax as sq
from experiments import checkpoints, configs, data, phases, runs, training
from experiments.configs import Experiment
from experiments.data import Dataset
from experiments.errors import ExperimentError, run_or_exit
from experiments.phases import Phase
from experiments.training import Report

Results = dict[str, checkpoints.Progress]


_CONFIGS = "(default: the config's)"
_Text = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=_CONFIGS)]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_CONFIGS)]
_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_CONFIGS)]
_Steps = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")]
_Name = Annotated[
    str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: CONFIG-DATA-seedSEED)")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command; what is not given is the config's."""

    config: Annotated[str, tyro.conf.arg(help=f"Experiment to run: {', '.join(configs.CONFIGS)}.")]
    data: _Text = None
    """Data set: mnist (full, through tensorflow-datasets) or mnist5k (installed already)."""
    epochs: _Int = None
    """Epochs of each phase."""
    batch_size: _Int = None
    """Images in a training batch."""
    learning_rate: _Float = None
    """Learning rate of every phase."""
    seed: _Int = None
    """Seed of the first parameters and of the order of the images."""
    steps_per_dispatch: _Int = None
    """Training steps in one compiled loop; 1 is fastest on CPU."""
    name: _Name = None
    """Name of the run's directory."""
    runs_dir: Path = Path("runs")
    """Directory of all runs."""
    resume: bool = False
    """Continue a run that was stopped, bit for bit as if it had not been."""
    checkpoint_every: _Steps = None
    """Steps between checkpoints, besides the one after every epoch."""
    keep: int = 2
    """Newest checkpoints kept of each phase."""


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(
        Arguments,
        prog="python -m experiments.train",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    run_experiment(arguments, Console())


def run_experiment(arguments: Arguments, console: Console) -> Results:
    """Train all phases, write results.json and print the table.

    Raises: ExperimentError: see experiments.runs, experiments.training and experiments.data.
    """
    experiment = _experiment(arguments)
    dataset = data.load(experiment.data)
    _check_batch(experiment, dataset)
    name = arguments.name
    if name is None:
        name = f"{experiment.config}-{experiment.data}-seed{experiment.seed}"
    run = runs.open_run(arguments.runs_dir, name, experiment, arguments.resume)
    results = _train_phases(arguments, experiment, dataset, run, console)
    path = runs.write_results(run, experiment, results)
    console.print(_table(experiment, results))
    console.print(f"results: {path}", soft_wrap=True)
    return results


def _experiment(arguments: Arguments) -> Experiment:
    """Return the config with the given options; check those that are not part of it."""
    for option in ("checkpoint_every", "keep"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            flag = "--" + option.replace("_", "-")
            raise ExperimentError(f"{flag} must be 1 or more, got {value}.")
    overrides = {field: getattr(arguments, field) for field in configs.OVERRIDABLE}
    return configs.get(arguments.config, **overrides)


def _check_batch(experiment: Experiment, dataset: Dataset) -> None:
    """Raise ExperimentError where an epoch would hold no training step."""
    images = experiment.batch_size * experiment.steps_per_dispatch
    total = len(dataset.train_labels)
    if images > total:
        raise ExperimentError(
            f"--batch-size {experiment.batch_size} times --steps-per-dispatch "
            f"{experiment.steps_per_dispatch} is more than the {total} training images of "
            f"{dataset.name}: no training step would be left in an epoch."
        )


def _train_phases(
    arguments: Arguments, experiment: Experiment, dataset: Dataset, run: Path, console: Console
) -> Results:
    options = {"keep": arguments.keep, "checkpoint_every": arguments.checkpoint_every}
    results: Results = {}
    float_state = None
    for name in phases.NAMES:
        phase = phases.build(name, experiment, dataset, run, **options)
        state = phases.init_state(phase)
        if name == "qat":
            console.print(_plan(phase, state), highlight=False, markup=False, soft_wrap=True)
        if name == "qat_finetune":
            assert float_state is not None, "the float phase comes first"
            state = phases.start_from(state, float_state)
        with _reporting(phase, console) as report:
            state, results[name] = training.train(phase, state, report)
        if name == "float":
            float_state = state
    return results


def _plan(phase: Phase, state: phases.TrainState) -> str:
    variables = {"params": state.params, **state.collections}
    assert isinstance(phase.model, sq.QuantizedModule)
    return str(phase.model.plan(variables, phase.dataset.test_images[:1], train=False))


@contextlib.contextmanager
def _reporting(phase: Phase, console: Console) -> Iterator[Report]:
    """Yield a report that moves a progress bar and prints one line for each finished epoch."""
    steps, epochs = phase.steps_per_epoch, phase.experiment.epochs
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    printed = 0
    with Progress(
        *columns,
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(phase.name, total=epochs * steps, loss="")

        def report(progress: checkpoints.Progress) -> None:
            nonlocal printed
            for record in progress.history[printed:]:
                console.print(_line(phase.name, record, epochs), highlight=False)
            printed = len(progress.history)
            loss = f"loss {progress.loss_sum / progress.step:.4f}" if progress.step else ""
            done = progress.epoch * steps + progress.step
            bar.update(task, completed=done, loss=loss)

        yield report


def _line(name: str, record: dict, epochs: int) -> str:
    return (
        f"{name:12}  epoch {record['epoch']:3}/{epochs}  loss {record['loss']:.4f}  "
        f"accuracy {record['accuracy']:.2%}  {record['epoch_seconds']:.1f} s  "
        f"{record['seconds_per_step'] * 1e3:.2f} ms/step"
    )


def _table(experiment: Experiment, results: Results) -> Table:
    """Return the final comparison: last epoch's accuracy and the time of a step."""
    title = f"{experiment.config} on {experiment.data}, seed {experiment.seed}"
    table = Table(title=title, caption=f"after {experiment.epochs} epochs on {jax.devices()[0]}")
    table.add_column("phase")
    for column in ("accuracy", "against float", "ms/step", "compile s"):
        table.add_column(column, justify="right")
    baseline = results["float"].history[-1]["accuracy"]
    for name, progress in results.items():
        accuracy = progress.history[-1]["accuracy"]
        table.add_row(
            name,
            f"{accuracy:.2%}",
            "" if name == "float" else f"{(accuracy - baseline) * 100:+.2f} points",
            f"{runs.seconds_per_step(progress) * 1e3:.2f}",
            f"{progress.compile_seconds:.1f}",
        )
    return table


if __name__ == "__main__":
    run_or_exit(main, "The same command with --resume continues the run.")
