"""One training loop for float and quantized models: the same code, other collections."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import simqat_jax as sq
from experiments import checkpoints, optimization
from experiments.checkpoints import Progress
from experiments.data import Batch, MaskedBatch
from experiments.errors import ExperimentError
from experiments.phases import STEPS, Phase, TrainState

Report = Callable[[Progress, TrainState], None]
"""What is told while a phase is trained; the state is consumed by the step that follows."""

SYNC_STEPS = 50
"""Steps between two looks at the losses: each look waits for the device."""


class Metrics(NamedTuple):
    """Shares of the test images, 0 to 1."""

    accuracy: float
    """Top-1: the label has the highest logit."""
    top5_accuracy: float
    """The label is among the five highest; 1 where there are no more than five classes."""


def make_train_step(phase: Phase) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Return the compiled `(state, (images, labels)) -> (state, loss)`; it consumes `state`.

    With `steps_per_dispatch` above 1 images, labels and losses have a leading axis of steps.
    """
    optimizer = phase.optimizer()
    key = jax.random.key(phase.experiment.seed + 1)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        images, labels = (jnp.asarray(part) for part in batch)
        # The step decides what is random: a continued run draws what the whole one would have.
        step_key = jax.random.fold_in(key, state.step)
        images = phase.dataset.transform(images, jax.random.fold_in(step_key, 1))

        def loss_fn(params: Any, steps: Any) -> tuple[jax.Array, dict]:
            logits, updates = phase.model.apply(
                dataclasses.replace(state, params=params, quant_params=steps).variables,
                images,
                train=True,
                mutable=list(state.collections),
                rngs={"dropout": step_key},
            )
            smoothing = phase.experiment.label_smoothing
            return optimization.cross_entropy(logits, labels, smoothing), dict(updates)

        differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, updates), (grads, steps_grads) = differentiate(state.params, state.quant_params)
        deltas, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, deltas),
            opt_state=opt_state,
            collections={**state.collections, **updates},
        )
        return _with_steps(phase, new, steps_grads), loss

    if phase.experiment.steps_per_dispatch == 1:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)


def _with_steps(phase: Phase, state: TrainState, grads: Any) -> TrainState:
    """Return the state after an update of its learned steps, if there are any."""
    if not state.quant_params:
        return state
    optimizer = phase.steps_optimizer()
    deltas, opt_state = optimizer.update(grads, state.steps_opt_state, state.quant_params)
    steps = optax.apply_updates(state.quant_params, deltas)
    return dataclasses.replace(state, quant_params=steps, steps_opt_state=opt_state)


def set_steps(phase: Phase, state: TrainState) -> TrainState:
    """Return the state with learned steps, if there are any, from the first training batch."""
    if not state.quant_params:
        return state
    experiment = phase.experiment
    images, _ = next(iter(phase.dataset.train_batches(experiment.batch_size, experiment.seed, 0)))
    _, updates = phase.model.apply(
        state.variables,
        phase.dataset.transform(jnp.asarray(images), None),
        train=True,
        mutable=list(state.variables),
        rngs={"dropout": jax.random.key(0)},
    )
    # No training step: its count and BatchNorm's statistics stay.
    stats = {**updates["quant_stats"], "step": state.collections["quant_stats"]["step"]}
    collections = {**state.collections, "quant_stats": stats}
    return dataclasses.replace(state, collections=collections, quant_params=updates[STEPS])


def make_evaluation(phase: Phase) -> Callable[[TrainState], Metrics]:
    """Return a function from a state to its metrics on the test images."""

    @jax.jit
    def count(state: TrainState, batch: MaskedBatch) -> tuple[jax.Array, jax.Array]:
        images, labels, mask = batch
        logits: Any = phase.model.apply(
            state.variables,
            phase.dataset.transform(jnp.asarray(images), None),
            train=False,
        )
        top = in_top(logits, labels, 1), in_top(logits, labels, 5)
        return jnp.sum(top[0] & mask), jnp.sum(top[1] & mask)

    def evaluate(state: TrainState) -> Metrics:
        correct, correct5 = 0, 0
        for batch in phase.dataset.test_batches(phase.experiment.test_batch_size):
            first, five = count(state, batch)
            correct, correct5 = correct + int(first), correct5 + int(five)
        total = phase.dataset.test_size
        return Metrics(accuracy=correct / total, top5_accuracy=correct5 / total)

    return evaluate


def in_top(logits: jax.Array, labels: jax.Array | np.ndarray, k: int) -> jax.Array:
    """Return whether each label is among its row's `k` highest logits; of equal ones the first.

    Args:
      logits: shape (N, classes).
      labels: integers, shape (N,).
      k: how many logits count.

    Returns:
      bool, shape (N,).
    """
    _, indices = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(indices == jnp.asarray(labels)[:, None], axis=-1)


def train(phase: Phase, state: TrainState, report: Report) -> tuple[TrainState, Progress]:
    """Train a phase to its end, from its newest checkpoint if it has one.

    Args:
      phase: what to train.
      state: the first state; consumed.
      report: called with progress and state every few steps and after every epoch.

    Returns:
      the last state and the progress with the history of all epochs.

    Raises:
      ExperimentError: a loss that is NaN or Inf; a corrupt or other model's checkpoint.
    """
    progress = Progress(seed=phase.experiment.seed)
    newest = checkpoints.latest(phase.directory)
    if newest is not None:
        state, progress = checkpoints.restore(phase.directory, newest, state)
    else:
        state = set_steps(phase, state)
    report(progress, state)
    if progress.epoch == phase.epochs:
        return state, progress
    train_step, evaluate = make_train_step(phase), make_evaluation(phase)
    compile_seconds = _warm_up(phase, train_step, state)
    if progress.compile_seconds is None:
        progress = dataclasses.replace(progress, compile_seconds=compile_seconds)
    while progress.epoch < phase.epochs:
        state, progress = _train_epoch(phase, train_step, state, progress, report)
        progress = _close_epoch(phase, progress, evaluate(state))
        _save(phase, state, progress)
        report(progress, state)
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
        report(progress, state)
        start = time.perf_counter()
    return state, progress


def _dispatches(phase: Phase, epoch: int, start: int) -> Iterator[Batch]:
    """Yield what one call of the compiled step takes: a batch, or a stack of batches."""
    experiment = phase.experiment
    batches = phase.dataset.train_batches(experiment.batch_size, experiment.seed, epoch, start)
    count = experiment.steps_per_dispatch
    if count == 1:
        yield from batches
        return
    while len(stack := [batch for _, batch in zip(range(count), batches, strict=False)]) == count:
        images, labels = zip(*stack, strict=True)
        yield np.stack(images), np.stack(labels)


def _warm_up(phase: Phase, train_step: Callable, state: TrainState) -> float:
    """Compile the step by running it on a copy of the state; return the seconds it took."""
    experiment = phase.experiment
    stack = () if experiment.steps_per_dispatch == 1 else (experiment.steps_per_dispatch,)
    labels = np.zeros((*stack, experiment.batch_size), np.int32)
    image = phase.dataset.sample()[0]
    batch = np.broadcast_to(image, (*labels.shape, *image.shape)).copy(), labels
    start = time.perf_counter()
    jax.block_until_ready(train_step(jax.tree.map(jnp.copy, state), batch))
    return time.perf_counter() - start


def _close_epoch(phase: Phase, progress: Progress, metrics: Metrics) -> Progress:
    record = {
        "epoch": progress.epoch + 1,
        "loss": progress.loss_sum / progress.step,
        **metrics._asdict(),
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
    """Refuse a loss that is NaN or Inf.

    Raises:
      ExperimentError: one is; names the first, and the tensors that held NaN or Inf.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    if not bad.size:
        return
    finetuning = phase.name == "qat_finetune"
    option = "--finetune-learning-rate" if finetuning else "--learning-rate"
    message = (
        f"the loss became {losses[bad[0]]} in phase {phase.name}, epoch {progress.epoch + 1}, "
        f"step {progress.step + int(bad[0]) + 1} of {phase.steps_per_epoch}. "
        f"Try a lower {option} than {phase.learning_rate:g}, under another "
        "--name; the last checkpoint of this run is kept."
    )
    if "quant_stats" in state.collections:
        ranges = sq.nonfinite_ranges(state.collections["quant_stats"])
        listed = "\n".join(f"  {name}: {count} batches" for name, count in ranges.items())
        message += "\nTensors that held NaN or Inf:\n" + (listed or "  none")
    raise ExperimentError(message)
