"""Constants that repeat along an axis are computed once, and repeated behind."""

import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.typing import Initializer
from models import observed
from zoo import Model

import simqat_jax as sq
from simqat_jax.capture import products as products_of
from simqat_jax.capture.repetitions import move_repetitions
from simqat_jax.training.module import trace

BATCH = 4
X = jax.random.normal(jax.random.key(0), (BATCH, BATCH, 6))
"""There are as many tokens as examples: that tells nothing."""
REPEATS = {
    "broadcast": lambda q: jnp.broadcast_to(q, (BATCH, *q.shape[1:])),
    "repeat": lambda q: jnp.repeat(q, BATCH, 0),
    "tile": lambda q: jnp.tile(q, (BATCH, 1, 1)),
    "new axis": lambda q: jnp.repeat(q[0][None], BATCH, 0),
    "zeros": lambda q: jnp.zeros((BATCH, *q.shape[1:])) + q,
}


class Queries(nn.Module):
    """Queries go through `body` before they meet the data."""

    body: Callable[[jax.Array], jax.Array]
    repeats: Callable[[jax.Array], jax.Array] = REPEATS["broadcast"]
    start: Initializer = nn.initializers.normal(1.0)

    @nn.compact
    def __call__(self, x):
        q = self.repeats(self.param("queries", self.start, (1, BATCH, 6)))
        return nn.Dense(2)(nn.Dense(6)(x) + self.body(q))


def layers(q):
    return nn.Dense(6)(nn.relu(nn.Dense(6)(nn.LayerNorm()(q)))) + q


def turned(q):
    q = nn.DenseGeneral((2, 3))(q / jnp.sqrt(3.0)).transpose(0, 2, 1, 3)
    a, b = jnp.split(jnp.concatenate([q, -q], 1), 2, 1)
    a = nn.softmax(a + b[:, :, :1]).reshape(BATCH, 2 * BATCH, 3)
    return nn.Dense(6)(a)[:, ::2] + q.mean((1, 2, 3), keepdims=True)[..., 0]


def attention(q):
    return nn.MultiHeadDotProductAttention(2)(q, q + 1.0, jnp.sin(9 * q))


MOVED = {
    "layers": layers,
    "turned": turned,
    "attention": attention,
}
KEPT = {
    "softmax": lambda q: nn.softmax(nn.Dense(6)(q), 0),
    "total": lambda q: nn.Dense(6)(jnp.cumsum(q, 0).sum(0, keepdims=True)),
    "joined": lambda q: nn.Dense(6)(q.reshape(-1, 6)).reshape(q.shape),
    "multiplied": lambda q: jnp.einsum("bmd,bc->cmd", q, jnp.linspace(0, 1, 16).reshape(4, 4)),
}


def graph_of(model):
    """The graph of a quantized model."""
    qmodel = sq.SimQAT().apply(model)
    variables = jax.eval_shape(qmodel.init, jax.random.key(1), X)
    return trace(qmodel, variables, (X,), {}, None, rngs={}, mutable=[]).graph


def constants(graph):
    """The operations without data: what they are, and the shapes of their results."""
    nodes = [n for n in graph.nodes if not n.data_inputs(graph.data)]
    return [(n.op, graph.avals[v].shape) for n in nodes for v in n.outputs]


def products(graph):
    return [shape for op, shape in constants(graph) if op == "dot_general"]


@pytest.fixture
def unmoved(monkeypatch):
    """Leave repetitions where they are, once called."""
    # Their package names a function as the module.
    capture = sys.modules["simqat_jax.capture.capture"]

    def leave():
        monkeypatch.setattr(capture, "move_repetitions", lambda graph: graph)
        monkeypatch.setattr(products_of, "shapes_once", lambda _: {})

    return leave


def trained(model):
    """The output of a training step, and the gradient of its squares."""
    qmodel, variables, _ = observed(model, X)

    def loss(params):
        y, _ = qmodel.apply({**variables, "params": params}, X, mutable=["quant_stats"])
        return (y**2).sum(), y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return y, grads


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


@pytest.mark.parametrize("repeats", REPEATS)
def test_what_follows_any_repetition_is_computed_once(repeats):
    graph = graph_of(Queries(layers, REPEATS[repeats]))
    assert products(graph) == [(1, BATCH, 6)] * 2
    assert constants(graph)[-1] == ("broadcast_in_dim", X.shape)


@pytest.mark.parametrize("body", MOVED)
def test_training_is_the_same_but_for_rounding(body, unmoved):
    model = Queries(MOVED[body])
    assert {shape[0] for shape in products(graph_of(model))} == {1}
    y, grads = trained(model)
    unmoved()
    assert {shape[0] for shape in products(graph_of(model))} == {BATCH}
    assert_close((y, grads), trained(model))
    assert np.abs(grads["queries"]).max() > 0.01


@pytest.mark.parametrize("body", KEPT)
def test_what_works_along_the_axis_is_not_moved(body, unmoved):
    model = Queries(KEPT[body])
    moved = trained(model)
    unmoved()
    assert_close(moved, trained(model))


def test_a_length_tells_nothing():
    """Rows that differ, as many as examples, are as they were."""
    table = jnp.linspace(-1, 1, 6 * BATCH).reshape(BATCH, 6)
    model = Model(lambda x: nn.Dense(6)(x) + nn.Dense(6)(jnp.sin(table))[:, None])
    assert products(graph_of(model)) == [(BATCH, 6)]


def test_a_function_keeps_its_own_gradient():
    """That of relu at zero is zero; that of a maximum is one half."""
    model = Queries(lambda q: nn.Dense(6)(nn.relu(q)), start=nn.initializers.zeros)
    assert products(graph_of(model)) == [(1, BATCH, 6)]
    assert not trained(model)[1]["queries"].any()


def class_token(x):
    token = jnp.tile(jnp.linspace(-1, 1, 6).reshape(1, 1, 6), (x.shape[0], 1, 1))
    return nn.Dense(2)(jnp.concatenate([token, nn.Dense(6)(x)], 1))


def scaled(x):
    scale = nn.Dense(6)(jnp.linspace(0, 1, 6).reshape(1, 1, 6))
    return nn.Dense(2)(nn.Dense(6)(x) * jnp.exp(scale))


@pytest.mark.parametrize("body", [class_token, scaled, lambda x: nn.MultiHeadAttention(2)(x)])
def test_other_graphs_stay_as_they_are(body, unmoved):
    unmoved()
    graph = graph_of(Model(body))
    assert move_repetitions(graph) is graph


def test_without_jit():
    with jax.disable_jit():
        assert products(graph_of(Queries(layers))) == [(1, BATCH, 6)] * 2
