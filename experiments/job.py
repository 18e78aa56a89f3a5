"""What one command trains: checked in every process, agreed upon by all, opened by one."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import simqat_jax as sq
from experiments import (
    checkpoints,
    configs,
    data,
    mesh,
    phases,
    processes,
    quantization,
    runs,
    summaries,
)
from experiments.arguments import Arguments
from experiments.configs import Experiment
from experiments.data import ImageData
from experiments.errors import ExperimentError
from experiments.mesh import Layout
from experiments.phases import Phase

Results = dict[str, checkpoints.Progress]
FloatStart = tuple[phases.TrainState, checkpoints.Progress]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained."""

    experiment: Experiment
    layout: Layout
    dataset: ImageData
    name: str
    chosen: list[Phase]
    start: FloatStart | None


def prepare(arguments: Arguments) -> Job:
    """Return what is to be trained; each process does so by itself.

    Raises:
      ExperimentError: a wrong option, data set or start.
    """
    experiment = _experiment(arguments)
    layout = mesh.parse(arguments.mesh)
    check_division(experiment, layout)
    dataset = data.load(experiment.data, experiment.image_size, arguments.workers)
    _check_batch(experiment, dataset)
    if arguments.tensorboard:
        summaries.writer_package()  # before anything is trained
    name = arguments.name
    if name is None:
        name = f"{experiment.config}-{experiment.data}-seed{experiment.seed}"
    options = {"keep": arguments.keep, "checkpoint_every": arguments.checkpoint_every}
    built = {
        phase: phases.build(
            phase, experiment, dataset, arguments.runs_dir / name, layout=layout, **options
        )
        for phase in phases.NAMES
    }
    return Job(
        experiment=experiment,
        layout=layout,
        dataset=dataset,
        name=name,
        chosen=_chosen(arguments, built),
        start=_float_start(experiment, built["float"]),
    )


def facts(job: Job, arguments: Arguments) -> dict[str, Any]:
    """Return what all processes must have in common."""
    if jax.process_count() == 1:
        return {}
    saved = {phase.name: checkpoints.latest(phase.directory) for phase in job.chosen}
    return {
        **job.experiment.settings(),
        **{name: getattr(arguments, name) for name in ("resume", "checkpoint_every", "keep")},
        **{"mesh": str(job.layout), "name": job.name, "checkpoints": saved},
        **{"contents of the data": job.dataset.digest(), **processes.code()},
    }


@contextlib.contextmanager
def opened(job: Job, arguments: Arguments) -> Iterator[Path]:
    """Open the run's directory in process 0, and see that the others see it."""
    run = arguments.runs_dir / job.name
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            if jax.process_index() == 0:
                opened = runs.open_run(
                    arguments.runs_dir, job.name, job.experiment, arguments.resume
                )
                stack.enter_context(opened)

        processes.together(enter)
        processes.together(lambda: runs.check_shared(run, job.experiment))
        yield run


def write_results(job: Job, run: Path, results: Results) -> None:
    """Write results.json, in process 0."""
    if jax.process_index() == 0:
        runs.write_results(run, job.experiment, results, str(job.layout))


def _experiment(arguments: Arguments) -> Experiment:
    """Return the config with the given options; check those that are not part of it.

    Raises:
      ExperimentError: an unknown config; a value out of range.
    """
    for option, least in (("checkpoint_every", 1), ("keep", 1), ("workers", 0)):
        value = getattr(arguments, option)
        if value is not None and value < least:
            flag = "--" + option.replace("_", "-")
            raise ExperimentError(f"{flag} must be {least} or more, got {value}.")
    overrides = {f: getattr(arguments, f) for f in configs.OVERRIDABLE if f != "quant"}
    return configs.get(arguments.config, quant=chosen_quantization(arguments), **overrides)


def chosen_quantization(arguments: Arguments) -> sq.SimQATConfig:
    """Return how the SimQAT phases quantize, but for --bn-fold.

    Raises:
      ExperimentError: an unknown config; a recipe, rules or settings that are none.
    """
    quant = configs.get(arguments.config).quant
    if arguments.recipe is not None:
        quant = quantization.read_recipe(arguments.recipe)
    if arguments.rules is not None:
        quant = quantization.with_rules(quant, arguments.rules)
    return quantization.with_settings(quant, arguments.settings)


def check_division(experiment: Experiment, layout: Layout) -> None:
    """Check that a batch can be divided over the devices.

    Raises:
      ExperimentError: it cannot; names sizes that can.
    """
    size, accumulate = experiment.batch_size, experiment.accumulate
    unit = layout.shards * accumulate
    if size % unit == 0:
        return
    below, above = size // unit * unit, (size // unit + 1) * unit
    remedy = f"--batch-size {below} or {above}" if below else f"--batch-size {above}"
    if size % accumulate == 0 and jax.process_count() == 1:
        remedy += f", or --mesh data={math.gcd(size // accumulate, layout.shards)}"
    parts = f" times the {accumulate} parts of --accumulate" if accumulate > 1 else ""
    raise ExperimentError(
        f"--batch-size {size} is not divisible by the {layout.shards} devices of the axis data"
        f"{parts}: give {remedy}."
    )


def _check_batch(experiment: Experiment, dataset: ImageData) -> None:
    """Check that an epoch holds a training step.

    Raises:
      ExperimentError: it would hold none.
    """
    images = experiment.batch_size * experiment.steps_per_dispatch
    if images > dataset.train_size:
        raise ExperimentError(
            f"--batch-size {experiment.batch_size} times --steps-per-dispatch "
            f"{experiment.steps_per_dispatch} is more than the {dataset.train_size} training "
            f"images of {dataset.name}: no training step would be left in an epoch."
        )


def _chosen(arguments: Arguments, built: dict[str, Phase]) -> list[Phase]:
    """Return the phases to train and those that the run to resume has finished, in order.

    Raises:
      ExperimentError: fine-tuning has nothing to start from, or two starts.
    """
    other = arguments.float_checkpoint is not None
    names = arguments.phases or (phases.NAMES[1:] if other else phases.NAMES)
    if other and "float" in names:
        raise ExperimentError(
            "--float-checkpoint takes the place of the float phase: leave float out of --phases."
        )
    if arguments.resume:
        names = {*names, *(name for name, phase in built.items() if phase.finished())}
    if "qat_finetune" in names and "float" not in names and not other:
        raise ExperimentError(
            "--phases qat_finetune has no float parameters to start from: add float to --phases, "
            "give another run's with --float-checkpoint, or --resume a run that has them."
        )
    return [phase for name, phase in built.items() if name in names]


def _float_start(experiment: Experiment, phase: Phase) -> FloatStart | None:
    """Read --float-checkpoint, if there is one, and check that it fits the model.

    Raises:
      ExperimentError: it cannot be read; it does not fit, with every missing and extra key.
    """
    if experiment.float_checkpoint is None:
        return None
    trained, progress = phases.read_float(Path(experiment.float_checkpoint))
    shapes = jax.eval_shape(lambda: phases.init_state(phase))
    phases.check_start(shapes, trained, f"--float-checkpoint {experiment.float_checkpoint}")
    return trained, progress
