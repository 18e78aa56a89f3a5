"""Masks of -1e9: no tensor that holds them lies on a grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_files_agree, by_half, observed
from zoo import Model

IDS = jnp.array([[3, 1, 4, 1, 0, 0], [2, 7, 1, 8, 2, 8], [1, 0, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0]])


def far(x, m):
    return jnp.where(m[..., None], x, -1e9)


def low(m):
    return (1 - m[..., None].astype(jnp.float32)) * -1e4


MODELS = {
    "a function": lambda x, m: nn.sigmoid(far(x, m)).sum(1),
    "of infinity": lambda x, m: jnp.exp(jnp.where(m[..., None], x, -jnp.inf)).sum(1),
    "added and scaled": lambda x, m: nn.sigmoid((x + low(m)) * 0.5).sum(1),
    "of several": lambda x, m: far(x, m).max(1) + jnp.where(m[..., None], far(x, m), 0).mean(1),
    "compared": lambda x, m: jnp.where((y := far(x, m).max(1)) < -1e8, 0, y),
    "two behind each other": lambda x, m: nn.relu(jnp.maximum(far(x, m), -1.0)).sum(1),
    "log of sums": lambda x, m: jax.nn.logsumexp(far(x, m), 1),
    "in parts": lambda x, m: nn.tanh(jnp.concatenate([far(x, m), x], 1)).sum(1),
}


@pytest.mark.parametrize("name", by_half(MODELS))
def test_what_reads_them_stays_float(name, tmp_path):
    """The relative error was 1: all codes were those of -1e9 or zero."""
    form = MODELS[name]
    model = Model(lambda ids: nn.Dense(4)(form(nn.Dense(5)(nn.Embed(9, 8)(ids)), ids > 0)))
    qmodel, variables, _ = observed(model, IDS)
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    assert_files_agree(qmodel, variables, tmp_path, IDS)
    ranges = qmodel.plan(variables, IDS).quantizers.values()
    assert all(abs(end) < 100 for q in ranges if q.lo is not None for end in (q.lo, q.hi))


def test_what_returns_them_is_not_rounded():
    """Scores of moves that are not allowed, as policies return them."""
    model = Model(lambda ids: far(nn.Dense(5)(nn.Embed(9, 8)(ids)), ids > 0))
    qmodel, variables, _ = observed(model, IDS)
    y = qmodel.apply(variables, IDS)
    np.testing.assert_array_equal(y == -1e9, np.repeat((IDS == 0)[..., None], 5, 2))
    assert len(jnp.unique(y)) > 20
