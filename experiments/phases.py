"""The three phases of an experiment: what is trained, from where, into which directory."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

import simqat_jax as sq
from experiments import checkpoints
from experiments.configs import Experiment
from experiments.data import Dataset

NAMES = ("float", "qat", "qat_finetune")
"""The float baseline; SimQAT from scratch; SimQAT from the float baseline's parameters."""


@flax.struct.dataclass
class TrainState:
    """All that a training step changes."""

    step: jax.Array
    """Training steps done, int32."""
    params: Any
    opt_state: Any
    collections: dict[str, Any]
    """Every other collection of the model: `batch_stats`, `quant_stats`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A model to train and where its checkpoints go."""

    name: str
    model: nn.Module
    experiment: Experiment
    dataset: Dataset
    directory: Path
    keep: int = 2
    """Number of checkpoints kept."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, besides the one after every epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Training steps in an epoch: whole batches in whole dispatches."""
        per_dispatch = self.experiment.steps_per_dispatch
        batches = len(self.dataset.train_labels) // self.experiment.batch_size
        return batches // per_dispatch * per_dispatch


def build(name: str, experiment: Experiment, dataset: Dataset, run: Path, **options: Any) -> Phase:
    """Return the phase `name` of a run; `options` are further fields of Phase."""
    model = experiment.model(num_classes=dataset.num_classes)
    if name != "float":
        model = sq.SimQAT(experiment.quant).apply(model)
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
    sample = jnp.asarray(phase.dataset.train_images[:1])
    # Not jitted: each operation is compiled once for all phases. Copied: a training step consumes
    # its state, in which no two leaves may share memory.
    variables = jax.tree.map(jnp.copy, dict(phase.model.init(key, sample, train=False)))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=phase.experiment.optimizer().init(params),
        collections=variables,
    )


def start_from(state: TrainState, trained: TrainState) -> TrainState:
    """Return `state` with copies of the trained parameters and of every collection of both.

    Raises: ExperimentError: the trees differ; lists every missing and extra key.
    """
    shared = [name for name in trained.collections if name in state.collections]
    expected = {"params": state.params} | {name: state.collections[name] for name in shared}
    found = {"params": trained.params} | {name: trained.collections[name] for name in shared}
    leaves = checkpoints.leaf_shapes
    checkpoints.check_tree(leaves(expected), leaves(found), "the float checkpoint")
    loaded = jax.tree.map(jnp.copy, found)
    params = loaded.pop("params")
    collections = {**state.collections, **loaded}
    return dataclasses.replace(state, params=params, collections=collections)
