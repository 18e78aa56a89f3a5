"""Training on the images of `orders.py` in JAX."""

import jax
import numpy as np

from experiments.benchmarks.peers.orders import Arrays, batches, test_batches
from experiments.benchmarks.trainer import Trainer


def taught(trainer: Trainer, data: Arrays, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Train a model of JAX anew; return its logits in evaluation, and the labels."""
    state = trainer.first()
    for x, y in batches(data, batch_size):
        state, _ = trainer.compiled(state, (x, y))
    trainer.state = state
    variables = {"params": state[0], **state[1]}
    run = jax.jit(lambda variables, x: trainer.model.apply(variables, x, train=False))
    images, labels = test_batches(data, batch_size)
    return np.concatenate([np.asarray(run(variables, x)) for x in images]), labels


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of labels that logits name."""
    return float((logits.argmax(-1) == labels).mean())
