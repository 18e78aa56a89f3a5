"""BatchNorm folding against the paper in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics import folding

pytestmark = pytest.mark.usefixtures("optimized")
EPSILON = 1e-5

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

    def quantize(kernel, factor):
        kernel = folding.scaled_kernel(kernel, factor)
        return sq.fake_quant(kernel, kernel.min(0), kernel.max(0), spec)

    got = folding.two_conv(
        folding.Layer(
            run=lambda kernel: jnp.asarray(x) @ kernel,
            kernel=jnp.asarray(w),
            bias=None,
            norm=norm,
            epsilon=EPSILON,
            quantize=quantize,
            moments=folding.Moments(),
            frozen=jnp.asarray(frozen),
        )
    )
    want = numpy_two_conv(x, w, gamma, beta, mean, var, frozen)
    np.testing.assert_allclose(got.output, want, rtol=2e-5, atol=2e-5)


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


def test_fold_batch_norm_rounds_every_operation():
    """By jit as one by one: what evaluation folds and what `convert` folds has the same bits."""
    rng = np.random.default_rng(2)
    kernel, bias = rng.normal(size=(3, 999)), rng.normal(size=999)
    gamma, beta, mean = rng.normal(size=(3, 999))
    var = rng.uniform(0.1, 2, size=999)
    arrays = [np.asarray(a, np.float32) for a in (kernel, bias, gamma, beta, mean, var)]
    kernel, bias, gamma, beta, mean, var = arrays
    slope = gamma / np.sqrt(var + np.float32(EPSILON))
    params, stats = {"scale": gamma, "bias": beta}, {"mean": mean, "var": var}
    fold = jax.jit(lambda *given: folding.fold_batch_norm(*given, EPSILON))
    for given, want in ((None, beta - mean * slope), (bias, (beta - mean * slope) + bias * slope)):
        got = fold(kernel, given, params, stats)
        np.testing.assert_array_equal(got[0], kernel * slope)
        np.testing.assert_array_equal(got[1], want)
    plain = folding.fold_batch_norm(kernel, None, {}, stats, EPSILON)
    np.testing.assert_allclose(plain[1], -mean / np.sqrt(var + np.float32(EPSILON)), rtol=1e-6)


# Training on any statistics ----------------------------------------------------------------------

LARGE = 0.1
GAMMA = np.array([1.3, -0.7, 0.0, 1e-15, -1e-15, -2.0], np.float32)


def layer(rng, **changes):
    """A dense layer on 40 rows with six channels, whose kernel is not rounded; and its input."""
    x, kernel = rng.normal(size=(40, 7)), rng.normal(size=(7, 6))
    beta, mean, bias = rng.normal(size=(3, 6)).astype(np.float32)
    values = {"bias": beta, "mean": mean, "var": rng.uniform(0.5, 2, 6).astype(np.float32)}
    values["scale"] = GAMMA
    x = jnp.asarray(x, jnp.float32)
    given = {
        "run": lambda kernel: x @ kernel,
        "kernel": jnp.asarray(kernel, jnp.float32),
        "bias": jnp.asarray(bias),
        "norm": folding.batch_norm_state(values, LARGE),
        "epsilon": LARGE,
        "quantize": folding.scaled_kernel,
        "moments": folding.Moments(),
    }
    return folding.Layer(**(given | changes)), x, values


@pytest.mark.parametrize("fold", [folding.one_conv, folding.two_conv])
@pytest.mark.parametrize("statistics", ["batch", "running", "frozen", "not frozen"])
@pytest.mark.parametrize("biased", [False, True])
def test_without_rounding_a_folded_layer_is_that_of_float(fold, statistics, biased):
    rng = np.random.default_rng(3)
    frozen = {"frozen": jnp.asarray(True), "not frozen": jnp.asarray(False)}.get(statistics)
    changes = {"frozen": frozen} | ({} if biased else {"bias": None})
    changes |= {"moments": None} if statistics == "running" else {}
    folded, x, values = layer(rng, **changes)
    y = np.asarray(x, np.float64) @ np.asarray(folded.kernel, np.float64)
    y = y + (0 if folded.bias is None else np.asarray(folded.bias, np.float64))
    mean, var = y.mean(0), y.var(0)
    got = fold(folded)
    if statistics == "running":
        assert got.mean is None and got.var is None
    else:
        np.testing.assert_allclose(got.mean, mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.var, var, rtol=1e-4)
    if statistics in ("running", "frozen"):
        mean, var = values["mean"], values["var"]
    want = (y - mean) / np.sqrt(var + LARGE) * GAMMA + values["bias"]
    np.testing.assert_allclose(got.output, want, rtol=1e-4, atol=1e-4)


def test_the_kernel_is_scaled_before_it_is_rounded():
    """By gamma / sigma, of a gamma that is zero or nearly by one that leaves numbers normal."""
    kernels = []

    def quantize(kernel, factor):
        kernels.append(folding.scaled_kernel(kernel, factor))
        return kernels[-1]

    folded, _, values = layer(np.random.default_rng(4), quantize=quantize)
    folding.one_conv(folded)
    sigma = np.sqrt(values["var"] + np.float32(LARGE))
    gamma = np.where(GAMMA == 0, 1, np.sign(GAMMA) * np.maximum(np.abs(GAMMA), sigma * 2.0**-40))
    np.testing.assert_allclose(kernels[0], np.asarray(folded.kernel) * (gamma / sigma), rtol=1e-6)
    left = folding.left_to_scale(folded.norm)
    np.testing.assert_allclose(left, GAMMA / gamma, rtol=1e-6)
    slopes = jax.grad(lambda g: folding.folding_scale(folded.norm._replace(gamma=g)).sum())(GAMMA)
    np.testing.assert_array_equal(slopes, 0)
    slopes = jax.grad(lambda g: folding.left_to_scale(folded.norm._replace(gamma=g)).sum())(GAMMA)
    np.testing.assert_allclose(slopes, 1 / gamma, rtol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_moments_of_all_devices_and_of_what_a_mask_keeps(fast):
    c = np.random.default_rng(5).normal(1, 2, size=(4, 10, 3, 6)).astype(np.float32)
    mask = np.random.default_rng(6).random((10, 3, 1)) < 0.6

    def moments(c, **given):
        return folding.Moments(fast_variance=fast, **given)(c)

    def wanted(values):
        return values.mean(0, dtype=np.float64), values.var(0, dtype=np.float64)

    got = moments(c[0], mask=mask)
    np.testing.assert_allclose(got, wanted(c[0][mask[..., 0]]), rtol=1e-4)
    got = moments(jnp.asarray(c[0], jnp.bfloat16))
    assert all(v.dtype == jnp.float32 for v in got)
    np.testing.assert_allclose(got, wanted(c[0].reshape(-1, 6)), rtol=2e-2, atol=1e-2)
    got = jax.vmap(lambda c: moments(c, axis_name="device"), axis_name="device")(c)
    want = wanted(c.reshape(-1, 6))
    for device in range(4):
        np.testing.assert_allclose([v[device] for v in got], want, rtol=1e-4)


def test_no_variance_is_below_zero():
    """Although the difference of two squares may be; deviations have more digits."""
    c = jnp.linspace(4096.0, 4097.0, 50)[None] * jnp.ones((64, 1))
    plain = jnp.mean(c * c, 0) - jnp.square(jnp.mean(c, 0))
    assert plain.min() < 0
    assert folding.Moments()(c)[1].min() == 0
    c = 4096 + jnp.linspace(0, 0.5, 64)[:, None]
    want = np.linspace(0, 0.5, 64).var()
    np.testing.assert_allclose(folding.Moments(fast_variance=False)(c)[1], want, rtol=1e-3)
    assert abs(folding.Moments()(c)[1] - want) > 0.1 * want


def test_fold_batch_norm_names_what_does_not_fit():
    stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"no 'var', only \['mean'\]"):
        sq.fold_batch_norm(jnp.ones((3, 4)), None, {}, {"mean": stats["mean"]}, 0.1)
    with pytest.raises(ValueError, match=r"'scale' has shape \(3,\).*4 output channels"):
        sq.fold_batch_norm(jnp.ones((3, 4)), None, {"scale": jnp.ones(3)}, stats, 0.1)


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
            quantize=folding.scaled_kernel,
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
        analysis = compiled.cost_analysis()
        assert analysis is not None
        return analysis["bytes accessed"]

    assert bytes_accessed(ours) <= 1.05 * bytes_accessed(plain)
