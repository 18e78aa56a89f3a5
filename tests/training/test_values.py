"""BatchNorm folding: each mode against the float network, and against the paper in NumPy."""

import functools
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import unfreeze

import simqat_jax as sq
from simqat_jax.numerics import affine, folding

MODES = ("none", "one_conv", "two_conv")
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


@pytest.mark.parametrize("mode", MODES)
def test_without_rounding_training_equals_the_float_network(setup, mode):
    model, floats, x = setup
    qmodel, variables = quantized(model, mode, floats, x)
    want_y, want_updates, want_grads = train_step(model, floats, x)
    with mock.patch.object(affine, "_fake_quant", identity):
        y, updates, grads = train_step(qmodel, variables, x)
    assert_close(y, want_y, 1e-5)
    assert_close(updates["batch_stats"], want_updates["batch_stats"], 1e-5)
    assert_close(grads, want_grads, 1e-4)


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
    step = jax.jit(lambda v: train_step(qmodel, v, x))
    with mock.patch.object(affine, "_fake_quant", identity):
        _, first, _ = step(variables)
        variables = {**variables, **first}
        y, second, grads = step(variables)
    assert step._cache_size() == 1  # the switch is inside the compiled step
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


# Krishnamoorthi, arXiv:1806.08342, section 3.2.2, in NumPy ---------------------------------------


def numpy_fake_quant(w):
    """Per channel, 8 bits, symmetric, narrow."""
    scale = np.abs(w).max(axis=0) / np.float32(127)
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(np.rint(w / scale), -127, 127) * scale


def numpy_two_conv(x, w, gamma, beta, mean, var, frozen):
    """A dense layer: figure 7 (before freezing) and figure 8 (after)."""
    sigma = np.sqrt(var + np.float32(EPSILON))
    y = x @ w
    batch_mean, batch_sigma = y.mean(0), np.sqrt(y.var(0) + np.float32(EPSILON))
    corrected = numpy_fake_quant(w * gamma / sigma)
    if frozen:
        return x @ corrected + beta - gamma * mean / sigma
    return (x @ corrected) * (sigma / batch_sigma) + beta - gamma * batch_mean / batch_sigma


@pytest.mark.parametrize("frozen", [False, True])
def test_two_conv_equals_the_paper(frozen):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 7)), rng.normal(size=(7, 5))
    gamma, beta, mean = rng.normal(size=(3, 5))
    var = rng.uniform(0.5, 2, size=5)
    arrays = [np.asarray(a, np.float32) for a in (x, w, gamma, beta, mean, var)]
    x, w, gamma, beta, mean, var = arrays
    norm = folding.batch_norm_state(
        {"scale": gamma, "bias": beta, "mean": mean, "var": var}, EPSILON
    )
    spec = sq.QuantSpec(symmetric=True, per_channel=True, narrow_range=True)
    got = folding.two_conv(
        folding.Layer(
            run=lambda kernel: jnp.asarray(x) @ kernel,
            kernel=jnp.asarray(w),
            bias=None,
            norm=norm,
            epsilon=EPSILON,
            quantize=lambda kernel: sq.fake_quant(kernel, kernel.min(0), kernel.max(0), spec),
            moments=folding.Moments(),
            frozen=jnp.asarray(frozen),
        )
    )
    want = numpy_two_conv(x, w, gamma, beta, mean, var, frozen)
    np.testing.assert_allclose(got.output, want, rtol=2e-5, atol=2e-5)


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


def test_fold_batch_norm_is_the_composition():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3)).astype(np.float32)
    kernel, bias = rng.normal(size=(3, 4)), rng.normal(size=4)
    params = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}
    stats = {"mean": rng.normal(size=4), "var": rng.uniform(0.1, 2, size=4)}
    folded = sq.fold_batch_norm(kernel, bias, params, stats, 0.1)
    folded_kernel, folded_bias = map(np.asarray, folded)
    y = x @ kernel + bias
    want = (y - stats["mean"]) / np.sqrt(stats["var"] + 0.1) * params["scale"] + params["bias"]
    np.testing.assert_allclose(x @ folded_kernel + folded_bias, want, rtol=1e-5, atol=1e-5)


def test_fold_batch_norm_names_what_does_not_fit():
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"no 'var', only \['mean'\]"):
        sq.fold_batch_norm(jnp.ones((3, 4)), None, {}, {"mean": stats["mean"]}, 0.1)
    with pytest.raises(ValueError, match=r"'scale' has shape \(3,\).*4 output channels"):
        sq.fold_batch_norm(jnp.ones((3, 4)), None, {"scale": jnp.ones(3)}, stats, 0.1)


# Where folding applies ---------------------------------------------------------------------------


def rows(body, x, **kwargs):
    """The plan of a model made of a function."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(x)

    qmodel = sq.SimQAT(sq.SimQATConfig(**kwargs)).apply(Model())
    variables = qmodel.init(jax.random.key(0), x)
    plan = qmodel.plan(variables, x)
    return qmodel, variables, {row.path: row for row in plan.rows}


def norm(**kwargs):
    return nn.BatchNorm(use_running_average=True, **kwargs)


IMAGES = jax.random.normal(jax.random.key(8), (4, 6, 6, 3))


def evaluated(qmodel, variables, x):
    """Quantized evaluation against the float network, relative to its largest output."""
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    got = qmodel.apply({**variables, **updates}, x)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    want = qmodel.module.apply(floats, x)
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def test_a_convolution_that_something_else_reads_is_not_folded():
    def body(x):
        x = nn.Conv(4, (3, 3))(x)
        return norm()(x) + x

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["BatchNorm_0"].note == "on its own: a 1x1 depthwise convolution"
    assert plan["Conv_0"].note == "" and plan["Conv_0"].output.name == "Conv_0/output"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_pre_activation_keeps_its_batch_norm_as_a_layer():
    def body(x):
        x = nn.Conv(4, (3, 3), name="first")(x)
        y = nn.relu(norm(name="norm")(x))
        return x + nn.Conv(4, (3, 3), name="second")(y)

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["norm"].op.endswith("+ relu") and plan["norm"].output.name == "norm/output"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_dense_and_partial_and_shared_names_are_folded():
    make = functools.partial(nn.BatchNorm, use_running_average=True, use_scale=False)

    def body(x):
        x = nn.relu(make(name="a")(nn.Conv(4, (1, 1), name="b")(x)))
        return make()(nn.Dense(3)(x.mean(axis=(1, 2))))

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["b"].note == plan["Dense_0"].note == "BatchNorm folded: one_conv"
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_a_batch_norm_that_no_integer_operation_feeds_stays_float():
    qmodel, variables, plan = rows(lambda x: nn.Conv(2, (3, 3))(norm()(x)), IMAGES)
    assert plan["BatchNorm_0"].note.startswith("float")
    assert set(variables["quant_stats"]) == {"BatchNorm_0/output", "Conv_0/output", "step"}
    assert evaluated(qmodel, variables, IMAGES) < 0.03


def test_residual_adds_have_one_quantizer_on_each_tensor():
    def body(x):
        x = nn.relu(norm()(nn.Conv(4, (3, 3))(x)))
        return nn.relu(norm()(nn.Conv(4, (3, 3))(x)) + x)

    _, variables, plan = rows(body, IMAGES)
    assert set(variables["quant_stats"]) == {
        "input",
        "Conv_0/output",
        "Conv_1/output",
        "add/output",
        "step",
    }
    assert plan["add"].op == "add + relu"


def test_feature_axis_that_is_not_the_last_is_refused():
    def body(x):
        return norm(axis=1)(nn.Conv(6, (3, 3))(x))

    with pytest.raises(ValueError, match=r"BatchNorm_0: the feature axis [\s\S]*exclude"):
        rows(body, IMAGES)
    rows(body, IMAGES, strict=False)
    rows(body, IMAGES, exclude=("BatchNorm_0",))


@pytest.mark.parametrize("axis", [(-1,), (3,), (2, 3)])
def test_feature_axes_as_a_tuple(axis):
    def body(x):
        return norm(axis=axis)(nn.Conv(6, (3, 3))(x))

    plan = rows(body, IMAGES, strict=False)[2]
    assert ("BatchNorm_0" in plan) == (len(axis) == 2)  # not folded, and float
    assert "BatchNorm_0" not in plan or "not the last" in plan["BatchNorm_0"].note


def test_a_dense_with_several_axes_of_features_is_not_folded():
    def body(x):
        return norm()(nn.DenseGeneral((2, 3))(x))

    qmodel, variables, plan = rows(body, IMAGES)
    assert plan["DenseGeneral_0"].output and plan["BatchNorm_0"].output
    assert evaluated(qmodel, variables, IMAGES) < 0.05


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


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("mode", MODES)
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


@pytest.mark.parametrize("mode", MODES)
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
    for _ in range(12):
        y, updates = qmodel.apply(variables, x, train=True, mutable=["batch_stats", "quant_stats"])
        variables = {**variables, **updates}
    floats = {k: variables[k] for k in ("params", "batch_stats")}
    want, _ = model.apply(floats, x, train=True, mutable=["batch_stats"])
    assert_close(y, want, 0.05)
    assert_close(qmodel.apply(variables, x, train=False), want, 0.05)


def test_one_conv_reads_and_writes_less_than_dividing_the_output():
    """`c / s` as a tensor would be one more pass over the layer's output."""
    kernel = jnp.ones((3, 3, 3, 16))
    x = jnp.ones((8, 32, 32, 3))
    values = {"mean": jnp.zeros(16), "var": jnp.ones(16)}

    def conv(kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dims)

    def ours(kernel, values):
        norm = folding.batch_norm_state(values, EPSILON)
        layer = folding.Layer(
            run=conv,
            kernel=kernel,
            bias=None,
            norm=norm,
            epsilon=EPSILON,
            quantize=lambda w: w,
            moments=folding.Moments(),
        )
        return folding.one_conv(layer).output

    def plain(kernel, values):
        del values
        y = conv(kernel)
        mean = y.mean((0, 1, 2), keepdims=True)
        var = (y * y).mean((0, 1, 2), keepdims=True) - mean * mean
        return (y - mean) * jax.lax.rsqrt(var + EPSILON)

    def bytes_accessed(function: Any) -> float:
        compiled = jax.jit(function).lower(kernel, values).compile()
        return compiled.cost_analysis()["bytes accessed"]

    assert bytes_accessed(ours) <= 1.05 * bytes_accessed(plain)
