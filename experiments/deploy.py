"""Convert what a run has trained to an ONNX and a TFLite file, and check them on the test set.

Example: python -m experiments.deploy runs/NAME
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

import simqat_jax as sq
from experiments import checkpoints, comparison, data, phases, runs
from experiments.comparison import Row
from experiments.configs import Experiment
from experiments.errors import ExperimentError, run_or_exit

_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    run: tyro.conf.Positional[Path]
    """The run: runs/NAME."""
    phase: str | None = None
    """Which phase to deploy; by default the last quantized one that was trained."""
    examples: int | None = None
    """How many test images to check on; by default all."""


def deploy(run: Path, phase_name: str | None = None, examples: int | None = None) -> list[Row]:
    """Write `model.onnx`, `model.tflite`, both integer models and `deploy.json` into `run/deploy`.

    Args:
      run: the run's directory.
      phase_name: "qat" or "qat_finetune"; None: the later of them that was trained.
      examples: how many test images to check on; None: all.

    Raises:
      ExperimentError: nothing quantized was trained there; the files cannot be written.
    """
    experiment = runs.load_experiment(run)
    dataset = data.load(experiment.data, experiment.image_size)
    if phase_name is None:
        trained = [n for n in ("qat_finetune", "qat") if checkpoints.latest(run / n) is not None]
        phase_name = trained[0] if trained else "qat"
    phase = phases.build(phase_name, experiment, dataset, run)
    step = checkpoints.latest(phase.directory)
    if step is None or phase_name == "float":
        raise ExperimentError(
            f"nothing to deploy in {run}: train it first, with --phases float qat_finetune."
        )
    state, _ = checkpoints.restore(phase.directory, step, phases.init_state(phase))
    model = phase.model
    assert isinstance(model, sq.QuantizedModule), "the phase is a quantized one"
    network = comparison.Network(
        module=model.module,
        config=model.config,
        variables=state.variables,
        baseline=baseline(experiment, dataset, run),
        trained=True,
    )
    images = _test_set(dataset, examples)
    folder = run / "deploy"
    try:
        folder.mkdir(exist_ok=True)
        rows = comparison.compare(network, images, folder)
        report = [dataclasses.asdict(row) for row in rows]
        content = {"phase": phase_name, "step": step, "images": len(images.x), "rows": report}
        runs.write_json(folder / "deploy.json", content)
    except OSError as error:
        raise ExperimentError(
            f"cannot write {folder}: {error.strerror or error}. Make room, or make it writable, "
            "and give the command again."
        ) from error
    return rows


def baseline(experiment: Experiment, dataset: data.ImageData, run: Path) -> dict[str, Any] | None:
    """Return the variables of the run's float phase, or of the one that it started from.

    None: it has none, or what it started from is gone.
    """
    step = checkpoints.latest(run / "float")
    if step is not None:
        phase = phases.build("float", experiment, dataset, run)
        return checkpoints.restore(phase.directory, step, phases.init_state(phase))[0].variables
    if experiment.float_checkpoint is None or not Path(experiment.float_checkpoint).exists():
        return None
    return phases.read_float(Path(experiment.float_checkpoint))[0].variables


def _test_set(dataset: data.ImageData, examples: int | None) -> comparison.Labelled:
    images, labels = [], []
    for batch, wanted, mask in dataset.test_batches(_BATCH):
        images.append(np.asarray(dataset.transform(jnp.asarray(batch), None))[mask])
        labels.append(wanted[mask])
    x, classes = np.concatenate(images)[:examples], np.concatenate(labels)[:examples]
    return comparison.Labelled(x=x, labels=classes, batch=_BATCH)


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.deploy", description=__doc__)
    rows = deploy(arguments.run, arguments.phase, arguments.examples)
    comparison.show(rows, f"{arguments.run}: the same codes everywhere")
    if any(row.differing for row in rows):
        raise ExperimentError("some codes differ: see the table.")


if __name__ == "__main__":
    run_or_exit(main)
