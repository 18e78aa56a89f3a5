"""One training loop for float and quantized models: the same code, other collections."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import simqat_jax as sq
from experiments import checkpoints, data
from experiments.checkpoints import Progress
from experiments.data import Batch
from experiments.errors import ExperimentError
from experiments.phases import Phase, TrainState

Report = Callable[[Progress], None]

SYNC_STEPS = 50
"""Steps between two looks at the losses: each look waits for the device."""


def make_train_step(phase: Phase) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Return the compiled `(state, (images, labels)) -> (state, loss)`; it consumes `state`.

    With `steps_per_dispatch` above 1 images, labels and losses have a leading axis of steps.
    """
    optimizer = phase.experiment.optimizer()
    dropout_key = jax.random.key(phase.experiment.seed + 1)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        images, labels = batch

        def loss_fn(params: Any) -> tuple[jax.Array, dict]:
            logits, updates = phase.model.apply(
                {"params": params, **state.collections},
                images,
                train=True,
                mutable=list(state.collections),
                rngs={"dropout": jax.random.fold_in(dropout_key, state.step)},
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), dict(updates)

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        deltas, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, deltas)
        collections = {**state.collections, **updates}
        return TrainState(state.step + 1, params, opt_state, collections), loss

    if phase.experiment.steps_per_dispatch == 1:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)


def make_accuracy(phase: Phase) -> Callable[[TrainState], float]:
    """Return a function from a state to the share of test images classified correctly."""

    @jax.jit
    def count(
        state: TrainState, images: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> jax.Array:
        logits: Any = phase.model.apply(
            {"params": state.params, **state.collections}, images, train=False
        )
        return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & mask)

    def accuracy(state: TrainState) -> float:
        batches = data.eval_batches(phase.dataset, phase.experiment.test_batch_size)
        correct = sum(int(count(state, *batch)) for batch in batches)
        return correct / len(phase.dataset.test_labels)

    return accuracy


def train(phase: Phase, state: TrainState, report: Report) -> tuple[TrainState, Progress]:
    """Train a phase to its end, from its newest checkpoint if it has one.

    Args:
      phase: what to train.
      state: the first state; consumed.
      report: called with the progress every few steps and after every epoch.
    Returns: the last state and the progress with the history of all epochs.
    Raises: ExperimentError: a loss that is NaN or Inf; a corrupt or other model's checkpoint.
    """
    progress = Progress(seed=phase.experiment.seed)
    newest = checkpoints.latest(phase.directory)
    if newest is not None:
        state, progress = checkpoints.restore(phase.directory, newest, state)
    report(progress)
    if progress.epoch == phase.experiment.epochs:
        return state, progress
    train_step, accuracy = make_train_step(phase), make_accuracy(phase)
    compile_seconds = _warm_up(phase, train_step, state)
    if progress.compile_seconds is None:
        progress = dataclasses.replace(progress, compile_seconds=compile_seconds)
    while progress.epoch < phase.experiment.epochs:
        state, progress = _train_epoch(phase, train_step, state, progress, report)
        progress = _close_epoch(phase, progress, accuracy(state))
        _save(phase, state, progress)
        report(progress)
    return state, progress


def _train_epoch(
    phase: Phase, train_step: Callable, state: TrainState, progress: Progress, report: Report
) -> tuple[TrainState, Progress]:
    """Train from where `progress` stands to the end of the epoch."""
    losses: list[jax.Array] = []
    start = time.perf_counter()
    since_save = 0
    steps = progress.step
    for batch in _dispatches(phase, progress.epoch, progress.step):
        state, loss = train_step(state, batch)
        losses.append(loss)
        steps += loss.size
        since_save += loss.size
        ended = steps == phase.steps_per_epoch
        due = phase.checkpoint_every is not None and since_save >= phase.checkpoint_every
        if not (ended or due or len(losses) * loss.size >= SYNC_STEPS):
            continue
        values = np.concatenate([np.atleast_1d(np.asarray(one)) for one in losses])
        _check_finite(phase, state, progress, values)
        loss_sum = progress.loss_sum
        for value in values.tolist():  # One after the other: the same sum however it is divided.
            loss_sum += value
        progress = dataclasses.replace(
            progress,
            step=steps,
            loss_sum=loss_sum,
            seconds=progress.seconds + time.perf_counter() - start,
        )
        losses.clear()
        if due and not ended:
            _save(phase, state, progress)
            since_save = 0
        report(progress)
        start = time.perf_counter()
    return state, progress


def _dispatches(phase: Phase, epoch: int, start: int) -> Iterator[Batch]:
    """Yield what one call of the compiled step takes: a batch, or a stack of batches."""
    experiment = phase.experiment
    batches = data.train_batches(
        phase.dataset, experiment.batch_size, experiment.seed, epoch, start
    )
    count = experiment.steps_per_dispatch
    if count == 1:
        yield from batches
        return
    while len(stack := [batch for _, batch in zip(range(count), batches, strict=False)]) == count:
        images, labels = zip(*stack, strict=True)
        yield np.stack(images), np.stack(labels)


def _warm_up(phase: Phase, train_step: Callable, state: TrainState) -> float:
    """Compile the step by running it on a copy of the state; return the seconds it took."""
    start = time.perf_counter()
    batch = next(_dispatches(phase, 0, 0))
    jax.block_until_ready(train_step(jax.tree.map(jnp.copy, state), batch))
    return time.perf_counter() - start


def _close_epoch(phase: Phase, progress: Progress, accuracy: float) -> Progress:
    record = {
        "epoch": progress.epoch + 1,
        "loss": progress.loss_sum / progress.step,
        "accuracy": accuracy,
        "epoch_seconds": progress.seconds,
        "seconds_per_step": progress.seconds / progress.step,
    }
    return Progress(
        seed=progress.seed,
        epoch=progress.epoch + 1,
        compile_seconds=progress.compile_seconds,
        history=(*progress.history, record),
    )


def _save(phase: Phase, state: TrainState, progress: Progress) -> None:
    checkpoints.save(phase.directory, int(state.step), state, progress, phase.keep)


def _check_finite(phase: Phase, state: TrainState, progress: Progress, losses: np.ndarray) -> None:
    """Raise ExperimentError at the first loss that is NaN or Inf."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if not bad.size:
        return
    message = (
        f"the loss became {losses[bad[0]]} in phase {phase.name}, epoch {progress.epoch + 1}, "
        f"step {progress.step + int(bad[0]) + 1} of {phase.steps_per_epoch}. "
        f"Try a lower --learning-rate than {phase.experiment.learning_rate:g}, under another "
        "--name; the last checkpoint of this run is kept."
    )
    if "quant_stats" in state.collections:
        ranges = sq.nonfinite_ranges(state.collections["quant_stats"])
        listed = "\n".join(f"  {name}: {count} batches" for name, count in ranges.items())
        message += "\nTensors that held NaN or Inf:\n" + (listed or "  none")
    raise ExperimentError(message)
