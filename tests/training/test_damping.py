"""Oscillation damping against the paper's formula, and what it does to weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.spec import ObserverName
from simqat_jax.training.damping import distance


class Net(nn.Module):
    """A convolution that a BatchNorm is folded into, and a product inside `nn.remat`."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = nn.BatchNorm(use_running_average=not train, epsilon=0.0)
        x = nn.relu(norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        return nn.remat(nn.Dense)(3)(x.mean((1, 2)))


def damped(
    num_bits: int,
    observer: ObserverName,
    *,
    per_channel: bool = False,
    narrow_range: bool = False,
) -> sq.QuantSpec:
    """Return a spec of kernels."""
    return sq.QuantSpec.weight(
        num_bits=num_bits, observer=observer, per_channel=per_channel, narrow_range=narrow_range
    )


def expected(w: np.ndarray, end: np.ndarray, num_bits: int, *, narrow: bool) -> float:
    """Return the formula in double precision, for a range from -end to end."""
    highest = 2 ** (num_bits - 1) - 1
    lowest = -highest if narrow else -highest - 1
    scale = np.float64(end) / highest
    rounded = np.clip(np.rint(w / scale), lowest, highest) * scale
    return float(np.sum((np.clip(w, lowest * scale, highest * scale) - rounded) ** 2))


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_the_formula(narrow, per_channel):
    w = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    end = np.float32([0.5, 1, 2]) if per_channel else np.float32(1)  # some values lie outside
    spec = damped(3, "mse", per_channel=per_channel, narrow_range=narrow)
    got, gradient = jax.value_and_grad(distance)(jnp.asarray(w), -end, end, spec)
    assert got == pytest.approx(expected(w, end, 3, narrow=narrow), rel=1e-5)
    scale = end / 3
    codes = w / scale
    outside = (codes > 3) | (codes < (-3 if narrow else -4))
    assert outside.any()
    off = np.where(outside, 0, 2 * (w - np.rint(codes) * scale))
    np.testing.assert_allclose(gradient, off, atol=1e-5)


@pytest.mark.parametrize("bn_fold", ["none", "one_conv", "two_conv"])
def test_of_a_model(bn_fold):
    """Kernels count as they are quantized, whatever the mode of the call."""
    config = sq.SimQATConfig(weight=damped(3, "batch", per_channel=True), bn_fold=bn_fold)
    qmodel, x = sq.SimQAT(config).apply(Net()), jnp.ones((2, 6, 6, 2))
    variables = dict(qmodel.init(jax.random.key(0), x))
    factor = np.float32([1, 2, 4, 0.5])
    variables["params"]["BatchNorm_0"]["scale"] = jnp.asarray(factor)
    kernel = np.asarray(variables["params"]["Conv_0"]["kernel"]).reshape(-1, 4)
    dense = np.asarray(variables["params"]["CheckpointDense_0"]["kernel"])
    kernel = kernel if bn_fold == "none" else kernel * factor
    of_layers = [expected(w, np.abs(w).max(0), 3, narrow=False) for w in (kernel, dense)]
    compiled = jax.jit(sq.oscillation_damping, static_argnums=0, static_argnames="train")
    for train in (False, True):
        got = compiled(qmodel, variables, x, train=train)
        assert got == pytest.approx(sum(of_layers), rel=1e-5)


def test_nothing_else_is_computed():
    config = sq.SimQATConfig(weight=damped(3, "batch", per_channel=True))
    qmodel, x = sq.SimQAT(config).apply(Net()), jnp.ones((2, 6, 6, 2))
    variables = qmodel.init(jax.random.key(0), x)
    compiled = jax.jit(lambda v: sq.oscillation_damping(qmodel, v, x)).lower(variables).compile()
    text = compiled.as_text()
    assert text is not None and "convolution" not in text


@pytest.mark.parametrize("observer", ["mse", "learned"])
def test_remembered_ranges(observer):
    """Those that the variables hold count; before they are known, nothing."""
    config = sq.SimQATConfig(weight=damped(3, observer))
    qmodel, x = sq.SimQAT(config).apply(nn.Dense(3)), jnp.ones((2, 4))
    variables = qmodel.init(jax.random.key(0), x)
    damping, gradient = jax.value_and_grad(
        lambda p: sq.oscillation_damping(qmodel, {**variables, "params": p}, x)
    )(variables["params"])
    assert damping == 0
    assert not np.any(gradient["kernel"])
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats", "quant_params"])
    known: Any = updates["quant_stats"]["kernel"]
    end = np.maximum(-np.asarray(known.lo), known.hi)
    kernel = np.asarray(variables["params"]["kernel"])
    for times in (1, 2):  # whatever the kernel is by now
        moved = {"params": {**variables["params"], "kernel": jnp.asarray(times * kernel)}}
        got = sq.oscillation_damping(qmodel, {**variables, **updates, **moved}, x)
        wanted = expected(times * kernel, end, 3, narrow=False)
        assert got == pytest.approx(wanted, rel=1e-4)


def test_weights_come_to_their_codes():
    """The gradient draws every weight to the code that it is rounded to, and to no other."""
    config = sq.SimQATConfig(weight=damped(3, "mse", per_channel=True))
    qmodel, x = sq.SimQAT(config).apply(nn.Dense(8)), jnp.ones((2, 16))
    variables = dict(qmodel.init(jax.random.key(0), x))
    variables |= qmodel.apply(variables, x, mutable=["quant_stats"])[1]
    damping = jax.jit(lambda p: sq.oscillation_damping(qmodel, {**variables, "params": p}, x))
    params = variables["params"]
    known: Any = variables["quant_stats"]["kernel"]
    step = jnp.maximum(-known.lo, known.hi)[None] / 3
    before = np.clip(np.rint(params["kernel"] / step), -4, 3)
    for _ in range(30):
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, jax.grad(damping)(params))
    np.testing.assert_allclose(np.clip(params["kernel"] / step, -4, 3), before, atol=1e-4)


def test_what_is_no_model():
    with pytest.raises(TypeError, match="qmodule"):
        sq.oscillation_damping(nn.Dense(3), {}, jnp.ones((1, 2)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="variables"):
        sq.oscillation_damping(sq.SimQAT().apply(nn.Dense(3)), None, jnp.ones((1, 2)))  # pyright: ignore[reportArgumentType]
