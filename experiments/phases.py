"""The three phases of an experiment: what is trained, from where, into which directory."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

import simqat_jax as sq
from experiments import checkpoints, optimization
from experiments.checkpoints import Progress
from experiments.configs import Experiment
from experiments.data import ImageData
from experiments.errors import ExperimentError
from experiments.mesh import Layout, one_device

STEPS = "quant_params"
"""The collection of learned steps."""
NAMES = ("float", "qat", "qat_finetune")
"""The float baseline; SimQAT from scratch; SimQAT from the float baseline's parameters."""


@flax.struct.dataclass
class TrainState:
    """All that a training step changes."""

    step: jax.Array
    """Training steps done, int32."""
    params: Any
    opt_state: optax.OptState
    collections: dict[str, Any]
    """Every other collection of the model: `batch_stats`, `quant_stats`."""
    quant_params: Any = flax.struct.field(default_factory=dict)
    """Learned steps; empty where there are none."""
    steps_opt_state: optax.OptState = ()

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the model."""
        steps = {STEPS: self.quant_params} if self.quant_params else {}
        return {"params": self.params, **self.collections, **steps}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A model to train and where its checkpoints go."""

    name: str
    model: nn.Module
    experiment: Experiment
    dataset: ImageData
    directory: Path
    keep: int = 2
    """Number of checkpoints kept."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, besides the one after every epoch."""
    layout: Layout = dataclasses.field(default_factory=one_device)
    """Where batches and state lie."""

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch: whole batches in whole dispatches."""
        return steps_per_epoch(self.experiment, self.dataset)

    @property
    def epochs(self) -> int:
        """Epochs to train."""
        if self.name == "qat_finetune":
            return self.experiment.finetune_epochs or self.experiment.epochs
        return self.experiment.epochs

    @property
    def learning_rate(self) -> float:
        """Highest learning rate."""
        if self.name == "qat_finetune":
            return self.experiment.finetune_learning_rate or self.experiment.learning_rate
        return self.experiment.learning_rate

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer with the phase's schedule; fine-tuning has no warm-up."""
        return self._optimizer(self.learning_rate, self.experiment.weight_decay)

    def steps_optimizer(self) -> optax.GradientTransformation:
        """Return that of learned steps, which do not decay."""
        return self._optimizer(self.experiment.step_learning_rate or self.learning_rate, 0.0)

    def _optimizer(self, peak: float, weight_decay: float) -> optax.GradientTransformation:
        experiment, steps = self.experiment, self.steps_per_epoch
        warmup = 0 if self.name == "qat_finetune" else experiment.warmup_epochs
        rate = optimization.learning_rate(
            experiment.schedule, peak, self.epochs * steps, warmup * steps
        )
        if experiment.optimizer == "adamw":
            return optimization.adamw(rate, weight_decay)
        return optimization.momentum_sgd(rate, experiment.momentum, weight_decay)

    def finished(self) -> bool:
        """Return whether the newest checkpoint is that of the last step."""
        return checkpoints.latest(self.directory) == self.epochs * self.steps_per_epoch


def steps_per_epoch(experiment: Experiment, dataset: ImageData) -> int:
    """Return the training steps in an epoch: whole batches in whole dispatches."""
    batches = dataset.train_size // experiment.batch_size
    return batches // experiment.steps_per_dispatch * experiment.steps_per_dispatch


def build(
    name: str, experiment: Experiment, dataset: ImageData, run: Path, **options: Any
) -> Phase:
    """Return a phase of a run.

    Args:
      name: one of NAMES.
      experiment: its config.
      dataset: what it trains on.
      run: the run's directory.
      options: further fields of Phase.
    """
    model = experiment.build_model(dataset.num_classes)
    if name != "float":
        quant = experiment.quant
        if experiment.freeze_bn_epoch is not None:
            steps = experiment.freeze_bn_epoch * steps_per_epoch(experiment, dataset)
            quant = dataclasses.replace(quant, freeze_bn=steps)
        model = sq.SimQAT(quant).apply(model)
    return Phase(
        name=name,
        model=model,
        experiment=experiment,
        dataset=dataset,
        directory=run / name,
        **options,
    )


def init_state(phase: Phase) -> TrainState:
    """Return the first state; the same parameters for every phase of one seed."""
    key = jax.random.key(phase.experiment.seed)
    sample = model_input(phase)
    # Not jitted: each operation is compiled once for all phases. Copied: a training step consumes
    # its state, in which no two leaves may share memory.
    variables = jax.tree.map(jnp.copy, dict(phase.model.init(key, sample, train=False)))
    params, steps = variables.pop("params"), variables.pop(STEPS, {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=phase.optimizer().init(params),
        collections=variables,
        quant_params=steps,
        steps_opt_state=phase.steps_optimizer().init(steps) if steps else (),
    )


def model_input(phase: Phase) -> jax.Array:
    """Return one image as the model takes it in evaluation, with a batch axis."""
    return phase.dataset.transform(jnp.asarray(phase.dataset.sample()), None)


def start_from(state: TrainState, trained: TrainState) -> TrainState:
    """Return `state` with copies of the trained parameters and of every collection of both.

    Raises:
      ExperimentError: the trees differ; lists every missing and extra key.
    """
    check_start(state, trained)
    shared = [name for name in trained.collections if name in state.collections]
    copied = jax.tree.map(jnp.copy, {name: trained.collections[name] for name in shared})
    return dataclasses.replace(
        state,
        params=jax.tree.map(jnp.copy, trained.params),
        collections={**state.collections, **copied},
    )


def check_start(
    state: TrainState, trained: TrainState, source: str = "the float checkpoint"
) -> None:
    """Check that `state` can start from `trained`.

    Args:
      state: arrays or their shapes.
      trained: arrays or their shapes.
      source: names what is loaded, for the message.

    Raises:
      ExperimentError: it cannot; lists every missing and extra key and every other shape.
    """

    def shapes(of: TrainState) -> checkpoints.Shapes:
        floats = {name: tree for name, tree in of.collections.items() if name != "quant_stats"}
        return checkpoints.leaf_shapes({"params": of.params, **floats})

    checkpoints.check_tree(shapes(state), shapes(trained), source)


def read_float(path: Path) -> tuple[TrainState, Progress]:
    """Read the float phase of a run, whatever its model.

    Args:
      path: a run, its phase `float`, or one checkpoint of that: runs/NAME, runs/NAME/float,
        runs/NAME/float/3905.

    Raises:
      ExperimentError: no such checkpoint; a corrupt one.
    """
    if path.name.isdigit() and path.parent.name == "float":
        directory, step = path.parent, int(path.name)
    else:
        directory = path if path.name == "float" else path / "float"
        step = checkpoints.latest(directory)
    if step is None or not (directory / str(step)).is_dir():
        raise ExperimentError(
            f"no float checkpoint at {path}: give a run, such as runs/NAME, its float phase, or "
            "one checkpoint, such as runs/NAME/float/3905."
        )
    tree, progress = checkpoints.read(directory, step)
    return TrainState(**tree), progress
