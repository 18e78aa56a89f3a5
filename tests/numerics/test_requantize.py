"""From sums to codes, against NumPy: biases, multipliers, clamps, room for biases."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics import requantize

RNG = np.random.default_rng(0)


def f32(*values):
    return jnp.asarray(values, jnp.float32)


def test_a_bias_is_rounded_to_its_unit_halves_to_even():
    unit = f32(0.25, 0.25, 0.5, 0.5, 0.25, 3.0)
    bias = f32(0.3, -0.3, 0.75, 1.25, -1.0, 10.0)
    got = requantize.integer_bias(bias, unit)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [1, -1, 2, 2, -4, 3])


def test_a_bias_stays_half_of_int32_away_from_its_ends():
    got = requantize.integer_bias(f32(1e30, -1e30, 2.0**30, 2.0**30 - 64), f32(1, 1, 1, 1))
    np.testing.assert_array_equal(got, [2**30, -(2**30), 2**30, 2**30 - 64])


def test_sums_are_scaled_with_one_rounding_and_halves_to_even():
    acc = jnp.asarray([5, 7, -5, -7, 6, 1000, -(2**26) - 3], jnp.int32)
    got = requantize.scaled(acc, np.float32(0.5))
    want = [2, 4, -2, -4, 3, 500, np.rint(np.float32(-(2**26) - 3) * np.float32(0.5))]
    np.testing.assert_array_equal(got, want)


GRIDS = [sq.Grid(0.5, 3, 0, 255), sq.Grid(0.25, -4, -128, 127), sq.Grid(0.1, 0, 0, 15)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bounds", [requantize.FREE, (0.0, math.inf), (0.0, 6.0), (-0.7, 0.9)])
def test_clamping_whole_numbers_is_clamping_real_values(grid, bounds):
    """To the codes that are nearest to the bounds, halves to even."""
    codes = [
        limit if math.isinf(b) else round(Fraction(b) / Fraction(grid.scale)) + grid.zero_point
        for b, limit in zip(bounds, (grid.qmin, grid.qmax), strict=True)
    ]
    lo, hi = np.clip(codes, grid.qmin, grid.qmax)
    assert [int(c) for c in requantize.code_bounds(bounds, grid)] == [lo, hi]
    centered = np.arange(-600, 600, dtype=np.float32)
    got = requantize.clamped(jnp.asarray(centered), grid, bounds)
    want = np.clip(centered + grid.zero_point, lo, hi) - grid.zero_point
    np.testing.assert_array_equal(got, want)


def dead(codes):
    return (codes == 0).all(0)


def test_a_channel_with_room_for_its_bias_stays_as_it_is():
    codes = jnp.asarray(RNG.integers(-127, 128, (5, 4)), jnp.float32)
    scale, bias = f32(0.1, 1e-3, 2.0, 0.5), f32(3.0, -1.0, 0.0, 1e5)
    got, scales = requantize.room_for_bias(codes, dead(codes), scale, bias, jnp.float32(0.02))
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(scales, scale)


def test_a_bias_at_the_end_of_its_room_needs_no_more():
    """2^29 units of bias are held, one digit of weights is lost for twice as many."""
    x_scale, bias = jnp.float32(0.5), f32(2.0**10, -(2.0**10), 2.0**10)
    least = 2.0**10 / 0.5 / 2.0**29
    scale = f32(least, least / 2, least * 2)
    codes = f32([7, 7, 7], [-5, -6, -5])
    got, scales = requantize.room_for_bias(codes, dead(codes), scale, bias, x_scale)
    np.testing.assert_array_equal(scales, [least, least, 2 * least])
    np.testing.assert_array_equal(got, [[7, 4, 7], [-5, -3, -5]])  # 3.5 to even
    held = np.abs(requantize.integer_bias(bias, scales * x_scale))
    np.testing.assert_array_equal(held, [2**29, 2**29, 2**28])


def test_a_channel_of_zeros_has_the_scale_of_its_bias():
    """Coarse enough for the bias, fine enough for 23 digits of it; without a bias as it was."""
    codes = f32([0, 0, 0, 1], [0, 0, 0, 0])
    bias, x_scale = f32(3.0, -3.0, 0.0, 3.0), jnp.float32(0.25)
    got, scales = requantize.room_for_bias(codes, dead(codes), f32(1, 1, 1, 1), bias, x_scale)
    np.testing.assert_array_equal(scales, [12 * 2.0**-23, 12 * 2.0**-23, 1, 1])
    np.testing.assert_array_equal(got, codes)
    held = requantize.integer_bias(bias, scales * x_scale)
    np.testing.assert_array_equal(held, [2**23, -(2**23), 0, 12])


def test_no_scale_is_subnormal():
    given = f32([0], [0]), jnp.array([True]), f32(1), f32(1e-35), jnp.float32(1)
    _, scales = requantize.room_for_bias(*given)
    np.testing.assert_array_equal(scales, f32(1e-30))


def test_an_affine_of_channels_has_127_for_every_slope():
    slope, shift = f32(0.5, -2.0, 0.0, 1e-12), f32(1.0, 1.0, 0.0, 100.0)
    weights, scales = requantize.channel_affine(slope, shift, jnp.float32(0.1))
    np.testing.assert_array_equal(weights[:3], [127, -127, 0])
    np.testing.assert_array_equal(
        scales[:3], [np.float32(0.5) / np.float32(127), np.float32(2) / np.float32(127), 1]
    )
    weight, scale = requantize.channel_affine(f32(1.0), f32(0.0), jnp.float32(0.1))
    np.testing.assert_array_equal([*weight, *scale], [127, np.float32(1) / np.float32(127)])
    assert weights[3] == 0  # far below what the bias leaves room for
    assert abs(int(requantize.integer_bias(shift, scales * 0.1)[3])) <= 2**29 + 64


def test_the_multiplier_of_a_mean_has_two_roundings():
    x_scale, y_scale, count = np.float32(0.1), np.float32(0.03), np.float32(49)
    got = requantize.mean_multiplier(x_scale, y_scale, count)
    assert got == x_scale / np.float32(y_scale * count)
    assert got.dtype == jnp.float32
