"""Train a float baseline and its quantization-aware twins, and compare them.

    python -m experiments.train --config lenet5_mnist

Three phases: `float`, the baseline; `qat`, SimQAT from scratch; `qat_finetune`, SimQAT from the
baseline's parameters, or from those of another run with --float-checkpoint. All checkpoints,
config.json and results.json go to RUNS_DIR/NAME.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import simqat_jax as sq
from experiments import (
    checkpoints,
    configs,
    data,
    mesh,
    phases,
    preemption,
    processes,
    runs,
    training,
)
from experiments.configs import BatchNormFold, Dtype, Experiment
from experiments.data import ImageData
from experiments.errors import ExperimentError, run_or_exit
from experiments.mesh import Layout
from experiments.optimization import Schedule
from experiments.phases import Phase
from experiments.training import Report

Results = dict[str, checkpoints.Progress]
FloatStart = tuple[phases.TrainState, checkpoints.Progress]


_CONFIGS = "(default: the config's)"
_Text = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint=_CONFIGS)]
_Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=_CONFIGS)]
_Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=_CONFIGS)]
_Schedule = Annotated[Schedule | None, tyro.conf.arg(help_behavior_hint=_CONFIGS)]
_Dtype = Annotated[Dtype | None, tyro.conf.arg(help_behavior_hint=_CONFIGS)]
_BnFold = Annotated[
    BatchNormFold | None,
    tyro.conf.arg(metavar="{none,one_conv,two_conv}", help_behavior_hint=_CONFIGS),
]
_PhaseName = Literal["float", "qat", "qat_finetune"]
_Phases = Annotated[
    tuple[_PhaseName, ...] | None,
    tyro.conf.arg(
        metavar="{float,qat,qat_finetune} ...",
        help_behavior_hint="(default: all; without float with --float-checkpoint)",
    ),
]
_Path = Annotated[
    str | None,
    tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: this run's float phase)"),
]
_Steps = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")]
_Mesh = Annotated[
    str | None,
    tyro.conf.arg(metavar="STR", help_behavior_hint="(default: all devices on the axis data)"),
]
_NoText = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: none)")]
_Name = Annotated[
    str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: CONFIG-DATA-seedSEED)")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command; what is not given is the config's."""

    config: Annotated[str, tyro.conf.arg(help=f"Experiment to run: {', '.join(configs.CONFIGS)}.")]
    phases: _Phases = None
    """Phases to train; what the run holds already is kept."""
    data: _Text = None
    """Data set: mnist, cifar10 or imagenet2012 (through tensorflow-datasets), or mnist5k
    (installed already)."""
    epochs: _Int = None
    """Epochs of the phases float and qat."""
    finetune_epochs: _Int = None
    """Epochs of the phase qat_finetune."""
    batch_size: _Int = None
    """Images in a training batch."""
    learning_rate: _Float = None
    """Highest learning rate of the phases float and qat."""
    finetune_learning_rate: _Float = None
    """Highest learning rate of the phase qat_finetune."""
    step_learning_rate: _Float = None
    """Highest learning rate of learned steps."""
    schedule: _Schedule = None
    """How the learning rate falls."""
    warmup_epochs: _Int = None
    """Epochs in which the learning rate rises; none in qat_finetune."""
    weight_decay: _Float = None
    """L2 on kernels."""
    label_smoothing: _Float = None
    """Share of the target spread over all classes."""
    dtype: _Dtype = None
    """Of the computation; parameters stay float32."""
    recipe: Path | None = None
    """File of the SimQATConfig of the SimQAT phases, as SimQATConfig.to_json writes it."""
    bn_fold: _BnFold = None
    """How BatchNorm is folded in the SimQAT phases."""
    freeze_bn_epoch: _Int = None
    """Epochs of a SimQAT phase after which BatchNorm's statistics are frozen."""
    float_checkpoint: _Path = None
    """Start qat_finetune from another run's float phase: the run, its float directory, or one
    checkpoint in it."""
    seed: _Int = None
    """Seed of the first parameters, the order of the images and their augmentation."""
    steps_per_dispatch: _Int = None
    """Training steps in one compiled loop; 1 is fastest on CPU."""
    accumulate: _Int = None
    """Parts that a batch is computed in, for less memory."""
    mesh: _Mesh = None
    """Devices: data=8, or data=4,model=2."""
    distributed: bool = False
    """Train with the other processes that Slurm, Open MPI, Kubernetes or a TPU pod has started."""
    coordinator: _NoText = None
    """HOST:PORT of process 0, where nothing else names it."""
    num_processes: _Steps = None
    """Number of processes, with --coordinator."""
    process_id: _Steps = None
    """Number of this process, from 0, with --coordinator."""
    connect_timeout: int = 300
    """Seconds in which all processes must have come."""
    workers: int = 0
    """Processes that decode a streamed data set (imagenet2012); 0: this one."""
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
    if (stated := _connection(arguments)) is None:
        run_experiment(arguments, Console())
        return
    with processes.connected(stated):
        run_experiment(arguments, Console(quiet=jax.process_index() > 0))


def run_experiment(arguments: Arguments, console: Console) -> Results:
    """Train the chosen phases, write results.json and print the table.

    Raises:
      ExperimentError: what experiments.runs, experiments.training or experiments.data refuse.
    """
    job = processes.together(lambda: _prepare(arguments))
    processes.check_agreement(_facts(job, arguments))
    with _open(job, arguments) as run:
        results = _train_phases(job, console)
        path = run / "results.json"
        processes.together(lambda: _write(job, run, results))
    console.print(_table(job.experiment, results))
    console.print(f"results: {path}", soft_wrap=True)
    return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """What is to be trained."""

    experiment: Experiment
    layout: Layout
    dataset: ImageData
    name: str
    chosen: list[Phase]
    start: FloatStart | None


def _prepare(arguments: Arguments) -> _Job:
    """Return what is to be trained; each process does so by itself.

    Raises:
      ExperimentError: a wrong option, data set or start.
    """
    experiment = _experiment(arguments)
    layout = mesh.parse(arguments.mesh)
    _check_division(experiment, layout)
    dataset = data.load(experiment.data, experiment.image_size, arguments.workers)
    _check_batch(experiment, dataset)
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
    return _Job(
        experiment=experiment,
        layout=layout,
        dataset=dataset,
        name=name,
        chosen=_chosen(arguments, built),
        start=_float_start(experiment, built["float"]),
    )


def _facts(job: _Job, arguments: Arguments) -> dict[str, Any]:
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
def _open(job: _Job, arguments: Arguments) -> Iterator[Path]:
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


def _write(job: _Job, run: Path, results: Results) -> None:
    if jax.process_index() == 0:
        runs.write_results(run, job.experiment, results, str(job.layout))


def _connection(arguments: Arguments) -> processes.Connection | None:
    """Return how to find the other processes, None where there are none.

    Raises:
      ExperimentError: half of what is needed.
    """
    by_hand = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and by_hand == (None, None, None):
        return None
    coordinator, count, index = by_hand
    return processes.Connection(
        coordinator=coordinator, count=count, index=index, timeout=arguments.connect_timeout
    )


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
    quant = None if arguments.recipe is None else configs.read_recipe(arguments.recipe)
    return configs.get(arguments.config, quant=quant, **overrides)


def _check_division(experiment: Experiment, layout: Layout) -> None:
    """Check that a batch can be divided over the devices.

    Raises:
      ExperimentError: it cannot; names sizes that can.
    """
    size, unit = experiment.batch_size, layout.shards * experiment.accumulate
    if size % unit == 0:
        return
    below, above = size // unit * unit, (size // unit + 1) * unit
    sizes = f"{below} or {above}" if below else str(above)
    parts = f" times --accumulate {experiment.accumulate}" if experiment.accumulate > 1 else ""
    fewer = (
        max(n for n in range(1, layout.shards + 1) if size % (n * experiment.accumulate) == 0)
        if size % experiment.accumulate == 0
        else None
    )
    mesh_remedy = f", or --mesh data={fewer}" if fewer else ""
    raise ExperimentError(
        f"--batch-size {size} is not divisible by the {layout.shards} devices of the axis data"
        f"{parts}: give --batch-size {sizes}{mesh_remedy}."
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


def _train_phases(job: _Job, console: Console) -> Results:
    results: Results = {}
    float_state = None
    if job.start is not None:
        float_state, progress = job.start
        if progress.history:
            results["float"] = progress
    for phase in job.chosen:
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
