"""State that a model keeps of its activations follows them as in float, to the last bit it has."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import initialized

X = 2.0 + jax.random.normal(jax.random.key(0), (8, 6))


class Centered(nn.Module):
    """Subtracts a running mean that it updates first, as `follow(old, batch)` says."""

    follow: staticmethod

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (1, 6))
        if train and not self.is_initializing():
            mean.value = self.follow(mean.value, x)
        return nn.Dense(3)(x - mean.value)


def slowly(old, x):
    return 0.99 * old + 0.01 * x.mean(0, keepdims=True)


def by_difference(old, x):
    return old + 0.01 * (x.mean(0, keepdims=True) - old)


def highest(old, x):
    return jnp.maximum(0.99 * old, x.max(0, keepdims=True))


def of_squares(old, x):
    return 0.99 * old + 0.01 * jnp.sqrt((x * x).mean(0, keepdims=True))


@pytest.mark.parametrize("follow", [slowly, by_difference, highest, of_squares])
def test_a_running_statistic_that_activations_read_is_not_rounded(follow):
    qmodel, variables = initialized(Centered(follow), X)
    mutable = ["batch_stats", "quant_stats"]

    @jax.jit
    def step(v):
        return {**v, **qmodel.apply(v, X, train=True, mutable=mutable)[1]}

    floats = variables["batch_stats"]["mean"]
    for _ in range(60):
        variables, floats = step(variables), follow(floats, X)
    np.testing.assert_allclose(variables["batch_stats"]["mean"], floats, atol=0.03)


def test_what_only_the_state_needs_changes_no_plan():
    class Watched(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            y = nn.relu(nn.Dense(6)(x))
            seen = self.variable("watch", "mean", jnp.zeros, 6)
            if train:
                seen.value = y.mean(0)
            return nn.Dense(3)(y)

    qmodel, variables = initialized(Watched(), X)
    plans = [qmodel.plan(variables, X, train=train) for train in (False, True)]
    assert list(plans[0].quantizers) == list(plans[1].quantizers)
