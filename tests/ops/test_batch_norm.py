"""BatchNorm on integers is the float model's, with scales of both signs and of zero."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.graph import BatchNorm
from simqat_jax.numerics.folding import scaled_kernel
from simqat_jax.numerics.grid import KernelCodes
from simqat_jax.ops.batch_norm import folded

RNG = np.random.default_rng(0)
GAMMA = np.array([1.2, -0.9, 0.0, -1.4, 0.3, -0.05], np.float32)


def norm(x):
    return nn.BatchNorm(use_running_average=True)(x)


def behind_a_convolution(x):
    return norm(nn.Conv(6, (3, 3))(x))


def behind_a_dense_layer(x):
    return nn.relu(norm(nn.Dense(6)(x)))


def alone(x):
    y = nn.Conv(6, (1, 1))(x)
    return y + nn.relu(norm(y))


def variables_of(model, x):
    """With scales of both signs and of zero, and statistics that matter."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    values = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), shapes)
    values["params"]["BatchNorm_0"]["scale"] = GAMMA
    values["batch_stats"]["BatchNorm_0"]["var"] = RNG.uniform(0.3, 3, 6).astype(np.float32)
    return values


@pytest.mark.parametrize("body", [behind_a_convolution, behind_a_dense_layer, alone])
@pytest.mark.parametrize("bn_fold", ["none", "one_conv", "two_conv"])
def test_scales_of_both_signs(body, bn_fold):
    """Each channel by itself, in evaluation and in the integer model."""
    model, x = Model(body), RNG.normal(size=(4, 5, 5, 6)).astype(np.float32)
    variables = variables_of(model, x)
    want = np.asarray(model.apply(variables, x))
    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold=bn_fold)).apply(model)
    observe = jax.jit(lambda v, x: qmodel.apply(v, x, mutable=["quant_stats"]))
    trained, updates = observe(variables, x)
    observed = {**variables, **updates}
    step = float(np.ptp(want)) / 255
    evaluated = jax.jit(qmodel.apply)(observed, x)
    for got in (trained, evaluated, sq.convert(qmodel, observed, x)(x)):
        error = np.abs(np.asarray(got) - want).max(axis=(0, 1, 2))
        assert (error < 8 * step).all(), error / step


def on_a_grid_of_its_own(kernel, factor):
    """Symmetric codes of each channel."""
    kernel = scaled_kernel(kernel, factor)
    scale = jnp.abs(kernel).max(0) / 127
    grid = sq.Grid(scale, jnp.zeros(scale.shape, int), -127, 127)
    return KernelCodes(jnp.round(kernel / scale[None]), grid, scale == 0)


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_folded_kernel_is_the_scaled_one(fold, biased):
    """Of a channel whose gamma is zero nothing is left but its shift."""
    rng = np.random.default_rng(1)
    gamma = np.array([*GAMMA, 1e-15, -1e-15], np.float32)
    kernel, count = jnp.asarray(rng.normal(size=(7, 8)), jnp.float32), gamma.size
    beta, mean, bias = rng.normal(size=(3, count)).astype(np.float32)
    var = rng.uniform(0.3, 3, count).astype(np.float32)
    values = {"scale": gamma, "bias": beta, "mean": mean, "var": var}
    values = {name: jnp.asarray(v) for name, v in values.items()}
    given = jnp.asarray(bias) if biased else None
    codes, shift = folded(values, 1e-3, kernel, given, on_a_grid_of_its_own, fold)
    scale = np.asarray(codes.grid.scale)
    assert (scale > 0).all()
    slope = gamma / np.sqrt(var + 1e-3)
    real = np.asarray(codes.codes) * scale
    np.testing.assert_array_equal(real[:, gamma == 0], 0)
    np.testing.assert_array_equal(codes.dead, gamma == 0)
    others = gamma != 0
    error = np.abs(real - kernel * slope[None])
    assert (error <= 0.501 * scale)[:, others].all()
    assert (np.abs(codes.codes).max(0) == 127)[others].all()
    want = beta - mean * slope + (bias * slope if biased else 0)
    np.testing.assert_allclose(shift, want, rtol=1e-5, atol=1e-6)


def beside(x):
    y = nn.Dense(6)(x)
    return y + norm(y)


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_a_batch_norm_alone_is_that_of_real_numbers(backend):
    step = step_of(BatchNorm, beside, (2, 4))
    x, y = grid(0.05, 120), grid(0.06, 131)
    rng = np.random.default_rng(2)
    beta, mean = rng.normal(size=(2, 6)).astype(np.float32)
    var = rng.uniform(0.3, 3, 6).astype(np.float32)
    values = {"scale": GAMMA, "bias": beta, "mean": mean, "var": var}
    codes = random((200, 6), x)
    layers = [{name: jnp.asarray(v) for name, v in values.items()}]
    real = (np.asarray(codes.codes) * x.scale - mean) / np.sqrt(var + 1e-5) * GAMMA + beta
    got = codes_of(step, [codes], y, list(layers[0].values()), backend, layers=layers)
    np.testing.assert_allclose(got, np.clip(real / y.scale + 131, 0, 255) - 131, atol=0.51)
    assert codes_of(step, [None], y, layers=layers) is None
