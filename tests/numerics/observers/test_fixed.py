"""A known range: what the spec says, whatever the values are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS


@pytest.mark.parametrize("channels", [None, 3])
def test_the_range_is_the_specs(channels):
    spec = sq.QuantSpec(observer="fixed", range=(-1, 2.5))
    fixed = OBSERVERS["fixed"](spec, channels)
    for role in ("activation", "weight", "constant"):
        assert not fixed.keeps_state(role)
    for ends in (fixed.known_range, fixed.present_range(jnp.array([7.0, jnp.nan]))):
        assert ends is not None
        np.testing.assert_array_equal(ends[0], np.full(channels or (), -1, np.float32))
        np.testing.assert_array_equal(ends[1], np.full(channels or (), 2.5, np.float32))


def test_images_have_codes_of_their_bytes():
    fixed = OBSERVERS["fixed"](sq.QuantSpec(observer="fixed", range=(0.0, 1.0)))
    grid = sq.quant_params(*fixed.present_range(jnp.zeros(3)), sq.QuantSpec())
    codes = sq.quantize(np.arange(256, dtype=np.float32) / 255, *grid, sq.QuantSpec())
    np.testing.assert_array_equal(codes, np.arange(256))


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ((1.0, 0.0), ValueError),
        ((0.0, 0.0), ValueError),
        ((0.0, float("inf")), ValueError),
        ((float("nan"), 1.0), ValueError),
        ((0.0, 1e39), ValueError),
        ((0.0,), ValueError),
        ((0.0, 1.0, 2.0), ValueError),
        ([0.0, 1.0], TypeError),
        ((False, True), TypeError),
        (("0", "1"), TypeError),
        (1.0, TypeError),
    ],
)
def test_what_is_no_range_is_refused(ends, error):
    with pytest.raises(error, match=r"QuantSpec\.range"):
        sq.QuantSpec(observer="fixed", range=ends)


def test_a_range_and_its_observer_need_each_other():
    with pytest.raises(ValueError, match=r"QuantSpec\.range must be given"):
        sq.QuantSpec(observer="fixed")
    with pytest.raises(ValueError, match="takes ranges from data"):
        sq.QuantSpec(range=(0.0, 1.0))
    spec = sq.QuantSpec(observer="fixed", range=(0.0, 1.0))
    assert dataclasses.replace(spec, observer="batch").range == (0.0, 1.0)
