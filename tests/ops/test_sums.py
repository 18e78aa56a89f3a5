"""Sums and means of codes, against NumPy's on integers."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.graph import Mean

X, Y = grid(0.05, 77), grid(0.031, 120)


def wanted(sums, divisor):
    multiplier = np.float32(X.scale) / np.float32(np.float32(Y.scale) * np.float32(divisor))
    codes = np.rint(sums.astype(np.float32) * multiplier.astype(np.float32))
    return np.clip(codes + Y.zero_point, 0, 255) - Y.zero_point


@pytest.mark.parametrize(
    ("body", "divisor"),
    [
        (lambda x: x.mean((1, 2)), 30),
        (lambda x: x.sum((1, 2)), 1),
        (lambda x: x.sum((1, 2)) / 7.0, 7),
        (lambda x: x.mean(2), 5),
    ],
)
def test_sums_along_axes(body, divisor):
    step = step_of(Mean, lambda x: body(nn.Dense(3)(x)), (2, 6, 5, 4))
    x = random((2, 6, 5, 3), X)
    axes = tuple((step.node.parts[0] if step.node.parts else step.node).eqn.params["axes"])
    sums = np.asarray(x.codes, int).sum(axes)
    np.testing.assert_array_equal(codes_of(step, [x], Y), wanted(sums, divisor))


@pytest.mark.parametrize("counted", [True, False])
def test_sums_of_windows(counted):
    """Where padding does not count, each has a divisor of its own."""

    def body(x):
        given = {"padding": "SAME", "count_include_pad": counted}
        return nn.avg_pool(nn.Dense(3)(x), (3, 3), (2, 2), **given)

    step, x = step_of(Mean, body, (2, 6, 5, 4)), random((2, 6, 5, 3), X)
    padded = np.zeros((2, 7, 7, 3), int)
    padded[:, :6, 1:6] = np.asarray(x.codes, int)
    inside = np.zeros((7, 7), int)
    inside[:6, 1:6] = 1
    spots = [(slice(i, i + 3), slice(j, j + 3)) for i in (0, 2, 4) for j in (0, 2, 4)]
    sums = np.stack([padded[:, i, j].sum((1, 2)) for i, j in spots], 1).reshape(2, 3, 3, 3)
    counts = np.array([9 if counted else inside[spot].sum() for spot in spots])
    others = [] if counted else [jnp.asarray(counts.reshape(1, 3, 3, 1), jnp.float32)]
    got = codes_of(step, [x], Y, others)
    np.testing.assert_array_equal(got, wanted(sums, counts.reshape(1, 3, 3, 1)))


def test_sums_that_int32_does_not_hold_have_no_codes():
    step = step_of(Mean, lambda x: nn.Dense(3)(x).sum(1), (1, 40000, 4))
    wide = grid(0.05, 77, 16)
    for length, fits in ((2**15, True), (2**15 + 1, False)):
        assert (codes_of(step, [random((1, length, 3), wide)], Y) is not None) == fits
    assert codes_of(step, [None], Y) is None
