"""Norms that models write by hand are one node, whatever they are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import observed
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (4, 5, 12)) * jnp.linspace(0.2, 3, 12)[None, None]
SCALE, SHIFT = jnp.linspace(0.5, 1.5, 12), jnp.linspace(-1, 1, 12)


@pytest.fixture(autouse=True)
def as_people_write():
    """Vectors are added to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Shifted(nn.LayerNorm):
    """A subclass whose parameters are not those that it uses."""

    def param(self, *args, **kwargs):
        return super().param(*args, **kwargs) + 0.5


def mean(x, axis=-1):
    return x.mean(axis, keepdims=True)


def var(x, axis=-1):
    return mean((x - mean(x, axis)) ** 2, axis)


NORMS = {
    "divided": lambda x: (x - mean(x)) / jnp.sqrt(var(x) + 1e-5) * SCALE + SHIFT,
    "rsqrt": lambda x: (x - mean(x)) * lax.rsqrt(mean(jnp.square(x - mean(x))) + 1e-5),
    "scaled first": lambda x: (x - mean(x)) * (lax.rsqrt(var(x) + 1e-5) * SCALE) + SHIFT,
    "inverse": lambda x: (x - mean(x)) * (1 / jnp.sqrt(1e-6 + var(x))),
    "RMS": lambda x: x * lax.rsqrt(mean(x * x) + 1e-6) * (1 + SCALE),
    "jnp.var": lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "fast": lambda x: (x - mean(x)) / jnp.sqrt(mean(x**2) - mean(x) ** 2 + 1e-5),
    "clipped": lambda x: (
        (x - mean(x)) * lax.rsqrt(jnp.maximum(0, mean(x**2) - mean(x) ** 2) + 1e-5)
    ),
    "standardize": nn.standardize,
    "another axis": lambda x: (x - mean(x, 1)) / jnp.sqrt(var(x, 1) + 1e-5) * SCALE,
    "two axes": lambda x: (x - mean(x, (1, 2))) / jnp.sqrt(var(x, (1, 2)) + 1e-5),
    "subclass": lambda x: Shifted()(x),
}
NO_NORMS = {
    "l2": lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6),
    "of another": lambda x: (x[..., ::-1] - mean(x)) / jnp.sqrt(var(x) + 1e-5),
    "not centered": lambda x: x / jnp.sqrt(var(x) + 1e-5),
    "of less": lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5),
    "over the batch": lambda x: (x - mean(x, 0)) / jnp.sqrt(var(x, 0) + 1e-5),
    "seen": lambda x: (x - mean(x)) / jnp.sqrt((v := var(x)) + 1e-5) + v,
    "a floor": lambda x: (x - mean(x)) * lax.rsqrt(jnp.maximum(var(x), 0.1) + 1e-5),
    "of some": lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True, where=SCALE > 1) + 1e-5),
    "turned": lambda x: (y := x[:, :, :5]) / jnp.sqrt(mean(y * y)[:, None, :, 0] + 1e-5),
    "means of two": lambda x: (x - mean(x, 1)) / jnp.sqrt(var(x) + 1e-5),
}


def between(function):
    return Model(lambda x: nn.Dense(3)(function(nn.Dense(12)(x))))


def kinds(function):
    qmodel = sq.SimQAT().apply(between(function))
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), X))
    return [row.kind for row in qmodel.plan(variables, X).rows]


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_one_node(name):
    assert kinds(NORMS[name])[1:-1] == ["norm"]


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_computes_something_else_is_no_norm(name):
    assert "norm" not in kinds(NO_NORMS[name])


@pytest.mark.parametrize("name", ["scaled first", "RMS", "clipped", "two axes", "subclass"])
def test_a_norm_keeps_its_function_and_its_codes(name):
    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    model = between(NORMS[name])
    qmodel, variables, _ = observed(model, X, config=config)
    floats = model.apply({"params": variables["params"]}, X)
    y = jax.jit(qmodel.apply)(variables, X)
    assert jnp.linalg.norm(y - floats) < 0.03 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, X)(X), y)
