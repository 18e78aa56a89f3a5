"""Adaptive rounding: one of the two codes next to each weight, and no layer gets worse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import Small, few_bits

import simqat_jax as sq


def kernels(model: sq.IntegerModel) -> list[dict[str, np.ndarray]]:
    return [dict(op.arrays) for op in model.ops if "kernel" in op.arrays]


@pytest.mark.parametrize("per_channel", [True, False])
def test_no_channel_is_worse_than_nearest(per_channel):
    """Of one layer, with NumPy: its input has 16 bits, so that it is as good as real."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    weight = sq.QuantSpec(num_bits=3, symmetric=True, per_channel=per_channel, observer="batch")
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=16))
    qmodel = sq.SimQAT(config).apply(nn.Dense(6))
    floats: Any = nn.Dense(6).init(jax.random.key(1), x)
    variables = sq.calibrate(qmodel, floats, [x], progress=False)
    rounded = sq.round_adaptively(qmodel, variables, [x[:40], x[40:]], progress=False)
    (before,), (after,) = (kernels(sq.convert(qmodel, v, x)) for v in (variables, rounded))
    np.testing.assert_array_equal(before["scale"], after["scale"])
    w = np.asarray(floats["params"]["kernel"], np.float64)
    real = w / before["scale"]
    assert np.all(np.abs(after["kernel"] - real) < 1 + 1e-5)

    def errors(codes):
        return np.sum((x @ (codes * before["scale"] - w)) ** 2, axis=0)

    nearest, chosen = errors(before["kernel"]), errors(after["kernel"])
    assert np.all(chosen <= nearest * (1 + 1e-4))
    assert chosen.sum() < nearest.sum() / 2


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
def test_kernels_survive_conversion_on_the_grids_of_before(small, fold):
    qmodel = sq.SimQAT(few_bits(bn_fold=fold)).apply(Small())
    variables = sq.calibrate(qmodel, small.floats, [small.x], **small.quiet)
    rounded = sq.round_adaptively(qmodel, variables, [small.x], **small.quiet)
    models = [sq.convert(qmodel, v, small.x, train=False) for v in (variables, rounded)]
    for before, after in zip(*map(kernels, models), strict=True):
        np.testing.assert_array_equal(before["scale"], after["scale"])
        moved = np.abs(after["kernel"].astype(int) - before["kernel"])
        assert moved.max() == 1
    got = qmodel.apply(rounded, small.x, train=False)
    np.testing.assert_array_equal(models[1](small.x), got)
    again = sq.round_adaptively(qmodel, rounded, [small.x], **small.quiet)
    third = kernels(sq.convert(qmodel, again, small.x, train=False))
    for a, b in zip(kernels(models[1]), third, strict=True):
        np.testing.assert_array_equal(a["kernel"], b["kernel"])


def test_the_model_comes_closer(small):
    want = Small().apply(small.floats, small.x)

    def error(variables):
        return np.mean((small.qmodel.apply(variables, small.x, train=False) - want) ** 2)

    data = [small.x]
    rounded = sq.round_adaptively(small.qmodel, small.variables, data, **small.quiet)
    towards = {"reference": small.floats, **small.quiet}
    both = sq.correct_bias(small.qmodel, rounded, data, **towards)
    alone = sq.correct_bias(small.qmodel, small.variables, data, **small.quiet)
    assert error(rounded) < error(small.variables) / 2
    assert error(both) < error(alone) / 2


def test_a_model_without_free_kernels_is_refused():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (3, 3))
            return nn.relu(x @ w) @ w.T

    x = jnp.ones((2, 3))
    qmodel = sq.SimQAT().apply(Tied())
    variables = sq.calibrate(qmodel, Tied().init(jax.random.key(0), x), [x], progress=False)
    with pytest.raises(ValueError, match="no quantized kernel of this model is a parameter"):
        sq.round_adaptively(qmodel, variables, [x], progress=False)
