"""A kernel that repeats along the batch is one kernel for all examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import observed
from zoo import Model

import simqat_jax as sq
from simqat_jax.capture import products

BATCH = 4
X = jax.random.normal(jax.random.key(0), (BATCH, BATCH, 6))


@pytest.fixture
def repeated(monkeypatch):
    """Leave kernels repeated, once called."""
    return lambda: monkeypatch.setattr(products, "shapes_once", lambda _: {})


def queries(*shape):
    q = jnp.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    return jnp.broadcast_to(jnp.sin(9 * q), (BATCH, *shape))


def heads(x, order):
    x = nn.DenseGeneral((2, 3))(x)
    return jnp.einsum(order, queries(5, 2, 3), x)


def twice(x):
    q = queries(5, 6)
    x = nn.Dense(6)(x)
    return jnp.einsum("bqd,bkd->bqk", q, x), jnp.einsum("bqd,bkd->bqk", q, nn.relu(x))


PRODUCTS = {
    "heads": (lambda x: heads(x, "bqhd,bkhd->bhqk"), 10),
    "heads, data first": (lambda x: heads(x, "bqhd,bkhd->bhkq"), 10),
    "twice": (twice, 5),
    "columns": (lambda x: nn.softmax(nn.Dense(6)(x) @ queries(6, 5)), 5),
}
"""What multiplies data by queries, and how many channels are left without the batch."""


def described(body, variables=None, **config):
    """Variables, what a plan says, names and shapes of ranges, and what evaluation returns."""
    config = sq.SimQATConfig(**config)
    qmodel, observing, _ = observed(Model(body), X, config=config)
    shapes = jax.tree.map(jnp.shape, observing["quant_stats"])
    variables = observing if variables is None else variables
    return variables, str(qmodel.plan(variables, X)), shapes, jax.jit(qmodel.apply)(variables, X)


@pytest.mark.parametrize("name", PRODUCTS)
def test_codes_and_plan_stay(name, repeated):
    body, _ = PRODUCTS[name]
    variables, plan, shapes, y = described(body)
    repeated()
    _, *before = described(body, variables)
    assert [plan, shapes] == before[:2]
    np.testing.assert_array_equal(y, before[2])


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_batch_is_no_channel(name):
    body, channels = PRODUCTS[name]
    kernel = sq.QuantSpec.weight(observer="minmax")
    _, _, shapes, _ = described(body, weight=kernel)
    found = {state.lo for path, state in shapes.items() if path.endswith("matmul/kernel")}
    assert found == {(channels,)}


@pytest.mark.parametrize("behind", ["bias", "BatchNorm"])
def test_nothing_more_is_fused_behind(behind, repeated):
    """Ranges that were observed before are those of the product alone."""

    def body(x):
        y = nn.Dense(6)(x) @ queries(6, 5)
        if behind == "bias":
            return y + jnp.linspace(0, 1, 5).reshape(1, 1, 5)
        return nn.BatchNorm(use_running_average=True)(y)

    variables, plan, shapes, _ = described(body)
    repeated()
    assert (plan, shapes) == described(body, variables)[1:3]
