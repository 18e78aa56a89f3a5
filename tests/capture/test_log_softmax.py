"""Logarithms of a softmax are one node, as models write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import observed
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (3, 4, 4))
logsumexp = jax.nn.logsumexp


def less_its_maximum(x):
    return x - x.max(-1, keepdims=True)


def log_softmax(x):
    """With a temperature: another function of the same name."""
    return nn.log_softmax(x / 2.0)


FUNCTIONS = {
    "of JAX": nn.log_softmax,
    "along another axis": lambda x: nn.log_softmax(x, 1),
    "logsumexp": lambda x: x - logsumexp(x, -1, keepdims=True),
    "logsumexp of fewer axes": lambda x: x - logsumexp(x, 1)[:, None],
    "without a maximum": lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)),
    "by hand": lambda x: (y := less_its_maximum(x)) - jnp.log(jnp.exp(y).sum(-1, keepdims=True)),
}
OTHERS = {
    "along two axes": lambda x: nn.log_softmax(x, (1, 2)),
    "of another": lambda x: x[..., ::-1] - logsumexp(x, -1, keepdims=True),
    "along an axis put elsewhere": lambda x: x - logsumexp(x, 1)[:, :, None],
    "seen": lambda x: (y := logsumexp(x, -1, keepdims=True)) + (x - y),
    "shifted twice": lambda x: less_its_maximum(x) - logsumexp(x, -1, keepdims=True),
    "a name": jax.jit(log_softmax),
}


def kinds(function):
    qmodel = sq.SimQAT().apply(Model(lambda x: function(nn.Dense(4)(x))))
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), X))
    return [row.kind for row in qmodel.plan(variables, X).rows]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_logarithm_of_a_softmax_is_one_node(name):
    assert kinds(FUNCTIONS[name]) == ["dense", "log_softmax"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_computes_something_else_is_none(name):
    assert "log_softmax" not in kinds(OTHERS[name])


def test_a_tensor_less_another_number_stays_a_tensor_of_its_own():
    def function(x):
        y = x - jnp.abs(x).max(-1, keepdims=True)
        return y - jnp.log(jnp.exp(y).sum(-1, keepdims=True))

    assert kinds(function)[-2:] == ["add", "log_softmax"]


@pytest.mark.parametrize("name", ["along another axis", "logsumexp of fewer axes", "by hand"])
def test_a_logarithm_keeps_its_function_and_its_codes(name):
    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    model = Model(lambda x: FUNCTIONS[name](nn.Dense(4)(x)))
    qmodel, variables, _ = observed(model, X, config=config)
    floats = model.apply({"params": variables["params"]}, X)
    y = jax.jit(qmodel.apply)(variables, X)
    assert jnp.abs(y - floats).max() < 0.02 * jnp.abs(floats).max()
    np.testing.assert_array_equal(sq.convert(qmodel, variables, X)(X), y)
