"""Known numbers as a mask and a bias do to a softmax what they do when they are added."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simqat_jax.capture.biases import FAR, known_numbers
from simqat_jax.ir.graph import Constant

NOWHERE: Any = None
"""No graph: a constant needs none."""
LEVELS = st.sampled_from([0.0, -0.5, -3.0, 20.0, -100.0, -150.0, -1e4, -1e9, -np.inf])


def softmax(x, axes):
    x = np.float64(x)
    e = np.exp(x - x.max(axes, keepdims=True))
    return e / e.sum(axes, keepdims=True)


@given(
    levels=st.lists(LEVELS, min_size=24, max_size=24), axes=st.sampled_from([(2,), (1, 2), (0,)])
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("subtracted", [False, True])
def test_a_mask_and_a_bias_are_what_is_added(levels, axes, subtracted):
    values = np.reshape(np.float32(levels), (2, 3, 4))
    values[(slice(None),) * axes[0] + (0,)] = 1.0  # something counts in each row
    added = Constant(-values if subtracted else values)
    known = known_numbers(NOWHERE, added, axes, subtracted=subtracted)
    scores = np.random.default_rng(0).normal(size=values.shape)
    assert known is not None
    kept = np.ones(values.shape, bool) if known.kept is None else known.kept
    bias = np.zeros(values.shape) if known.bias is None else known.bias
    assert bias.min() >= -FAR and bias.max() <= 0
    got = softmax(np.where(kept, scores + bias, -np.inf), axes)
    np.testing.assert_allclose(got, softmax(scores + values, axes), atol=1e-6)


def test_numbers_that_are_no_bias_of_a_grid():
    for values in (np.arange(0, 200, 2.0), np.array([0.0, np.nan]), np.array([0.0, np.inf])):
        assert known_numbers(NOWHERE, Constant(values), (0,), subtracted=False) is None
    zeros = known_numbers(NOWHERE, Constant(np.full((3, 4), -5.0)), (1,), subtracted=False)
    assert zeros == (None, None)


def test_nothing_counts_beside_numbers_that_leave_scores_no_digits():
    lowest = np.array([[0.0, 1.0], [-1e9, -1e9 + 1e3]])
    known = known_numbers(NOWHERE, Constant(lowest), (1,), subtracted=False)
    assert known is not None and known.kept is not None
    np.testing.assert_array_equal(known.kept, [[True, True], [False, False]])
    far = Constant(np.array([[0.0, 1.0], [-1e4, -1e4 + 1]]))
    whole = known_numbers(NOWHERE, far, (1,), subtracted=False)
    half = known_numbers(NOWHERE, far, (1,), subtracted=False, dtype=jnp.bfloat16)
    assert whole is not None and whole.kept is None
    assert half is not None and half.kept is not None
    np.testing.assert_array_equal(half.kept, [[True, True], [False, False]])
