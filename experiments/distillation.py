"""Fine-tune a quantized network on few images without labels: its float network is the teacher."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import simqat_jax as sq


def distil(
    qmodel: sq.QuantizedModule,
    variables: dict[str, Any],
    teacher: Callable[[jax.Array], jax.Array],
    x: np.ndarray,
    *,
    steps: int,
    batch: int = 16,
    rate: float = 3e-5,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Return `variables` with parameters trained towards the classes that the teacher sees.

    The network runs as in evaluation: ranges and BatchNorm's statistics stay those of calibration,
    which few images would spoil. Images are mirrored at random; the loss is the divergence of the
    distributions over classes (Hinton et al., arXiv:1503.02531, at temperature 1), and Adam's rate
    falls to 0 along half a cosine.

    Args:
      qmodel: the quantized network, from one image argument to logits.
      variables: calibrated ones.
      teacher: from images to the float network's logits.
      x: images, shape (N, height, width, channels).
      steps: of the optimizer.
      batch: images a step.
      rate: Adam's first learning rate.
      seed: of the order of images and of what is mirrored.
      progress: called after each step with its number and loss.
    """
    fixed = {name: tree for name, tree in variables.items() if name != "params"}
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params: Any, state: Any, images: jax.Array) -> tuple[Any, Any, jax.Array]:
        target = jax.nn.log_softmax(teacher(images))

        def loss(params: Any) -> jax.Array:
            logits: Any = qmodel.apply({"params": params, **fixed}, images)
            return optax.losses.kl_divergence_with_log_targets(
                jax.nn.log_softmax(logits), target
            ).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    params, random = variables["params"], np.random.default_rng(seed)
    state = optimizer.init(params)
    for i in range(steps):
        images = x[random.choice(len(x), batch, replace=False)]
        mirrored = random.random(batch) < 0.5
        images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
        params, state, value = step(params, state, images)
        if progress is not None:
            progress(i + 1, float(value))
    return {**variables, "params": params}
