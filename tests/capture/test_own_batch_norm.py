"""BatchNorms written by hand are one node, in training as in evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import EXPORTS
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (8, 5, 6)) * 2.0 + 0.5


@pytest.fixture(autouse=True)
def as_people_write():
    """Vectors are added to matrices."""
    with jax.numpy_rank_promotion("allow"):
        yield


class Own(nn.Module):
    """A BatchNorm between layers, `form` of its input, statistics, scale and shift."""

    form: staticmethod

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
        var = self.variable("batch_stats", "var", jnp.ones, 4)
        scale = self.param("scale", nn.initializers.uniform(1.0), (4,)) + 0.5
        shift = self.param("shift", nn.initializers.uniform(1.0), (4,))
        batch = mean.value, var.value
        if train:
            batch = x.mean((0, 1)), ((x - x.mean((0, 1))) ** 2).mean((0, 1))
            mean.value, var.value = (
                0.5 * v.value + 0.5 * b for v, b in zip((mean, var), batch, strict=True)
            )
        return nn.Dense(2)(nn.silu(self.form(x, *batch, scale, shift)))


def shared(x, mean, var, scale, shift):
    """What is left of the mean is read by the variance, too."""
    left = x - mean
    return left * lax.rsqrt(var + 1e-5) * scale + shift


def shaped(x, mean, var, scale, shift):
    mean, inverse, shift = (v.reshape(1, 1, -1) for v in (mean, lax.rsqrt(var) * scale, shift))
    return (x - mean) * inverse + shift


FORMS = {
    "scaled behind": shared,
    "shaped": shaped,
    "in one": lambda x, m, v, a, b: x * (f := lax.rsqrt(v + 1e-5) * a) + (b - m * f),
    "divided": lambda x, m, v, a, b: a * (x - m) / jnp.sqrt(v + 1e-5) + b,
    "inverse": lambda x, m, v, a, b: (x - m) * (1 / jnp.sqrt(v + 1e-5)),
}


def evaluated(form):
    """The quantized model and its variables after three steps."""
    qmodel = sq.SimQAT().apply(Own(form))
    variables = jax.jit(qmodel.init)(jax.random.key(1), X)
    mutable = ["batch_stats", "quant_stats"]
    train = jax.jit(lambda v: qmodel.apply(v, X, train=True, mutable=mutable)[1])
    for _ in range(3):
        variables = {**variables, **train(variables)}
    return qmodel, variables


def kinds(qmodel, variables, **kwargs):
    return [row.kind for row in qmodel.plan(variables, X, **kwargs).rows]


@pytest.mark.parametrize("name", FORMS)
def test_it_is_one_node_in_training_and_in_evaluation(name):
    qmodel = sq.SimQAT().apply(Own(FORMS[name]))
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(1), X))
    assert kinds(qmodel, variables) == ["dense", "batch_norm", "elementwise", "dense"]
    training = qmodel.plan(variables, X, train=True)
    assert [row.kind for row in training.rows].count("batch_norm") == 1
    assert list(training.quantizers) == list(qmodel.plan(variables, X).quantizers)


def test_it_keeps_its_function_and_its_codes(tmp_path):
    qmodel, variables = evaluated(shared)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    want, got = Own(shared).apply(floats, X), jax.jit(qmodel.apply)(variables, X)
    assert jnp.linalg.norm(got - want) < 0.03 * jnp.linalg.norm(want)
    for backend, export in EXPORTS.items():
        model = sq.convert(qmodel, variables, X, backend=backend)
        assert [op.kind for op in model.ops] == ["dense", "affine", "table", "dense"]
        np.testing.assert_array_equal(model(X), got)
        path = tmp_path / f"m.{backend}"
        export(model, path)
        assert sq.verify(model, path, X).differing == 0


def test_on_batch_statistics_it_is_converted_as_it_is_written():
    qmodel, variables = evaluated(shaped)
    model = sq.convert(qmodel, variables, X, train=True)
    assert "affine" not in [op.kind for op in model.ops]
    assert not np.array_equal(model(X), sq.convert(qmodel, variables, X, train=False)(X))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * jnp.linspace(1.0, 2.0, 4) + 1.0,
        lambda x: x / jnp.sqrt(4.0) + jnp.linspace(1.0, 2.0, 4),
        lambda x: x * lax.rsqrt(x.var((1,), keepdims=True) + 1e-5),
        lambda x: (x - x.mean((0, 1))) * 2.0,
    ],
    ids=["a scale", "the root of a number", "of each example", "a mean alone"],
)
def test_what_computes_something_else_is_none(function):
    model = Model(lambda x: nn.Dense(2)(function(nn.Dense(4)(x))))
    for x in (X, X[:1]):
        qmodel = sq.SimQAT().apply(model)
        variables = jax.eval_shape(lambda x=x, qmodel=qmodel: qmodel.init(jax.random.key(0), x))
        assert "batch_norm" not in [row.kind for row in qmodel.plan(variables, x).rows]
