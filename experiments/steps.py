"""The compiled training step, the same function for one device and for a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import optimization
from experiments.data import Batch
from experiments.phases import STEPS, Phase, TrainState

Collections = dict[str, Any]
Found = tuple[tuple[jax.Array, Collections], Any]
"""(loss, the collections after it), gradients of parameters and learned steps."""
Differentiate = Callable[[Collections, jax.Array, jax.Array, jax.Array], Found]
"""`(collections, images, labels, key)` to what a forward and a backward pass find."""


def make_train_step(phase: Phase) -> Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]:
    """Return the compiled `(state, (images, labels)) -> (state, loss)`; it consumes `state`.

    With `steps_per_dispatch` above 1 images, labels and losses have a leading axis of steps.
    """
    optimizer = phase.optimizer()
    key = jax.random.key(phase.experiment.seed + 1)
    parts = phase.experiment.accumulate

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        images, labels = (jnp.asarray(part) for part in batch)
        # The step decides what is random: a continued run draws what the whole one would have.
        step_key = jax.random.fold_in(key, state.step)
        images = phase.dataset.transform(images, jax.random.fold_in(step_key, 1))
        differentiate = _differentiate(phase, state)
        if parts > 1:
            differentiate = _accumulate(differentiate, state, parts)
        found = differentiate(state.collections, images, labels, step_key)
        (loss, updates), (grads, steps_grads) = found
        deltas, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, deltas),
            opt_state=opt_state,
            collections={**state.collections, **updates},
        )
        return phase.layout.constrain((_with_steps(phase, new, steps_grads), loss))

    if phase.experiment.steps_per_dispatch == 1:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)


def with_steps_from(
    phase: Phase, state: TrainState, images: jax.Array, key: jax.Array
) -> TrainState:
    """Return the state with learned steps from a batch."""
    _, updates = phase.model.apply(
        state.variables, images, train=True, mutable=list(state.variables), rngs={"dropout": key}
    )
    # No training step: its count and BatchNorm's statistics stay.
    stats = {**updates["quant_stats"], "step": state.collections["quant_stats"]["step"]}
    collections = {**state.collections, "quant_stats": stats}
    return dataclasses.replace(state, collections=collections, quant_params=dict(updates[STEPS]))


def _differentiate(phase: Phase, state: TrainState) -> Differentiate:
    """Return the passes through the model at the parameters and steps of a state."""

    def run(collections: Collections, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        def loss_fn(params: Any, steps: Any) -> tuple[jax.Array, Collections]:
            changed = dataclasses.replace(
                state, params=params, quant_params=steps, collections=collections
            )
            logits, updates = phase.model.apply(
                changed.variables,
                images,
                train=True,
                mutable=list(collections),
                rngs={"dropout": key},
            )
            smoothing = phase.experiment.label_smoothing
            return optimization.cross_entropy(logits, labels, smoothing), dict(updates)

        both = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        return both(state.params, state.quant_params)

    return run


def _accumulate(differentiate: Differentiate, state: TrainState, parts: int) -> Differentiate:
    """Return passes through `parts` parts of the batch, one after the other, and their mean.

    Collections go from part to part, but for the count of training steps, which goes on by one.
    """

    def run(collections: Collections, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        def split(x: jax.Array) -> jax.Array:
            # Every `parts`-th image: on a mesh each device has as many of each part.
            return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            before, sums = carry
            index, images, labels = part
            part_key = jax.random.fold_in(key, index)
            now = _counting(before, collections)
            (loss, updates), grads = differentiate(now, images, labels, part_key)
            return ({**before, **updates}, jax.tree.map(jnp.add, sums, (loss, grads))), None

        zeros = jax.tree.map(jnp.zeros_like, (state.params, state.quant_params))
        start = collections, (jnp.zeros(()), zeros)
        each = jnp.arange(parts), split(images), split(labels)
        (updates, sums), _ = jax.lax.scan(add, start, each)
        loss, grads = jax.tree.map(lambda total: total / parts, sums)
        return (loss, updates), grads

    return run


def _counting(collections: Collections, first: Collections) -> Collections:
    """Return the collections with the count of training steps that `first` has."""
    if "quant_stats" not in collections:
        return collections
    stats = {**collections["quant_stats"], "step": first["quant_stats"]["step"]}
    return {**collections, "quant_stats": stats}


def _with_steps(phase: Phase, state: TrainState, grads: Any) -> TrainState:
    """Return the state after an update of its learned steps, if there are any."""
    if not state.quant_params:
        return state
    optimizer = phase.steps_optimizer()
    deltas, opt_state = optimizer.update(grads, state.steps_opt_state, state.quant_params)
    steps = optax.apply_updates(state.quant_params, deltas)
    return dataclasses.replace(state, quant_params=steps, steps_opt_state=opt_state)
