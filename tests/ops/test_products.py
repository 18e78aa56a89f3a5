"""Layers on codes, against NumPy's integers."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, placed, random, step_of

import simqat_jax as sq
from simqat_jax.ir.graph import Product
from simqat_jax.numerics.exact_sums import MOST
from simqat_jax.numerics.grid import Codes, KernelCodes
from simqat_jax.ops.products import kernel_codes

X, Y = grid(0.05, 120), grid(0.11, 131)
RNG = np.random.default_rng(0)
KERNEL = RNG.integers(-127, 128, (6, 5))
BIAS = RNG.normal(0, 2, 5).astype(np.float32)
SCALE = RNG.uniform(0.001, 0.02, 5).astype(np.float32)


def quantized(codes, scale=SCALE, bits=8):
    """Quantizes any kernel to these codes."""
    most = 2 ** (bits - 1) - 1
    on = sq.Grid(jnp.asarray(scale), jnp.zeros(np.shape(scale), int), -most, most)

    def quantize(kernel, factor):
        dead = (np.reshape(codes, (-1, np.size(scale))) == 0).all(0)
        return KernelCodes(jnp.asarray(codes, jnp.float32).reshape(kernel.shape), on, dead)

    return quantize


def wanted(sums, bias, x, y, scale=SCALE):
    """Of exact sums, channels last."""
    unit = np.float32(x.scale) * scale
    whole = sums + (0 if bias is None else np.rint(bias / unit).astype(int))
    codes = np.rint(whole.astype(np.float32) * (unit / np.float32(y.scale)))
    return np.clip(codes + y.zero_point, 0, 255) - y.zero_point


def layers(shape, bias):
    return [{"kernel": jnp.zeros(shape)} | ({} if bias is None else {"bias": jnp.asarray(bias)})]


def dense(x):
    return nn.relu(nn.Dense(5)(x))


def narrow(x):
    return nn.Dense(3)(x)


@pytest.mark.parametrize("bias", [BIAS, None])
def test_dense_layers(bias):
    step, x = step_of(Product, dense, (40, 6)), random((40, 6), X)
    given = {"layers": layers((6, 5), bias), "quantize_kernel": quantized(KERNEL)}
    got = codes_of(step, [x], Y, **given)
    want = np.maximum(wanted(np.asarray(x.codes, int) @ KERNEL, bias, X, Y), 0)
    np.testing.assert_array_equal(got, want)
    assert codes_of(step, [None], Y, **given) is None


@pytest.mark.parametrize("training", [False, True])
def test_a_batch_norm_behind_is_folded_in(training):
    """Unless its statistics are those of the batch."""

    def body(x):
        return nn.BatchNorm(use_running_average=not training)(nn.Dense(5)(x))

    step, x = step_of(Product, body, (40, 6)), random((40, 6), X)
    gamma, var = RNG.uniform(0.5, 2, (2, 5)).astype(np.float32)
    norm = {"scale": gamma, "bias": BIAS[::-1], "mean": np.zeros(5, np.float32), "var": var}
    of_norm = {name: jnp.asarray(v) for name, v in norm.items()}
    given = {"layers": [*layers((6, 5), BIAS), of_norm], "quantize_kernel": quantized(KERNEL)}
    got = codes_of(step, [x], Y, **given)
    if training:
        assert got is None
        return
    bias = (BIAS[::-1] + BIAS * gamma / np.sqrt(var + np.float32(1e-5))).astype(np.float32)
    np.testing.assert_array_equal(got, wanted(np.asarray(x.codes, int) @ KERNEL, bias, X, Y))


def test_channels_of_several_axes():
    def body(x):
        return nn.DenseGeneral((5, 2), axis=-1)(x).sum(-1)

    step, x = step_of(Product, body, (40, 6)), random((40, 6), X)
    kernel = RNG.integers(-127, 128, (6, 10))
    bias, scale = (np.concatenate([v, v[::-1]]) for v in (BIAS, SCALE))
    given = {"layers": layers((6, 5, 2), bias.reshape(5, 2))}
    got = codes_of(step, [x], Y, **given, quantize_kernel=quantized(kernel, scale))
    want = wanted(np.asarray(x.codes, int) @ kernel, bias, X, Y, scale)
    np.testing.assert_array_equal(got, want.reshape(40, 5, 2))


def test_convolutions_pad_with_the_zero_point():
    def body(x):
        return nn.Conv(5, (3,), padding=((2, 1),), strides=2)(x)

    step, x = step_of(Product, body, (3, 7, 2)), random((3, 7, 2), X)
    given = {"layers": layers((3, 2, 5), BIAS), "quantize_kernel": quantized(KERNEL)}
    padded = np.zeros((3, 10, 2), int)
    padded[:, 2:9] = np.asarray(x.codes, int)
    windows = np.stack([padded[:, k : k + 3].reshape(3, 6) for k in (0, 2, 4, 6)], 1)
    want = wanted(windows @ KERNEL, BIAS, X, Y)
    np.testing.assert_array_equal(codes_of(step, [x], Y, **given), want)


@pytest.mark.parametrize(("bias", "held"), [(0, [True, False, True]), (10, [False, False, True])])
def test_sums_that_int32_does_not_hold_show(bias, held):
    """In their channels alone; a bias counts as well."""
    wide, unit = grid(2.0**-20, 0, 16), 2.0**-30
    step, x = (
        step_of(Product, narrow, (1, 1)),
        Codes(jnp.full((1, 1), 65535.0), wide),
    )
    edge = MOST // 65535
    quantize = quantized([[edge - 9, -edge - 9, 1]], np.full(3, 2.0**-10, np.float32), 16)
    given = layers((1, 3), np.array([65535 * bias * unit, 0, 0], np.float32))
    got = codes_of(step, [x], grid(2.0**-8, 7), quantize_kernel=quantize, layers=given)
    np.testing.assert_array_equal(np.isfinite(np.asarray(got)[0]), held)


def test_a_kernel_has_a_range_for_each_channel_or_a_given_one():
    plan = placed(lambda x: nn.Conv(5, (3,))(x), (2, 7, 2))
    quantizer = next(iter(plan.weights.values()))
    kernel = jnp.asarray(RNG.normal(size=(3, 2, 5)), jnp.float32)
    present = kernel_codes(quantizer, 5, None, kernel)
    ends = np.abs(kernel).max((0, 1))
    np.testing.assert_allclose(present.grid.scale, ends / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(present.codes).max((0, 1)), 127)
    ends = jnp.full(5, -10.0), jnp.full(5, 10.0)
    fixed = kernel_codes(quantizer, 5, ends, kernel)
    np.testing.assert_allclose(fixed.grid.scale, np.full(5, 10 / 127), rtol=1e-6)
    np.testing.assert_allclose(fixed.codes, kernel * 12.7, atol=0.501)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_a_kernel_is_quantized_as_if_its_factors_were_in_it(per_channel, known):
    """Also where products are rounded; and channels without a code but 0 are told."""
    plan = placed(lambda x: nn.Conv(64, (3,))(x), (2, 7, 2))
    quantizer = next(iter(plan.weights.values()))
    if not per_channel:
        spec = dataclasses.replace(quantizer.spec, per_channel=False)
        quantizer = dataclasses.replace(quantizer, spec=spec, num_channels=None)
    kernel = jnp.asarray(RNG.normal(size=(3, 2, 64)), jnp.float32).at[..., 7].set(0)
    factor = jnp.asarray(np.exp(RNG.normal(size=64)) * RNG.choice([-1, 1], 64), jnp.float32)
    factor = factor.at[9].set(1e-9)
    end = jnp.full(64 if per_channel else (), 1e-3)
    quantize = partial(kernel_codes, quantizer, 64, (-end, end) if known else None)

    @jax.jit
    def fused(kernel, factor):
        got = quantize(kernel, factor)
        return got.codes, got.grid.scale, got.dead

    codes, scale, dead = fused(kernel, factor)
    want = quantize(kernel * factor[None, None])
    np.testing.assert_array_equal(codes, want.codes)
    np.testing.assert_array_equal(scale, want.grid.scale)
    np.testing.assert_array_equal(dead, (np.asarray(want.codes) == 0).all((0, 1)))
    assert dead[7] and dead[9] == (known or not per_channel)
