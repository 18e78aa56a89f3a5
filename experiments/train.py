"""Train a float baseline and its quantization-aware twins, and compare them.

    python -m experiments.train --config lenet5_mnist

Three phases: `float`, the baseline; `qat`, SimQAT from scratch; `qat_finetune`, SimQAT from the
baseline's parameters, or from those of another run with --float-checkpoint. All checkpoints,
config.json and results.json go to RUNS_DIR/NAME.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax
import tyro
from rich.console import Console

import simqat_jax as sq
from experiments import (
    checkpoints,
    job,
    phases,
    preemption,
    processes,
    reporting,
    runs,
    summaries,
    training,
)
from experiments.arguments import Arguments
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
        results = _train_phases(prepared, run, arguments.tensorboard, console)
        processes.together(lambda: job.write_results(prepared, run, results))
    console.print(reporting.final_table(prepared.experiment, results))
    console.print(f"results: {run / 'results.json'}", soft_wrap=True)
    return results


def _train_phases(prepared: Job, run: Path, tensorboard: bool, console: Console) -> Results:
    results: Results = {}
    float_state = None
    if prepared.start is not None:
        float_state, progress = prepared.start
        if progress.history:
            results["float"] = progress
    for phase in prepared.chosen:
        state = phases.init_state(phase)
        if phase.name != "float" and not results.keys() & {"qat", "qat_finetune"}:
            console.print(_plan(phase, state, run), highlight=False, markup=False, soft_wrap=True)
        if phase.name == "qat_finetune":
            assert float_state is not None, "checked before"
            state = phases.start_from(state, float_state)
        with contextlib.ExitStack() as stack:
            reports = [stack.enter_context(reporting.shown(phase, console))]
            if tensorboard and jax.process_index() == 0:
                reports.append(stack.enter_context(summaries.written(phase, run)))
            notice = stack.enter_context(preemption.noticed())
            state, results[phase.name] = training.train(phase, state, _told(reports), notice)
        if phase.name == "float":
            float_state = state
    return results


def _plan(phase: Phase, state: phases.TrainState, run: Path) -> str:
    """Write the plan into the run, in process 0; return it in short."""
    assert isinstance(phase.model, sq.QuantizedModule)
    plan = phase.model.plan(state.variables, phases.model_input(phase), train=False)
    if jax.process_index() == 0:
        runs.write_plan(run, f"{plan}\n\n{plan.details()}\n")
    return reporting.plan_summary(plan, run / runs.PLAN)


def _told(reports: Sequence[Report]) -> Report:
    """Return one report that makes several."""

    def report(progress: checkpoints.Progress, state: phases.TrainState) -> None:
        for one in reports:
            one(progress, state)

    return report


if __name__ == "__main__":
    run_or_exit(main, "The same command with --resume continues the run.")
