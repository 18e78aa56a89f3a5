"""Training on a few images without labels brings the quantized network back to its teacher."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

pytest.importorskip("tyro", reason="the experiments' packages are not installed")

import simqat_jax as sq
from experiments.distillation import distil


class Network(nn.Module):
    """A small classifier."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(5)(x.reshape(x.shape[0], -1))


def test_training_without_labels_nears_the_teacher_and_moves_parameters_alone():
    x = np.random.default_rng(0).normal(size=(32, 6, 6, 2)).astype(np.float32)
    floats = Network().init(jax.random.key(0), x)
    config = sq.SimQATConfig(weight=sq.QuantSpec(num_bits=2, symmetric=True, per_channel=True))
    qmodel, variables = sq.post_training_quantize(
        Network(), floats, [x], config=config, progress=False
    )
    teacher = functools.partial(Network().apply, floats)
    losses = []
    trained = distil(
        qmodel,
        variables,
        teacher,
        x,
        steps=60,
        rate=3e-3,
        progress=lambda _, loss: losses.append(loss),
    )
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < np.mean(losses[:3]) / 2
    for old, new in zip(
        jax.tree.leaves({**variables, "params": {}}),
        jax.tree.leaves({**trained, "params": {}}),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    again = distil(qmodel, variables, teacher, x, steps=60, rate=3e-3)
    jax.tree.map(np.testing.assert_array_equal, trained, again)
