"""Adaptive rounding: one of the two codes next to each weight, and no layer gets worse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq


def kernels(model: sq.IntegerModel) -> list[dict[str, np.ndarray]]:
    return [dict(op.arrays) for op in model.ops if "kernel" in op.arrays]


@pytest.mark.parametrize("per_channel", [True, False])
def test_no_channel_is_worse_than_nearest(per_channel):
    """Of one layer, with NumPy: its input has 16 bits, so that it is as good as real."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 12)) @ rng.normal(size=(12, 12))).astype(np.float32)
    weight = sq.QuantSpec(
        num_bits=3, symmetric=True, per_channel=per_channel, narrow_range=False, observer="batch"
    )
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=16))
    qmodel = sq.SimQAT(config).apply(nn.Dense(6))
    floats: Any = nn.Dense(6).init(jax.random.key(1), x)
    variables = sq.calibrate(qmodel, floats, [x], progress=False)
    rounded = sq.round_adaptively(qmodel, variables, [x], progress=False)
    w, new = (np.asarray(v["params"]["kernel"], np.float64) for v in (floats, rounded))
    axis = 0 if per_channel else None
    scale = np.abs(w).max(axis=axis) / 3
    np.testing.assert_array_equal(np.abs(new).max(axis=axis), np.abs(w).max(axis=axis))
    nearest, chosen = np.rint(w / scale), np.rint(new / scale)
    assert np.all(np.abs(chosen - w / scale) < 1 + 1e-6)

    def errors(codes):
        return np.sum((x @ (codes * scale - w)) ** 2, axis=0)

    assert np.all(errors(chosen) <= errors(nearest) * (1 + 1e-4))
    assert errors(chosen).sum() < 0.75 * errors(nearest).sum()


def test_kernels_survive_conversion_on_the_grids_of_before(small):
    rounded = sq.round_adaptively(small.qmodel, small.variables, [small.x], **small.quiet)
    given = small.variables, rounded
    models = [sq.convert(small.qmodel, v, small.x, train=False) for v in given]
    for before, after in zip(*map(kernels, models), strict=True):
        np.testing.assert_array_equal(before["scale"], after["scale"])
        moved = np.abs(after["kernel"].astype(int) - before["kernel"])
        assert moved.max() == 1
    got = small.qmodel.apply(rounded, small.x, train=False)
    np.testing.assert_array_equal(models[1](small.x), got)


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
