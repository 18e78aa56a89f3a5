"""Functions with a pole and norms written by hand stay float, in training and in evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import assert_same, initialized, observed
from zoo import Model

import simqat_jax as sq

ROWS = jax.random.normal(jax.random.key(0), (16, 12)) * jnp.linspace(0.2, 3, 16)[:, None]


@pytest.fixture(autouse=True)
def as_people_write():
    """Vectors are added to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


def between(function):
    return Model(lambda x: nn.Dense(2)(function(nn.Dense(12)(x))))


def rows_of(model, x):
    qmodel, variables = initialized(model, x)
    return {row.path: row for row in qmodel.plan(variables, x).rows}


@pytest.mark.parametrize(
    "function",
    [
        lax.rsqrt,
        lambda x: 1 / x,
        lambda x: 2.0 / (x * x),
        lambda x: x**-2,
        jnp.log,
        jnp.log1p,
        lambda x: jnp.log(jnp.abs(x)),
        lambda x: lax.rsqrt(jnp.maximum(x, 0) + 1e-6),
        jnp.arctanh,
        lambda x: jnp.power(jnp.abs(x), -0.5),
    ],
)
def test_a_function_with_a_pole_is_no_table(function):
    notes = [row.note for row in rows_of(between(function), ROWS).values()]
    assert any("a function with a pole" in note for note in notes)
    assert not any(note.split()[0] == "table" for note in notes if note)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / (1 + jnp.exp(-x)),
        lambda x: 1 / (1 + jnp.abs(x)),
        lambda x: jnp.log(1 + jnp.exp(x)),
        lambda x: jnp.log1p(jnp.exp(-jnp.abs(x))),
        lambda x: x * lax.rsqrt(x * x + 1),
        lambda x: jnp.sqrt(x * x + 4) / 2,
        lambda x: 1 / jnp.clip(x, 0.5, 6),
        jax.nn.mish,
        jax.nn.softplus,
    ],
)
def test_a_function_whose_pole_is_out_of_reach_is_a_table(function):
    notes = [row.note for row in rows_of(between(function), ROWS).values()]
    assert "table lookup" in notes


class Normalized(nn.Module):
    """A norm between two layers; `own(self, x, train)` computes it."""

    own: staticmethod

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(12)(x)
        return nn.Dense(2)(nn.relu(self.own(self, x, train)))


def affine(module, channels):
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    return module.param("scale", ones, (channels,)), module.param("shift", zeros, (channels,))


def statistics(module, x, train):
    channels = x.shape[-1]
    mean = module.variable("batch_stats", "mean", jnp.zeros, channels)
    var = module.variable("batch_stats", "var", jnp.ones, channels)
    if not train:
        return mean.value, var.value
    if not module.is_initializing():
        mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
        var.value = 0.5 * var.value + 0.5 * x.var(0)
    return x.mean(0), x.var(0)


def batch_norm(module, x, train):
    (scale, shift), (mean, var) = affine(module, x.shape[-1]), statistics(module, x, train)
    return (x - mean) * lax.rsqrt(var + 1e-5) * scale + shift


def batch_norm_in_one(module, x, train):
    (scale, shift), (mean, var) = affine(module, x.shape[-1]), statistics(module, x, train)
    factor = lax.rsqrt(var + 1e-5) * scale
    return x * factor + (shift - mean * factor)


def batch_norm_divided(module, x, train):
    (scale, shift), (mean, var) = affine(module, x.shape[-1]), statistics(module, x, train)
    return scale * (x - mean) / jnp.sqrt(var + 1e-5) + shift


def rms_norm(module, x, train):
    del train
    scale, _ = affine(module, x.shape[-1])
    return x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def layer_norm(module, x, train):
    del train
    scale, shift = affine(module, x.shape[-1])
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * (1 / jnp.sqrt(var + 1e-6)) * scale + shift


def layer_norm_of_moments(module, x, train):
    del train
    scale, shift = affine(module, x.shape[-1])
    mean, square = x.mean(-1, keepdims=True), (x * x).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(square - mean * mean + 1e-6) * scale + shift


def group_norm(module, x, train):
    del train
    scale, shift = affine(module, x.shape[-1])
    groups = x.reshape(len(x), 3, 4)
    mean, var = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    return ((groups - mean) * lax.rsqrt(var + 1e-6)).reshape(x.shape) * scale + shift


def unit_length(module, x, train):
    del module, train
    return 3.0 * x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-8)


NORMS = [
    *(batch_norm, batch_norm_in_one, batch_norm_divided),
    *(rms_norm, layer_norm, layer_norm_of_moments, group_norm, unit_length),
]


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("own", NORMS)
def test_a_norm_written_by_hand_is_as_good_as_float(own):
    model = Normalized(own)
    qmodel, variables = initialized(model, ROWS)
    stats = [name for name in variables if name == "batch_stats"]

    @jax.jit
    def run(variables):
        floats = {k: v for k, v in variables.items() if k != "quant_stats"}
        for _ in range(3):
            mutable = [*stats, "quant_stats"]
            _, updates = qmodel.apply(variables, ROWS, train=True, mutable=mutable)
            variables = {**variables, **updates}
            floats = {**floats, **model.apply(floats, ROWS, train=True, mutable=stats)[1]}
        return variables, floats, model.apply(floats, ROWS), qmodel.apply(variables, ROWS)

    variables, floats, want, got = run(variables)
    for name in stats:
        jax.tree.map(close, variables[name], floats[name])
    assert jnp.linalg.norm(got - want) < 0.08 * jnp.linalg.norm(want)
    assert_same(sq.convert(qmodel, variables, ROWS)(ROWS), got)


def test_a_sum_with_a_norm_is_an_integer_one():
    def body(x):
        h = nn.Dense(12)(x)
        return nn.Dense(2)(x + h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6))

    qmodel, variables, _ = observed(Model(body), ROWS)
    (add,) = (r for r in qmodel.plan(variables, ROWS).rows if r.path == "add" and r.output)
    assert not add.note


def test_a_scale_of_constants_is_no_norm():
    rows = rows_of(between(lambda x: x * lax.rsqrt(jnp.float32(12))), ROWS)
    assert not any("norm" in row.note for row in rows.values())
