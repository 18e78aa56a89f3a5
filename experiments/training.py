"""One training loop for float and quantized models: the same code, other collections."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import simqat_jax as sq
from experiments import checkpoints, processes
from experiments.checkpoints import Progress
from experiments.data import Batch, MaskedBatch
from experiments.errors import CommonError, Preempted
from experiments.phases import STEPS, Phase, TrainState
from experiments.preemption import Notice
from experiments.steps import make_train_step, with_steps_from

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


def set_steps(phase: Phase, state: TrainState) -> TrainState:
    """Return the state with learned steps, if there are any, from the first training batch.

    Of a trained network `calibrate` finds them. What random parameters make of data it has no
    statistics for: then they are those of a training call.
    """
    if not state.quant_params:
        return state
    images = _next_images(phase, 0, 0)
    if phase.name == "qat_finetune":
        return _calibrated(phase, state, images)
    return with_steps_from(phase, state, images, jax.random.key(0))


def start_delayed_steps(phase: Phase, state: TrainState, epoch: int, step: int) -> TrainState:
    """Return the state with those learned steps whose `quant_delay` ends in the next dispatch.

    `calibrate` finds them, from the batch that comes then; what has started before stays.

    Args:
      phase: what is trained.
      state: laid out by the phase.
      epoch: number of the epoch, from 0.
      step: training steps done in it.
    """
    if not state.quant_params:
        return state
    done = epoch * phase.steps_per_epoch + step
    now = range(done, done + phase.experiment.steps_per_dispatch)
    delays = _learned_delays(phase.experiment.quant).intersection(now)
    if not delays:
        return state
    state = phase.layout.local(state)
    stats = {**state.collections["quant_stats"], "step": jnp.int32(max(delays))}
    over = dataclasses.replace(state, collections={**state.collections, "quant_stats": stats})
    found = _calibrated(phase, over, _next_images(phase, epoch, step))
    starting = [name for name, steps in state.quant_params.items() if not np.all(steps)]

    def renewed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return {**before, **{name: after[name] for name in starting}}

    stats = renewed(state.collections["quant_stats"], found.collections["quant_stats"])
    started = dataclasses.replace(
        state,
        collections={**state.collections, "quant_stats": stats},
        quant_params=renewed(state.quant_params, found.quant_params),
    )
    return phase.layout.place(started)


def _learned_delays(config: sq.SimQATConfig) -> set[int]:
    """Return after how many training steps learned steps start, where they are delayed."""
    owners = (config, *config.rules)
    specs = (spec for owner in owners for spec in (owner.weight, owner.activation))
    return {spec.quant_delay for spec in specs if spec and spec.observer == "learned"} - {0}


def _calibrated(phase: Phase, state: TrainState, images: jax.Array) -> TrainState:
    assert isinstance(phase.model, sq.QuantizedModule)
    variables = sq.calibrate(phase.model, state.variables, [images], train=False, progress=False)
    return dataclasses.replace(
        state,
        collections={name: variables[name] for name in state.collections},
        quant_params=variables[STEPS],
    )


def _next_images(phase: Phase, epoch: int, step: int) -> jax.Array:
    """Return the whole of a training batch, as evaluation takes it."""
    experiment = phase.experiment
    batches = phase.dataset.train_batches(experiment.batch_size, experiment.seed, epoch, step)
    images, _ = next(iter(batches))
    return phase.dataset.transform(jnp.asarray(images), None)


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
        return layout.constrain((jnp.sum(top[0] & mask), jnp.sum(top[1] & mask)))

    layout = phase.layout
    size = math.ceil(phase.experiment.test_batch_size / layout.shards) * layout.shards

    def evaluate(state: TrainState) -> Metrics:
        correct, correct5 = 0, 0
        for batch in phase.dataset.test_batches(size, layout.rows(size)):
            first, five = count(state, layout.put(batch, size))
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


def train(
    phase: Phase, state: TrainState, report: Report, notice: Notice | None = None
) -> tuple[TrainState, Progress]:
    """Train a phase to its end, from its newest checkpoint if it has one.

    Args:
      phase: what to train.
      state: the first state, whole on one device of each process; consumed.
      report: called with progress and state every few steps and after every epoch.
      notice: asked after every step whether to save and end.

    Returns:
      the last state, laid out as the first one, and the progress with the history of all epochs.

    Raises:
      ExperimentError: a loss that is NaN or Inf; a corrupt or other model's checkpoint.
      Preempted: a notice came, and a checkpoint has been written.
    """
    notice = notice or Notice()
    progress = Progress(seed=phase.experiment.seed)
    newest = checkpoints.latest(phase.directory)
    if newest is not None:
        read = processes.together(lambda: checkpoints.restore(phase.directory, newest, state))
        state, progress = read
    else:
        state = set_steps(phase, state)
    report(progress, state)
    if progress.epoch == phase.epochs:
        return state, progress
    state = phase.layout.place(state)
    train_step, evaluate = make_train_step(phase), make_evaluation(phase)
    compile_seconds = _warm_up(phase, train_step, state)
    if progress.compile_seconds is None:
        progress = dataclasses.replace(progress, compile_seconds=compile_seconds)
    while progress.epoch < phase.epochs:
        state, progress = _train_epoch(phase, train_step, state, progress, report, notice)
        progress = _close_epoch(phase, progress, evaluate(state))
        _save(phase, state, progress)
        report(progress, state)
        _end_if(notice, phase, state)
    return phase.layout.local(state), progress


def _train_epoch(
    phase: Phase,
    train_step: Callable,
    state: TrainState,
    progress: Progress,
    report: Report,
    notice: Notice,
) -> tuple[TrainState, Progress]:
    """Train from where `progress` stands to the end of the epoch."""
    losses: list[jax.Array] = []
    start = time.perf_counter()
    since_save = 0
    steps = progress.step
    for batch in _dispatches(phase, progress.epoch, progress.step):
        state = start_delayed_steps(phase, state, progress.epoch, steps)
        state, loss = train_step(state, batch)
        losses.append(loss)
        steps += loss.size
        since_save += loss.size
        ended = steps == phase.steps_per_epoch
        due = notice.after_step() or since_save >= (phase.checkpoint_every or math.inf)
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
            _end_if(notice, phase, state)
        report(progress, state)
        start = time.perf_counter()
    return state, progress


def _end_if(notice: Notice, phase: Phase, state: TrainState) -> None:
    """End the run where a notice came; the state has been saved.

    Raises:
      Preempted: one came.
    """
    if notice.reached:
        saved = phase.directory / str(int(state.step))
        raise Preempted(f"ended by SIGTERM, with checkpoint {saved}.")


def _dispatches(phase: Phase, epoch: int, start: int) -> Iterator[Batch]:
    """Yield what one call of the compiled step takes: a batch, or a stack of batches."""
    experiment, layout = phase.experiment, phase.layout
    size, count = experiment.batch_size, experiment.steps_per_dispatch
    read = phase.dataset.train_batches(size, experiment.seed, epoch, start, layout.rows(size))
    if count == 1:
        yield from (layout.put(batch, size) for batch in read)
        return
    while len(stack := [batch for _, batch in zip(range(count), read, strict=False)]) == count:
        images, labels = zip(*stack, strict=True)
        yield layout.put((np.stack(images), np.stack(labels)), size, axis=1)


def _warm_up(phase: Phase, train_step: Callable, state: TrainState) -> float:
    """Compile the step by running it on a copy of the state; return the seconds it took."""
    experiment = phase.experiment
    stack = () if experiment.steps_per_dispatch == 1 else (experiment.steps_per_dispatch,)
    size = experiment.batch_size
    labels = np.zeros((*stack, size), np.int32)[..., phase.layout.rows(size)]
    image = phase.dataset.sample()[0]
    images = np.broadcast_to(image, (*labels.shape, *image.shape)).copy()
    batch = phase.layout.put((images, labels), size, axis=len(stack))
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
      CommonError: one is; names the first, and the tensors that held NaN or Inf.
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
    raise CommonError(message)
