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
        analysis = compiled.cost_analysis()
        assert analysis is not None
        return analysis["bytes accessed"]

    assert bytes_accessed(ours) <= 1.05 * bytes_accessed(plain)
