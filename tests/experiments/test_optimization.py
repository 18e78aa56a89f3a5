"""Schedules, weight decay and loss against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import optimization


@pytest.mark.parametrize("schedule", ["constant", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedule_at_every_step(schedule: optimization.Schedule, warmup: int) -> None:
    rate = optimization.learning_rate(schedule, 0.4, total_steps=25, warmup_steps=warmup)
    for step in range(26):
        done = (step - warmup) / (25 - warmup)
        decay = {"constant": 1, "cosine": (1 + math.cos(math.pi * done)) / 2}
        decay["polynomial"] = (1 - done) ** 2
        expected = 0.4 * (step + 1) / 5 if step < warmup else 0.4 * decay[schedule]
        assert float(rate(jnp.int32(step))) == pytest.approx(expected, abs=1e-7)
    assert float(rate(warmup)) == pytest.approx(0.4)
    assert float(rate(25)) == pytest.approx(0.4 if schedule == "constant" else 0, abs=1e-7)
    assert float(rate(30)) == pytest.approx(float(rate(25)))


def test_momentum_and_decay_of_kernels_alone() -> None:
    params = {
        "Conv_0": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full((2,), 3.0)},
        "BatchNorm_0": {"scale": jnp.full((2,), 3.0), "bias": jnp.full((2,), 3.0)},
    }
    grads = optax.tree.full_like(params, 0.5)
    optimizer = optimization.momentum_sgd(lambda step: 0.1 / (step + 1), 0.9, 0.01)
    state = optimizer.init(params)
    expected = {"kernel": 3.0, "rest": 3.0}
    velocity = {"kernel": 0.0, "rest": 0.0}
    for step in range(3):
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for kind, decay in (("kernel", 0.01), ("rest", 0.0)):
            velocity[kind] = 0.9 * velocity[kind] + 0.5 + decay * expected[kind]
            expected[kind] -= 0.1 / (step + 1) * velocity[kind]
    assert expected["kernel"] != expected["rest"]
    np.testing.assert_allclose(params["Conv_0"]["kernel"], expected["kernel"], rtol=1e-6)
    for leaf in (params["Conv_0"]["bias"], *jax.tree.leaves(params["BatchNorm_0"])):
        np.testing.assert_allclose(leaf, expected["rest"], rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4
    expected = -(targets * log_probabilities).sum(-1).mean()
    got = optimization.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    assert float(got) == pytest.approx(expected, rel=1e-5)
