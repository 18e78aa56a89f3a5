"""Train a float baseline and its quantization-aware twins, and compare them.

    python -m experiments.train --config lenet5_mnist

Three phases: `float`, the baseline; `qat`, SimQAT from scratch; `qat_finetune`, SimQAT from the
baseline's parameters, or from those of another run with --float-checkpoint. All checkpoints,
config.json and results.json go to RUNS_DIR/NAME.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console

import simqat_jax as sq
from experiments import (
    checkpoints,
    configs,
    data,
    phases,
    quantization,
    reporting,
    runs,
    summaries,
    training,
)
from experiments.configs import BatchNormFold, Dtype, Experiment
from experiments.data import ImageData
from experiments.errors import ExperimentError, run_or_exit
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
_Rules = Annotated[str | None, tyro.conf.arg(metavar="JSON", help_behavior_hint=_CONFIGS)]
_Settings = Annotated[
    tyro.conf.UseAppendAction[tuple[str, ...]],
    tyro.conf.arg(
        name="set",
        metavar="FIELD=VALUE",
        help="A field of the SimQATConfig, again and again: weight_bits=4, "
        "activation.observer=mse, exclude='[\"head\"]'.",
    ),
]
_Steps = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: none)")]
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
    """File of the SimQATConfig of the SimQAT phases, as SimQATConfig.to_json writes it, or
    config.json or results.json of a run."""
    rules: _Rules = None
    """Rules in the place of the recipe's, as JSON or a file of it:
    '[{"path": "head", "weight": {"num_bits": 8}}]'."""
    settings: _Settings = ()
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
    tensorboard: bool = False
    """Write losses, accuracies and ranges for TensorBoard (extra tensorboard)."""


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
    """Train the chosen phases, write results.json and print the table.

    Raises:
      ExperimentError: what experiments.runs, experiments.training or experiments.data refuse.
    """
    experiment = _experiment(arguments)
    dataset = data.load(experiment.data, experiment.image_size, arguments.workers)
    _check_batch(experiment, dataset)
    name = arguments.name
    if name is None:
        name = f"{experiment.config}-{experiment.data}-seed{experiment.seed}"
    if arguments.tensorboard:
        summaries.writer_package()  # before anything is trained
    options = {"keep": arguments.keep, "checkpoint_every": arguments.checkpoint_every}
    built = {
        phase: phases.build(phase, experiment, dataset, arguments.runs_dir / name, **options)
        for phase in phases.NAMES
    }
    chosen = _chosen(arguments, built)
    start = _float_start(experiment, built["float"])
    with runs.open_run(arguments.runs_dir, name, experiment, arguments.resume) as run:
        results = _train_phases(chosen, start, run, arguments.tensorboard, console)
        path = runs.write_results(run, experiment, results)
    console.print(reporting.final_table(experiment, results))
    console.print(f"results: {path}", soft_wrap=True)
    return results


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


def _train_phases(
    chosen: list[Phase], start: FloatStart | None, run: Path, tensorboard: bool, console: Console
) -> Results:
    results: Results = {}
    float_state = None
    if start is not None:
        float_state, progress = start
        if progress.history:
            results["float"] = progress
    for phase in chosen:
        state = phases.init_state(phase)
        if phase.name != "float" and not results.keys() & {"qat", "qat_finetune"}:
            console.print(_plan(phase, state, run), highlight=False, markup=False, soft_wrap=True)
        if phase.name == "qat_finetune":
            assert float_state is not None, "checked before"
            state = phases.start_from(state, float_state)
        with contextlib.ExitStack() as stack:
            reports = [stack.enter_context(reporting.shown(phase, console))]
            if tensorboard:
                reports.append(stack.enter_context(summaries.written(phase, run)))
            state, results[phase.name] = training.train(phase, state, _told(reports))
        if phase.name == "float":
            float_state = state
    return results


def _plan(phase: Phase, state: phases.TrainState, run: Path) -> str:
    """Write the plan into the run; return it in short."""
    assert isinstance(phase.model, sq.QuantizedModule)
    plan = phase.model.plan(state.variables, phases.model_input(phase), train=False)
    path = runs.write_plan(run, f"{plan}\n\n{plan.details()}\n")
    return reporting.plan_summary(plan, path)


def _told(reports: Sequence[Report]) -> Report:
    """Return one report that makes several."""

    def report(progress: checkpoints.Progress, state: phases.TrainState) -> None:
        for one in reports:
            one(progress, state)

    return report


if __name__ == "__main__":
    run_or_exit(main, "The same command with --resume continues the run.")
