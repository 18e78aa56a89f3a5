"""A model whose figures NumPy computes by itself, analyzed once."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import pytest

import simqat_jax as sq


class TwoLayers(nn.Module):
    """Two dense layers with a ReLU between them."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.relu(nn.Dense(6, name="first")(x)))


class Analyzed(NamedTuple):
    """A model of 4-bit kernels and activations, calibrated on half of its data.

    Attributes:
      batches: two, of different sizes; the second one reaches beyond what was calibrated on.
    """

    qmodel: sq.QuantizedModule
    floats: Any
    variables: Any
    batches: list[np.ndarray]
    analysis: sq.Analysis


@pytest.fixture(scope="session")
def analyzed() -> Analyzed:
    rng = np.random.default_rng(5)
    batches = [rng.normal(size=(n, 5)).astype(np.float32) * k for n, k in ((16, 1), (8, 2))]
    weight = sq.QuantSpec(num_bits=4, symmetric=True, per_channel=True, observer="batch")
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=4))
    qmodel = sq.SimQAT(config).apply(TwoLayers())
    floats: Any = TwoLayers().init(jax.random.key(1), batches[0])
    variables = sq.calibrate(qmodel, floats, batches[:1], progress=False)
    analysis = sq.analyze(qmodel, variables, batches, progress=False)
    return Analyzed(qmodel, floats, variables, batches, analysis)
