"""Masks divided by their counts weight sums as exactly as sums are divided by counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_files_agree, by_half, observed
from zoo import Model

import simqat_jax as sq

LENGTHS = np.array([600, 40, 3, 1])
IDS = jnp.asarray(np.where(np.arange(600) < LENGTHS[:, None], 1 + np.arange(600) % 8, 0))


def shares(m):
    return m / m.sum(1, keepdims=True)


SUMS = {
    "multiplied": lambda x, m: (x * shares(m)[..., None]).sum(1),
    "repeated first": lambda x, m: (x * jnp.repeat(shares(m)[:, :, None], 5, 2)).sum(1),
    "a matrix product": lambda x, m: jnp.einsum("blc,bl->bc", x, shares(m)),
    "from the left": lambda x, m: (shares(m)[:, None] @ x)[:, 0],
}


@pytest.mark.parametrize("name", by_half(SUMS))
def test_the_sum_is_divided(name, tmp_path):
    """On a grid of eight bits that holds 1, a share of one in 600 is none."""
    model = Model(lambda ids: nn.Dense(4)(SUMS[name](nn.Embed(9, 5)(ids) + 1, ids > 0)))
    config = sq.SimQATConfig(float_parts="refuse", activation=sq.QuantSpec(observer="minmax"))
    qmodel, variables, _ = observed(model, IDS, config=config)
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.max(jnp.abs(y - floats)) < 0.03 * jnp.max(jnp.abs(floats))
    assert_files_agree(qmodel, variables, tmp_path, IDS)


def test_shares_of_other_axes_stay_weights():
    """What differs along a sum cannot divide it."""

    def body(ids):
        m = (ids > 0).astype(jnp.float32)
        return nn.Dense(4)(
            (nn.Embed(9, 5)(ids) * (m / (m.sum(0, keepdims=True) + 1))[..., None]).sum(1)
        )

    model, ids = Model(body), IDS[:, :9]
    qmodel, variables, _ = observed(model, ids)
    y = qmodel.apply(variables, ids)
    floats = model.apply({"params": variables["params"]}, ids)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
