"""Equalization: channels of one range, and the same float function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq


class Chain(nn.Module):
    """All that may stand between two layers of a pair; `act` behind the first ones."""

    act: object = nn.relu

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = self.act(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6)(x)
        x = self.act(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Conv(8, (1, 1))(x)
        x = self.act(nn.max_pool(x, (2, 2), (2, 2)))
        x = self.act(nn.Dense(12)(x.reshape(len(x), -1)))
        return nn.Dense(5)(x)


class Residual(nn.Module):
    """What two read cannot be scaled for one of them."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(4)(x))
        return y + nn.Dense(4)(y)


X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)


def unequal(model, x):
    """Initialize, with channels of very different scale."""
    rng = np.random.default_rng(1)

    def scaled(a):
        return np.asarray(a) * np.exp(rng.normal(size=a.shape[-1])).astype(np.float32)

    return jax.tree.map(scaled, model.init(jax.random.key(0), x))


def test_the_float_function_stays():
    model, variables = Chain(), unequal(Chain(), X)
    got = sq.equalize(sq.SimQAT().apply(model), variables, X[:1], train=False)
    want = model.apply(variables, X)
    np.testing.assert_allclose(model.apply(got, X), want, atol=1e-5 * float(jnp.abs(want).max()))
    kept = {"Conv_0/kernel"}
    for (path, old), new in zip(
        jax.tree.leaves_with_path(variables["params"]), jax.tree.leaves(got["params"]), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # The first kernel stays, for its BatchNorm is scaled; so does the last bias.
        assert np.array_equal(old, new) == (name in kept | {"Dense_1/bias"} or not np.any(old))


def test_both_sides_of_a_pair_have_one_range():
    model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), X[:1, 0, 0]
    variables = unequal(model, x)
    got = sq.equalize(sq.SimQAT().apply(model), variables, x)["params"]
    first = np.abs(got["layers_0"]["kernel"]).max(axis=0)
    np.testing.assert_allclose(first, np.abs(got["layers_2"]["kernel"]).max(axis=1), rtol=1e-6)


def test_one_range_per_tensor_gains():
    weight = sq.QuantSpec(
        num_bits=8, symmetric=True, per_channel=False, narrow_range=False, observer="batch"
    )
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=16))
    model, variables = Chain(), unequal(Chain(), X)
    qmodel, want = sq.SimQAT(config).apply(model), np.asarray(model.apply(variables, X))

    def error(given):
        calibrated = sq.calibrate(qmodel, given, [X], progress=False, train=False)
        return np.mean((np.asarray(qmodel.apply(calibrated, X, train=False)) - want) ** 2)

    assert error(sq.equalize(qmodel, variables, X[:1], train=False)) < error(variables) / 2


def test_ranges_are_left_out():
    qmodel = sq.SimQAT().apply(nn.Sequential([nn.Dense(4), nn.Dense(2)]))
    variables = qmodel.init(jax.random.key(0), X[0])
    assert set(sq.equalize(qmodel, variables, X[0])) == {"params"}


@pytest.mark.parametrize(
    "model",
    [nn.Dense(3), Residual(), nn.Sequential([nn.Dense(4), nn.relu6, nn.Dense(2)])],
    ids=["one layer", "two readers", "relu6"],
)
def test_models_without_pairs_are_refused(model):
    x = X[0, 0]
    qmodel = sq.SimQAT().apply(model)
    with pytest.raises(ValueError, match="equalize: no two layers of this model"):
        sq.equalize(qmodel, model.init(jax.random.key(0), x), x)


def test_batch_norm_without_scale_is_no_pair():
    norm = nn.BatchNorm(use_running_average=True, use_scale=False)
    model = nn.Sequential([nn.Dense(4), norm, nn.Dense(2)])
    with pytest.raises(ValueError, match="equalize: no two layers"):
        sq.equalize(sq.SimQAT().apply(model), model.init(jax.random.key(0), X[0]), X[0])
