"""Print the test accuracy of what a run has trained.

Example: python -m experiments.evaluate runs/NAME
"""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from experiments import checkpoints, data, phases, runs, training
from experiments.errors import ExperimentError, run_or_exit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    checkpoint: tyro.conf.Positional[Path]
    """A run (newest checkpoint of every phase), one of its phases, or one checkpoint of a phase:
    runs/NAME, runs/NAME/qat, runs/NAME/qat/1250."""
    workers: int = 0
    """Processes that decode a streamed data set; 0: this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy, 0 to 1, of one checkpoint."""

    phase: str
    step: int
    accuracy: float
    top5_accuracy: float


def evaluate(path: Path, workers: int = 0) -> list[Evaluation]:
    """Return the test accuracy of every checkpoint that `path` names.

    Args:
      path: a run, one of its phases, or one checkpoint of a phase.
      workers: processes that decode a streamed data set; 0: this one.

    Raises:
      ExperimentError: none of these; a corrupt checkpoint, or one of another model.
    """
    run, chosen = _locate(path)
    experiment = runs.load_experiment(run)
    dataset = data.load(experiment.data, experiment.image_size, workers)
    evaluations = []
    for name, step in chosen:
        phase = phases.build(name, experiment, dataset, run)
        state, _ = checkpoints.restore(phase.directory, step, phases.init_state(phase))
        metrics = training.make_evaluation(phase)(state)
        evaluations.append(Evaluation(phase=name, step=step, **metrics._asdict()))
    return evaluations


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.evaluate", description=__doc__)
    path = arguments.checkpoint
    table = Table()
    for column in ("phase", "steps", "top-1", "top-5"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for evaluation in evaluate(path, arguments.workers):
        shares = f"{evaluation.accuracy:.2%}", f"{evaluation.top5_accuracy:.2%}"
        table.add_row(evaluation.phase, str(evaluation.step), *shares)
    console = Console()
    console.print(table)
    console.print(f"test accuracy of {path}", soft_wrap=True, highlight=False)


def _locate(path: Path) -> tuple[Path, list[tuple[str, int]]]:
    """Return the run and the (phase, step) pairs that `path` names."""
    if not path.is_dir():
        raise ExperimentError(f"no checkpoint at {path}: there is no such directory.")
    if path.name in phases.NAMES:
        run, names = path.parent, [path.name]
    elif path.name.isdigit() and path.parent.name in phases.NAMES:
        return path.parent.parent, [(path.parent.name, int(path.name))]
    else:
        run, names = path, list(phases.NAMES)
    newest = [(name, checkpoints.latest(run / name)) for name in names]
    chosen = [(name, step) for name, step in newest if step is not None]
    if not chosen:
        raise ExperimentError(
            f"no checkpoint at {path}: give a run, such as runs/NAME, one of its phases "
            f"({', '.join(phases.NAMES)}), or one checkpoint, such as runs/NAME/qat/1250."
        )
    return run, chosen


if __name__ == "__main__":
    run_or_exit(main)
