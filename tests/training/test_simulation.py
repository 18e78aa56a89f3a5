"""Training steps: what the float model does in them, the quantized one does too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import RNGS, observed

import simqat_jax as sq

IMAGE = jax.random.normal(jax.random.key(2), (3, 7, 7, 4)) + 0.3
WIDE = sq.SimQATConfig(
    weight=sq.QuantSpec(
        num_bits=16, symmetric=True, per_channel=True, narrow_range=True, observer="batch"
    ),
    activation=sq.QuantSpec(num_bits=16, observer="minmax"),
    bn_fold="none",
)


class Normed(nn.Module):
    """BatchNorm behind a layer and on its own, told how at construction or at the call."""

    at_call: bool

    @nn.compact
    def __call__(self, x, train):
        own = {} if self.at_call else {"use_running_average": not train}
        call = {"use_running_average": not train} if self.at_call else {}
        x = nn.BatchNorm(momentum=0.8, **own)(nn.Conv(4, (3, 3))(x), **call)
        x = nn.relu(x)
        return nn.Dense(3)(nn.BatchNorm(momentum=0.8, **own)(x, **call).mean((1, 2)))


@pytest.mark.parametrize("at_call", [False, True])
def test_running_statistics_are_those_of_the_float_model(at_call):
    model = Normed(at_call)
    qmodel = sq.SimQAT(WIDE).apply(model)
    variables = qmodel.init(RNGS, IMAGE, train=True)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    train = jax.jit(
        lambda v, x: qmodel.apply(v, x, train=True, mutable=["quant_stats", "batch_stats"])
    )
    for factor in (1.0, 2.0):
        y, updates = train(variables, factor * IMAGE)
        variables = {**variables, **updates}
        want, updates = model.apply(floats, factor * IMAGE, train=True, mutable=["batch_stats"])
        floats = {**floats, **updates}
        np.testing.assert_allclose(y, want, atol=2e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        variables["batch_stats"],
        floats["batch_stats"],
    )
    y, updates = qmodel.apply(variables, IMAGE, train=False, mutable=["quant_stats", "batch_stats"])
    want = model.apply(floats, IMAGE, train=False)
    np.testing.assert_allclose(y, want, atol=2e-3)
    np.testing.assert_allclose(
        qmodel.apply({**variables, **updates}, IMAGE, train=False), want, atol=2e-3
    )
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])


class Block(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x)))
        return x + nn.Dropout(self.rate, deterministic=not train)(nn.Conv(4, (1, 1))(x))


class Blocks(nn.Module):
    lift: staticmethod
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        cls = self.lift(Block)
        for i in range(2):
            x = cls(self.rate, name=f"block_{i}")(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize(
    ("lift", "rate"),  # nn.jit has random streams of its own
    [
        pytest.param(
            lambda cls: nn.remat(cls, static_argnums=(2,)), 0.5, marks=pytest.mark.versions
        ),
        (lambda cls: nn.jit(cls, static_argnums=(2,)), 0.0),
    ],
    ids=["remat", "jit"],
)
def test_remat_and_jit_change_no_number(lift, rate):
    results = []
    plain = sq.SimQAT().apply(Blocks(lambda cls: cls))
    variables = jax.jit(lambda: plain.init(RNGS, IMAGE, True))()
    for wrap in (lambda cls: cls, lift):
        qmodel = sq.SimQAT().apply(Blocks(wrap, rate))

        def loss(params, qmodel=qmodel):
            y, updates = qmodel.apply(
                {**variables, "params": params},
                IMAGE,
                True,
                rngs=RNGS,
                mutable=["quant_stats", "batch_stats"],
            )
            return jnp.sum(y**2), (y, updates)

        grads, (y, updates) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
        value = jax.jit(lambda v, q=qmodel: q.apply(v, IMAGE, False))({**variables, **updates})
        results.append((y, updates, grads, value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


def test_dropout_masks_are_those_of_the_float_model():
    """At the top, inside modules, and where a float model holds the quantized one."""

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(64)(x))
            return nn.Dropout(0.5, deterministic=False)(x), nn.Dropout(0.1)(x, deterministic=False)

    x = jax.random.normal(jax.random.key(4), (4, 8))
    for wrap in (lambda m: m, lambda m: nn.Sequential([m])):
        model, qmodel = wrap(Dropping()), wrap(sq.SimQAT().apply(Dropping()))
        variables = qmodel.init(RNGS, x)
        got, _ = qmodel.apply(variables, x, rngs=RNGS, mutable=["quant_stats"])
        want = model.apply({"params": variables["params"]}, x, rngs=RNGS)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a == 0, b == 0)


@pytest.mark.nightly
def test_checkpoint_and_shapes_over_the_whole():
    qmodel, variables, _ = observed(Blocks(lambda cls: cls), IMAGE, train=False)

    def loss(params, apply):
        return jnp.sum(apply({**variables, "params": params}, IMAGE, False) ** 2)

    plain, saved = (
        jax.jit(jax.grad(loss), static_argnums=1)(variables["params"], apply)
        for apply in (qmodel.apply, jax.checkpoint(qmodel.apply, static_argnums=(2,)))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, saved)
    shapes = jax.eval_shape(lambda: qmodel.init(RNGS, IMAGE, False))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(lambda s: s.shape, shapes)


def test_dropout_that_is_active_in_evaluation_scales_values_off_the_grid():
    class Sampled(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.3, deterministic=False)(nn.Dense(16)(x))
            return nn.Dense(8)(x)

    x = jax.random.normal(jax.random.key(0), (500, 4))
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    qmodel = sq.SimQAT().apply(Sampled())
    variables = qmodel.init(rngs, x)
    y, updates = qmodel.apply(variables, x, rngs=rngs, mutable=["quant_stats"])
    got = qmodel.apply({**variables, **updates}, x, rngs=rngs)
    np.testing.assert_allclose(got, y, atol=1e-6)
