"""Train a float baseline and its quantization-aware twins, and compare them.

    python -m experiments.train --config lenet5_mnist

Three phases: `float`, the baseline; `qat`, SimQAT from scratch; `qat_finetune`, SimQAT from the
baseline's parameters, or from those of another run with --float-checkpoint. All checkpoints,
config.json and results.json go to RUNS_DIR/NAME.
"""

import contextlib
from collections.abc import Iterator

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import simqat_jax as sq
from experiments import checkpoints, job, phases, preemption, processes, runs, training
from experiments.arguments import Arguments
from experiments.configs import Experiment
from experiments.errors import run_or_exit
from experiments.job import Job, Results
from experiments.phases import Phase
from experiments.training import Report


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(
        Arguments,
        prog="python -m experiments.train",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    connection = arguments.connection()
    with processes.connected(connection):
        quiet = connection is not None and jax.process_index() > 0
        run_experiment(arguments, Console(quiet=quiet))


def run_experiment(arguments: Arguments, console: Console) -> Results:
    """Train the chosen phases, write results.json and print the table.

    Raises:
      ExperimentError: what experiments.runs, experiments.training or experiments.data refuse.
    """
    prepared = processes.together(lambda: job.prepare(arguments))
    processes.check_agreement(job.facts(prepared, arguments))
    with job.opened(prepared, arguments) as run:
        results = _train_phases(prepared, console)
        processes.together(lambda: job.write_results(prepared, run, results))
    console.print(_table(prepared.experiment, results))
    console.print(f"results: {run / 'results.json'}", soft_wrap=True)
    return results


def _train_phases(prepared: Job, console: Console) -> Results:
    results: Results = {}
    float_state = None
    if prepared.start is not None:
        float_state, progress = prepared.start
        if progress.history:
            results["float"] = progress
    for phase in prepared.chosen:
        state = phases.init_state(phase)
        if phase.name != "float" and not results.keys() & {"qat", "qat_finetune"}:
            console.print(_plan(phase, state), highlight=False, markup=False, soft_wrap=True)
        if phase.name == "qat_finetune":
            assert float_state is not None, "checked before"
            state = phases.start_from(state, float_state)
        with _reporting(phase, console) as report, preemption.noticed() as notice:
            state, results[phase.name] = training.train(phase, state, report, notice)
        if phase.name == "float":
            float_state = state
    return results


def _plan(phase: Phase, state: phases.TrainState) -> str:
    assert isinstance(phase.model, sq.QuantizedModule)
    return str(phase.model.plan(state.variables, phases.model_input(phase), train=False))


@contextlib.contextmanager
def _reporting(phase: Phase, console: Console) -> Iterator[Report]:
    """Yield a report that moves a progress bar and prints one line for each finished epoch."""
    steps, epochs = phase.steps_per_epoch, phase.epochs
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
        f"top-1 {record['accuracy']:.2%}  top-5 {record['top5_accuracy']:.2%}  "
        f"{record['epoch_seconds']:.1f} s  {record['seconds_per_step'] * 1e3:.2f} ms/step"
    )


def _table(experiment: Experiment, results: Results) -> Table:
    """Return the final comparison: last epoch's accuracy and the time of a step."""
    title = f"{experiment.config} on {experiment.data}, seed {experiment.seed}"
    table = Table(title=title, caption=f"on {jax.devices()[0]}")
    table.add_column("phase")
    for column in ("epochs", "top-1", "against float", "top-5", "ms/step", "compile s"):
        table.add_column(column, justify="right")
    baseline = results["float"].history[-1]["accuracy"] if "float" in results else None
    for name, progress in results.items():
        last = progress.history[-1]
        against = ""
        if name != "float" and baseline is not None:
            against = f"{(last['accuracy'] - baseline) * 100:+.2f} points"
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


if __name__ == "__main__":
    run_or_exit(main, "The same command with --resume continues the run.")
