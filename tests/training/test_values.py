"""BatchNorm folding: each mode against the float network, and against the paper in NumPy."""

from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze

import simqat_jax as sq
from simqat_jax.numerics import affine

MODES = ("none", "one_conv", "two_conv")
MOST = ("none", "one_conv", pytest.param("two_conv", marks=pytest.mark.nightly))
"""For laws that do not tell modes apart."""
EPSILON = 1e-5


class Net(nn.Module):
    """Every shape of the pattern: grouped, depthwise, Dense, own bias, no scale, no bias."""

    @nn.compact
    def __call__(self, x, train=False):
        def norm(**kwargs):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, **kwargs)

        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        shortcut = x
        x = nn.relu6(norm(use_scale=False)(nn.Conv(8, (3, 3), feature_group_count=8)(x)))
        x = norm(use_bias=False)(nn.Conv(8, (1, 1), feature_group_count=2)(x))
        x = nn.relu(x + shortcut)
        x = x.mean(axis=(1, 2))
        return norm(use_fast_variance=False, epsilon=1e-3)(nn.Dense(6)(x))


def randomized(variables, seed=5):
    """Random parameters and statistics, with zero, negative and dead channels."""
    keys = iter(jax.random.split(jax.random.key(seed), 200))
    variables = unfreeze(variables)
    params, stats = variables["params"], variables["batch_stats"]
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), params)
    stats = jax.tree.map(lambda a: a + jax.random.uniform(next(keys), a.shape), stats)
    gamma = params["BatchNorm_0"]["scale"]
    params["BatchNorm_0"]["scale"] = gamma.at[0].set(0.0).at[1].set(-0.7)
    params["Conv_0"]["kernel"] = params["Conv_0"]["kernel"].at[..., 2].set(0.0)
    return {"params": params, "batch_stats": stats}


@pytest.fixture(scope="module")
def setup():
    model, x = Net(), jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    return model, randomized(model.init(jax.random.key(0), x)), x


def quantized(model, mode, floats, x, **config):
    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold=mode, **config)).apply(model)
    return qmodel, {**qmodel.init(jax.random.key(0), x), **floats}


def identity(x, scale, zero_point, bounds):
    del scale, zero_point, bounds
    return x


def train_step(model, variables, x):
    """Outputs, new statistics, and the gradient of every parameter."""
    mutable = [name for name in variables if name != "params"]

    def loss(params):
        y, updates = model.apply({**variables, "params": params}, x, train=True, mutable=mutable)
        return jnp.sum(jnp.sin(y) * jnp.arange(y.shape[-1], dtype=y.dtype).reshape(1, -1)), (
            y,
            updates,
        )

    grads, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return y, updates, grads


def assert_close(got, want, tolerance):
    """Equal to `tolerance` times the largest value of each array, and of all of them."""
    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        scale = max(float(jnp.abs(b).max()), 0.01 * largest)
        worst = float(jnp.abs(a - b).max())
        assert worst <= tolerance * scale, (jax.tree_util.keystr(path), worst, scale)


@pytest.mark.versions
@pytest.mark.parametrize("mode", MOST)
def test_without_rounding_training_equals_the_float_network(setup, mode):
    model, floats, x = setup
    qmodel, variables = quantized(model, mode, floats, x)
    want_y, want_updates, want_grads = train_step(model, floats, x)
    with mock.patch.object(affine, "_fake_quant", identity):
        y, updates, grads = train_step(qmodel, variables, x)
    # Means are ten times as far from float64 before jax 0.10.2 as they are since: the output of the
    # float network itself 4e-5 of its largest value, its gradients more.
    assert_close(y, want_y, 1e-4)
    assert_close(updates["batch_stats"], want_updates["batch_stats"], 1e-5)
    assert_close(grads, want_grads, 5e-4)


@pytest.mark.parametrize("mode", MODES)
def test_without_rounding_evaluation_equals_the_float_network(setup, mode):
    model, floats, x = setup
    qmodel, variables = quantized(model, mode, floats, x)
    with mock.patch.object(affine, "_fake_quant", identity):
        y, _ = qmodel.apply(variables, x, train=False, mutable=["quant_stats"])
    assert_close(y, model.apply(floats, x, train=False), 1e-5)


@pytest.mark.parametrize("mode", ["one_conv", "two_conv"])
def test_frozen_training_uses_and_keeps_running_statistics(setup, mode):
    model, floats, x = setup
    qmodel, variables = quantized(model, mode, floats, x, freeze_bn=1)
    traced = []

    @jax.jit
    def step(variables):
        traced.append(variables)
        return train_step(qmodel, variables, x)

    with mock.patch.object(affine, "_fake_quant", identity):
        _, first, _ = step(variables)
        variables = {**variables, **first}
        y, second, grads = step(variables)
    assert len(traced) == 1  # the switch is inside the compiled step
    before, after = floats["batch_stats"], first["batch_stats"]
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), before, after)))
    jax.tree.map(np.testing.assert_array_equal, second["batch_stats"], after)

    def frozen_loss(params):
        y = model.apply({"params": params, "batch_stats": after}, x, train=False)
        return jnp.sum(jnp.sin(y) * jnp.arange(6.0).reshape(1, -1)), y

    want_grads, want_y = jax.grad(frozen_loss, has_aux=True)(floats["params"])
    assert_close(y, want_y, 1e-5)
    assert_close(grads, want_grads, 1e-4)


def test_frozen_unfolded_batch_norm(setup):
    model, floats, x = setup
    qmodel, variables = quantized(model, "none", floats, x, freeze_bn=0)
    with mock.patch.object(affine, "_fake_quant", identity):
        y, updates, _ = train_step(qmodel, variables, x)
    assert_close(y, model.apply(floats, x, train=False), 1e-5)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], floats["batch_stats"])


# Folded evaluation -------------------------------------------------------------------------------


class Layer(nn.Module):
    """A convolution, with or without a BatchNorm behind it."""

    norm: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        return nn.relu(nn.BatchNorm(use_running_average=True)(x)) if self.norm else nn.relu(x)


@pytest.mark.parametrize("mode", ["one_conv", "two_conv"])
def test_evaluation_equals_that_of_the_network_folded_beforehand(mode):
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
    floats = unfreeze(Layer(True).init(jax.random.key(1), x))
    keys = iter(jax.random.split(jax.random.key(2), 10))
    floats = jax.tree.map(lambda a: a + jax.random.uniform(next(keys), a.shape), floats)
    params, stats = floats["params"], floats["batch_stats"]["BatchNorm_0"]
    params["BatchNorm_0"]["scale"] = params["BatchNorm_0"]["scale"].at[0].set(0.0).at[1].set(-1.0)
    qmodel, variables = quantized(Layer(True), mode, floats, x)
    _, observed = qmodel.apply(variables, x, mutable=["quant_stats"])
    kernel, bias = sq.fold_batch_norm(
        params["Conv_0"]["kernel"], params["Conv_0"]["bias"], params["BatchNorm_0"], stats, EPSILON
    )
    folded = {"params": {"Conv_0": {"kernel": kernel, "bias": bias}}}
    plain, plain_variables = quantized(Layer(False), mode, folded, x)
    got = qmodel.apply({**variables, **observed}, x)
    want = plain.apply({**plain_variables, **observed}, x)
    np.testing.assert_array_equal(got, want)


# Where folding applies ---------------------------------------------------------------------------


def test_statistics_that_cannot_be_are_refused():
    qmodel, variables = quantized(Net(), "one_conv", {}, jnp.ones((2, 8, 8, 3)))
    mutable = ["batch_stats", "quant_stats"]
    with pytest.raises(ValueError, match=r"BatchNorm_3: its batch holds one value per channel"):
        qmodel.apply(variables, jnp.ones((1, 8, 8, 3)), train=True, mutable=mutable)
    no_stats = {k: v for k, v in variables.items() if k != "batch_stats"}
    with pytest.raises(ValueError, match=r"BatchNorm_0: the variables hold no batch_stats"):
        qmodel.apply(no_stats, jnp.ones((2, 8, 8, 3)))


# Hard cases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_zero_gamma_trains_and_comes_alive(mode):
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3))(x)
            return nn.BatchNorm(use_running_average=not train, scale_init=nn.initializers.zeros)(x)

    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    target = jax.random.normal(jax.random.key(1), (8, 6, 6, 4))
    qmodel, variables = quantized(Branch(), mode, {}, x)
    mutable = ["batch_stats", "quant_stats"]

    @jax.jit
    def step(variables):
        def loss(params):
            y, updates = qmodel.apply(
                {**variables, "params": params}, x, train=True, mutable=mutable
            )
            return jnp.sum((y - target) ** 2), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, variables["params"], grads)
        return {**updates, "params": params}

    for _ in range(3):
        variables = step(variables)
    assert all(jax.tree.leaves(jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), variables)))
    assert (jnp.abs(variables["params"]["BatchNorm_0"]["scale"]) > 1e-4).all()


@pytest.mark.parametrize("mode", MOST)
def test_batch_statistics_over_a_named_axis(mode):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(4, (3, 3))(x)
            return nn.BatchNorm(use_running_average=not train, axis_name="batch")(x)

    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 3))
    model = Shared()
    floats = unfreeze(model.init(jax.random.key(1), x[0]))
    qmodel, variables = quantized(model, mode, floats, x[0])

    def apply(model, variables):
        mutable = [name for name in variables if name != "params"]

        def one(x):
            return model.apply(variables, x, train=True, mutable=mutable)

        return jax.vmap(one, axis_name="batch")(x)

    want_y, want = apply(model, floats)
    with mock.patch.object(affine, "_fake_quant", identity):
        y, updates = apply(qmodel, variables)
    assert_close(y, want_y, 1e-5)
    assert_close(updates["batch_stats"], want["batch_stats"], 1e-5)


@pytest.mark.parametrize("mode", MOST)
def test_bfloat16_compute_keeps_float32_statistics(mode):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x)
            x = nn.BatchNorm(use_running_average=not train, dtype=jnp.bfloat16)(x)
            return nn.relu(x)

    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    qmodel, variables = quantized(Half(), mode, {}, x)
    y, updates = qmodel.apply(variables, x, train=True, mutable=["batch_stats", "quant_stats"])
    assert y.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(updates["batch_stats"])} == {jnp.dtype("float32")}
    _, want = Half().apply(
        {k: variables[k] for k in ("params", "batch_stats")}, x, train=True, mutable=["batch_stats"]
    )
    assert_close(updates["batch_stats"], want["batch_stats"], 2e-2)
    trained = {**variables, **updates}
    eager, jitted = qmodel.apply(trained, x), jax.jit(qmodel.apply)(trained, x)
    np.testing.assert_array_equal(np.asarray(eager, np.float32), np.asarray(jitted, np.float32))


@pytest.mark.parametrize("mode", MOST)
def test_bfloat16_parameters(mode):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(6, (3, 3), param_dtype=jnp.bfloat16, bias_init=nn.initializers.ones)(x)
            return nn.relu(nn.BatchNorm(not train, momentum=0.5, param_dtype=jnp.bfloat16)(x))

    x = jax.random.normal(jax.random.key(0), (8, 6, 6, 3))
    model = Half()
    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold=mode)).apply(model)
    variables = qmodel.init(jax.random.key(0), x, train=True)

    @jax.jit
    def step(variables):
        mutable = ["batch_stats", "quant_stats"]
        y, updates = qmodel.apply(variables, x, train=True, mutable=mutable)
        return {**variables, **updates}, y

    y = None
    for _ in range(12):
        variables, y = step(variables)
    floats = {k: variables[k] for k in ("params", "batch_stats")}
    want, _ = model.apply(floats, x, train=True, mutable=["batch_stats"])
    assert_close(y, want, 0.05)
    assert_close(qmodel.apply(variables, x, train=False), want, 0.05)
