"""A small trained-looking model and data for it, quantized with few bits."""

from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

import simqat_jax as sq


class Small(nn.Module):
    """A convolution with BatchNorm, and a layer with a bias."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.reshape(len(x), -1))


class Calibrated(NamedTuple):
    """A model of 3-bit kernels and 16-bit activations, its float variables, its ranges, its data.

    Attributes:
      quiet: the keyword arguments of every call.
    """

    qmodel: sq.QuantizedModule
    floats: Any
    variables: Any
    x: np.ndarray
    quiet: dict[str, Any]


def few_bits(num_bits: int = 3, **config: Any) -> sq.SimQATConfig:
    """Kernels of few bits, and activations of so many that they are nearly exact."""
    weight = sq.QuantSpec(
        num_bits=num_bits, symmetric=True, per_channel=True, narrow_range=False, observer="batch"
    )
    return sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=16), **config)
