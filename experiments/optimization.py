"""Learning rate schedules, the optimizer and the loss."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

Schedule = Literal["constant", "cosine", "polynomial"]
Optimizer = Literal["sgd", "adamw"]


def learning_rate(
    schedule: Schedule, peak: float, total_steps: int, warmup_steps: int = 0
) -> optax.Schedule:
    """Return the learning rate as a function of the steps done.

    In the warm-up `peak * (step + 1) / warmup_steps`; then, with `t` from 0 to 1 over the steps
    that remain, `peak` (constant), `peak * (1 + cos(pi * t)) / 2` (cosine) or `peak * (1 - t)**2`
    (polynomial).

    Args:
      schedule: how it falls.
      peak: highest learning rate.
      total_steps: of the phase, warm-up included.
      warmup_steps: below `total_steps`.

    Examples:
      >>> rate = learning_rate("cosine", 0.5, total_steps=12, warmup_steps=2)
      >>> [round(float(rate(step)), 6) for step in (0, 1, 2, 7, 12)]
      [0.25, 0.5, 0.5, 0.25, 0.0]
    """
    if schedule == "constant" and not warmup_steps:
        return optax.constant_schedule(peak)

    def rate(step: Any) -> jax.Array:
        done = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        decay = {
            "constant": 1.0,
            "cosine": (1.0 + jnp.cos(jnp.pi * done)) / 2.0,
            "polynomial": (1.0 - done) ** 2,
        }[schedule]
        return peak * jnp.where(step < warmup_steps, (step + 1) / max(warmup_steps, 1), decay)

    return rate


def momentum_sgd(
    rate: optax.Schedule, momentum: float, weight_decay: float
) -> optax.GradientTransformation:
    """Return SGD with momentum and, where not 0, L2 weight decay.

    `weight_decay * kernel` is added to the gradient of every `kernel` before the momentum, as in
    the source system; BatchNorm's parameters and biases do not decay.
    """
    sgd = optax.sgd(rate, momentum=momentum)
    if not weight_decay:
        return sgd
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=_is_kernel), sgd)


def adamw(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Return AdamW, whose gradients have a global norm of at most 1; kernels alone decay.

    Source:
      Loshchilov and Hutter, arXiv:1711.05101.
    """
    decaying = optax.adamw(rate, weight_decay=weight_decay, mask=_is_kernel)
    return optax.chain(optax.clip_by_global_norm(1.0), decaying)


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """Return the mean cross entropy, scalar.

    Args:
      logits: shape (N, classes).
      labels: integers, shape (N,).
      label_smoothing: share of the target that is spread over all classes.
    """
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def _is_kernel(params: optax.Params) -> optax.Params:
    def named_kernel(path: tuple, _: object) -> bool:
        return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"

    return jax.tree_util.tree_map_with_path(named_kernel, params)
