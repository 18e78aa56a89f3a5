"""Logarithms of a softmax are one node, as models write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPORTS, observed
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
    "along two axes": lambda x: nn.log_softmax(x, (1, 2)),
    "logsumexp of two axes": lambda x: x - logsumexp(x, (1, 2), keepdims=True),
    "by hand": lambda x: (y := less_its_maximum(x)) - jnp.log(jnp.exp(y).sum(-1, keepdims=True)),
}
OTHERS = {
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


MASKED = {
    "a constant": lambda x: nn.log_softmax(jnp.where(CAUSAL, x, -1e9)),
    "infinite": lambda x: nn.log_softmax(x + jnp.where(CAUSAL, 0, -jnp.inf)),
    "an input, along two axes": lambda x: nn.log_softmax(jnp.where(IDS > 1, x, -1e9), (1, 2)),
    "logsumexp": lambda x: (y := jnp.where(CAUSAL, x, -1e9)) - logsumexp(y, -1, keepdims=True),
}
CAUSAL = np.tril(np.ones((1, 4, 4), bool))
IDS = np.array([[[3, 1, 4, 1]], [[5, 9, 2, 6]], [[1, 1, 1, 8]]])


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_is_part_of_a_logarithm(name):
    assert kinds(MASKED[name]) == ["dense", "log_softmax"]


def test_masked_scores_that_are_returned_stay_scores():
    def function(x):
        scores = jnp.where(CAUSAL, x, -1e9)
        return nn.log_softmax(scores), scores

    found = kinds(function)
    assert found.count("log_softmax") == 1 and len(found) > 2


class Policy(nn.Module):
    """Logarithms of what may be done: where a mask, an input, lets it."""

    @nn.compact
    def __call__(self, x, allowed):
        scores = nn.Dense(4)(x)
        causal = nn.log_softmax(scores + np.where(CAUSAL, 0, -1e9))
        allowed = nn.log_softmax(jnp.where(allowed, scores, -1e9), (1, 2))
        return causal, allowed, nn.softmax(scores, (1, 2))


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_masked_logarithms_have_the_codes_of_evaluation_and_files(backend, tmp_path):
    """What a mask leaves out is in no range, and has the lowest code."""
    config = sq.SimQATConfig(backend=backend, activation=sq.QuantSpec(observer="minmax"))
    args = X, jnp.asarray(np.random.default_rng(0).random((3, 1, 4)) < 0.6).at[:, :, 0].set(True)
    qmodel, variables, _ = observed(Policy(), *args, config=config)
    got = jax.jit(qmodel.apply)(variables, *args)
    floats = Policy().apply({"params": variables["params"]}, *args)
    for y, want in zip(jax.tree.leaves(got), jax.tree.leaves(floats), strict=True):
        kept = want > -1e8
        assert jnp.abs(y - want)[kept].max() < 0.05
        assert kept.all() or (y[~kept] == y.min()).all()
    integer = sq.convert(qmodel, variables, *args)
    assert not integer.program.float_ops
    jax.tree.map(np.testing.assert_array_equal, integer(*args), got)
    path = tmp_path / f"model.{backend}"
    EXPORTS[backend](integer, path)
    found = sq.verify(integer, path, *args, batch_size=2)
    assert (found.codes, found.differing) == (3 * X.size, 0)


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
