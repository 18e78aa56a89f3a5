"""BatchNorm on integers is the float model's, with scales of both signs and of zero."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from zoo import Model

import simqat_jax as sq

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
