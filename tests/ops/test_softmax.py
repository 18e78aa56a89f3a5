"""A softmax of codes is that of real numbers, where its sums are exact; else there is none."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.compound import LogSoftmax, Softmax
from simqat_jax.numerics import softmax

Y = grid(1 / 256, 0)
LEAST = softmax.FARTHEST * 2.0**-22
CAUSAL = np.tril(np.ones((1, 4, 4), bool))


@functools.cache
def plain(length):
    return step_of(Softmax, lambda x: nn.softmax(nn.Dense(length)(x))[..., :3], (2, 4))


@functools.cache
def masked(keeps):
    mask = jnp.asarray(keeps == CAUSAL)

    def body(x):
        scores = nn.Dense(4)(x)
        return nn.softmax(jnp.where(mask, *((scores, -1e9) if keeps else (-1e9, scores))))

    return step_of(Softmax, body, (2, 4, 5))


@pytest.mark.parametrize("keeps", [True, False])
def test_what_is_masked_has_no_share(keeps):
    step, x = masked(keeps), random((2, 4, 4), grid(0.05, 120))
    assert step.node.masked and step.node.keeps == keeps
    got = codes_of(step, [x], Y, [jnp.asarray(keeps == CAUSAL)])
    real = np.where(CAUSAL, np.asarray(x.codes) * x.grid.scale, -np.inf)
    np.testing.assert_allclose(got, np.clip(256 * jax.nn.softmax(real, -1), 0, 255), atol=0.51)


def test_a_scale_too_small_for_a_mask_shows():
    step, mask = masked(True), jnp.asarray(CAUSAL)
    for factor, finite in ((1.0, True), (0.999, False)):
        x = random((2, 4, 4), grid(factor * LEAST, 120))
        assert np.isfinite(codes_of(step, [x], Y, [mask])).all() == finite


@pytest.mark.parametrize("scale", [LEAST, 0.0013, 0.7])
def test_what_masks_is_a_whole_number_below_every_code(scale):
    lowest = float(softmax.lowest(scale))
    assert lowest == np.rint(lowest) and -lowest <= 2**24
    assert (lowest + 255) * scale <= -softmax.FARTHEST


def test_codes_and_terms_for_which_sums_are_exact():
    step, many = plain(6), plain(softmax.MOST_TERMS + 1)
    assert softmax.unit(softmax.MOST_TERMS) == 2**10  # each share has ten bits
    eight, nine = (grid(0.05, 100, bits) for bits in (8, 9))
    assert codes_of(step, [random((2, 6), eight)], Y) is not None
    assert codes_of(step, [random((2, 6), nine)], Y) is None
    assert codes_of(step, [None], Y) is None
    fits = codes_of(many, [random((1, softmax.MOST_TERMS), eight)], Y)
    assert fits is not None
    assert codes_of(many, [random((1, softmax.MOST_TERMS + 1), eight)], Y) is None
    np.testing.assert_array_equal(codes_of(plain(1), [random((3, 1), eight)], Y), 255)


@functools.cache
def masked_logarithm():
    mask = jnp.asarray(CAUSAL)
    return step_of(
        LogSoftmax, lambda x: nn.log_softmax(jnp.where(mask, nn.Dense(4)(x), -1e9)), (2, 4, 5)
    )


@pytest.mark.parametrize("scale", [0.001, 0.05, 3.0])
def test_what_is_masked_has_the_lowest_code_of_a_logarithm(scale):
    """However far the range reaches, and where nothing is masked it is the logarithm."""
    y, x = grid(scale, 255), random((2, 4, 4), grid(0.05, 120))
    got = np.asarray(codes_of(masked_logarithm(), [x], y, [jnp.asarray(CAUSAL)]))
    real = np.where(CAUSAL, np.asarray(x.codes) * x.grid.scale, -np.inf)
    want = np.where(CAUSAL, jax.nn.log_softmax(real, -1) / scale, -np.inf)
    np.testing.assert_allclose(got, np.clip(want, -255, 0), atol=0.501)


def test_a_grid_too_wide_for_a_mask_shows():
    x, mask = random((2, 4, 4), grid(0.05, 120)), jnp.asarray(CAUSAL)
    most = 0.05 * 2.0**22 / 256
    for scale, finite in ((0.999 * most, True), (1.001 * most, False)):
        got = codes_of(masked_logarithm(), [x], grid(scale, 255), [mask])
        assert np.isfinite(got).all() == finite
