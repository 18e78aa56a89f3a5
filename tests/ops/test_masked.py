"""Masked codes, and means of them by counts, against NumPy's on integers."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.compound import CountedMean

X, Y = grid(0.05, 77), grid(0.031, 120)


def mean(x, m):
    words = m > 0
    return jnp.where(words[..., None], nn.Dense(3)(x), 0).sum(1) / words.sum(1, keepdims=True)


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_means_are_those_of_integers(backend):
    step = step_of(CountedMean, mean, (6, 5, 4), (6, 5))
    x, counts = random((6, 5, 3), X), np.arange(6)[:, None]
    x = x._replace(codes=jnp.where(np.arange(5)[:, None] < counts[..., None], x.codes, 0))
    got = codes_of(step, [x], Y, [jnp.asarray(counts)], backend=backend)
    divisor = np.float32(Y.scale) * np.maximum(counts, 1).astype(np.float32)
    sums = np.asarray(x.codes).sum(1) * (np.float32(X.scale) / divisor)
    want = np.where(counts > 0, np.clip(np.rint(sums) + 120, 0, 255) - 120, 0)
    np.testing.assert_array_equal(got, want)
    assert codes_of(step, [None], Y, [jnp.asarray(counts)], backend=backend) is None


def test_sums_that_float32_does_not_hold_have_no_codes():
    def body(x, m):
        words = m > 0
        kept = jnp.where(words[..., None], nn.Dense(1000)(x), 0)
        return kept.sum((1, 2))[:, None] / words.sum(1, keepdims=True)

    step = step_of(CountedMean, body, (1, 3000, 4), (1, 3000))
    x = random((1, 1, 1), X)
    x = x._replace(codes=jnp.broadcast_to(x.codes, (1, 3000, 1000)))
    assert codes_of(step, [x], Y, [jnp.ones((1, 1), int)]) is None
