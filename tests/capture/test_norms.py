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


def length(x):
    return jnp.linalg.norm(x, axis=-1, keepdims=True)


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
LENGTHS = {
    "sum of squares": lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6),
    "rsqrt of it": lambda x: x * lax.rsqrt(jnp.sum(x * x, 1, keepdims=True) + 0.5) * SCALE,
    "jnp.linalg": lambda x: x / length(x),
    "jnp.linalg of fewer axes": lambda x: x / jnp.linalg.norm(x, axis=-1)[..., None] + SHIFT,
    "and a number": lambda x: x / (length(x) + 0.7),
    "at least": lambda x: x / jnp.maximum(length(x), 3.0),
    "at least, and a number": lambda x: x / (jnp.clip(length(x), min=3.0) + 0.7),
    "clipped square": lambda x: x * lax.rsqrt(jnp.maximum(jnp.sum(x**2, -1, keepdims=True), 9.0)),
    "std and a number": lambda x: SCALE * (x - mean(x)) / (jnp.std(x, -1, keepdims=True) + 0.3),
}
"""Norms by lengths, and with numbers that keep what divides from zero."""
NO_NORMS = {
    "at most": lambda x: x / jnp.minimum(length(x), 3.0),
    "absolute values": lambda x: x / jnp.linalg.norm(x, 1, axis=-1, keepdims=True),
    "of all": lambda x: x / jnp.linalg.norm(x),
    "of a number more first": lambda x: x / jnp.maximum(length(x) + 0.7, 3.0),
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


@pytest.mark.parametrize("name", [*NORMS, *LENGTHS])
def test_a_norm_is_one_node(name):
    assert kinds({**NORMS, **LENGTHS}[name])[1:-1] == ["norm"]


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_computes_something_else_is_no_norm(name):
    assert "norm" not in kinds(NO_NORMS[name])


SPREADS = {
    "jnp.std": lambda x: jnp.std(x, -1),
    "jnp.var": lambda x: x.var(1, keepdims=True),
    "by hand": lambda x: jnp.sqrt(var(x, 1) + 0.2)[:, 0],
    "with its mean": lambda x: jnp.concatenate([mean(x, 1), jnp.sqrt(var(x, 1))], -1),
    "at least a square": lambda x: jnp.sqrt(jnp.maximum(mean(x**2) - mean(x) ** 2, 1.5)),
    "length": lambda x: length(x),
    "mean square": lambda x: jnp.sqrt(mean(x * x, (1, 2))),
}
NO_SPREADS = {
    "of less": lambda x: x.std(-1, ddof=1),
    "over the batch": lambda x: jnp.std(x, 0),
    "absolute values": lambda x: jnp.linalg.norm(x, 1, axis=-1),
}


@pytest.mark.parametrize("name", SPREADS)
def test_a_deviation_is_one_node(name):
    found = kinds(SPREADS[name])
    assert found.count("spread") == 1
    assert not {"float", "add", "mul"} & set(found)


@pytest.mark.parametrize("name", NO_SPREADS)
def test_what_computes_something_else_is_no_deviation(name):
    assert "spread" not in kinds(NO_SPREADS[name])


@pytest.mark.parametrize("name", ["scaled first", "RMS", "clipped", "two axes", "subclass"])
def test_a_norm_keeps_its_function_and_its_codes(name):
    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    model = between(NORMS[name])
    qmodel, variables, _ = observed(model, X, config=config)
    floats = model.apply({"params": variables["params"]}, X)
    y = jax.jit(qmodel.apply)(variables, X)
    assert jnp.linalg.norm(y - floats) < 0.03 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, X)(X), y)


def test_norms_by_lengths_and_deviations_keep_their_functions_and_their_codes():
    names = "rsqrt of it", "at least, and a number", "clipped square", "std and a number"
    names += "jnp.var", "at least a square", "length"

    def function(x):
        y = nn.Dense(12)(x)
        return {name: (LENGTHS | SPREADS)[name](y) for name in names}

    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    qmodel, variables, _ = observed(Model(function), X, config=config)
    floats = Model(function).apply({"params": variables["params"]}, X)
    got = jax.jit(qmodel.apply)(variables, X)
    for name, y in got.items():
        assert jnp.abs(y - floats[name]).max() < 0.03 * jnp.abs(floats[name]).max(), name
    converted = sq.convert(qmodel, variables, X)
    assert not converted.program.float_ops
    jax.tree.map(np.testing.assert_array_equal, converted(X), got)
