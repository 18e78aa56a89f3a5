"""Exact sums against NumPy's int64."""

from itertools import product

import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics import exact_sums
from simqat_jax.numerics.contraction import byte_sums, partial_sums
from simqat_jax.numerics.grid import Codes


def grid(bits, signed=False):
    """Of all codes of a width, with the zero point at its lowest one."""
    if signed:
        return sq.Grid(1.0, 0, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    return sq.Grid(1.0, 0, 0, 2**bits - 1)


def as_int32(sums):
    """Modulo 2^32."""
    return np.asarray(sums).astype(np.uint64).astype(np.uint32).view(np.int32)


def pieces(x, w, parts):
    """Parts of what is summed, int64."""
    split = [np.array_split(np.asarray(v, np.int64), parts, a) for v, a in ((x, 1), (w, 0))]
    return zip(*split, strict=True)


def matmul(sums, x, w, how):
    """Sums in float32, each rounded once, or in bytes."""
    if sums is byte_sums:
        return [jnp.asarray(as_int32(np.asarray(x, np.int64) @ np.asarray(w, np.int64)))]
    parts = how
    return [jnp.asarray((a @ b).astype(np.float32)) for a, b in pieces(x, w, parts)]


def strict_matmul(sums, x, w, how):
    """As `matmul`; an error where an addition on the way may round."""
    assert all((np.abs(a) @ np.abs(b)).max() <= 2**24 for a, b in pieces(x, w, how))
    return matmul(sums, x, w, how)


CASES = list(product((4, 8, 16), (2, 8, 16), (1, 3, 64, 600, 5000)))


@pytest.mark.parametrize("x_bits, w_bits, fan_in", CASES)
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_sums_of_products_are_exact(x_bits, w_bits, fan_in, extreme, in_parts):
    rng = np.random.default_rng(fan_in)
    x_grid, w_grid = grid(x_bits), grid(w_bits, signed=True)
    x = rng.integers(0, x_grid.qmax, (2, fan_in), endpoint=True)
    w = rng.integers(w_grid.qmin, w_grid.qmax, (fan_in, 3), endpoint=True)
    if extreme:
        x, w = np.full_like(x, x_grid.qmax), np.full_like(w, w_grid.qmin)
    codes = (Codes(jnp.asarray(a, jnp.float32), g) for a, g in ((x, x_grid), (w, w_grid)))
    largest = x_grid.qmax * fan_in * 2 ** (w_bits - 1)
    got = exact_sums.linear(matmul, *codes, fan_in, fan_in if in_parts else 1)
    assert got is not None
    sums, rounded = got
    np.testing.assert_array_equal(sums, as_int32(x @ w))
    assert (rounded is None) == (largest < 2**30)
    if rounded is not None:
        np.testing.assert_allclose(rounded, x @ w, rtol=1e-6)


@pytest.mark.parametrize("x_bits, w_bits, fan_in", CASES)
@pytest.mark.parametrize("in_parts", [False, True])
def test_no_partial_sum_rounds(x_bits, w_bits, fan_in, in_parts):
    """Of the parts or digits with which sums below 2^30 are computed, at their largest."""
    x_grid, w_grid = grid(x_bits), grid(w_bits, signed=True)
    if x_grid.qmax * fan_in * 2 ** (w_bits - 1) >= 2**30:
        pytest.skip("also computes the rounded sums, which do round")
    for x in (x_grid.qmax, 2 ** (x_bits - 1)):
        for w in (w_grid.qmin, w_grid.qmax, -1):
            exact_sums.linear(
                strict_matmul,
                Codes(jnp.full((1, fan_in), x, jnp.float32), x_grid),
                Codes(jnp.full((fan_in, 1), w, jnp.float32), w_grid),
                fan_in,
                fan_in if in_parts else 1,
            )


def test_few_products_take_one_pass_over_the_layer():
    calls = []

    def layer(sums, x, w, how):
        calls.append(how if sums is partial_sums else "bytes")
        return matmul(sums, x, w, how)

    def passes(x_bits, w_bits, fan_in, summed=1, channels=1):
        calls.clear()
        x, w = jnp.ones((1, fan_in)), jnp.ones((fan_in, channels))
        grids = grid(x_bits), grid(w_bits, signed=True)
        exact_sums.linear(layer, Codes(x, grids[0]), Codes(w, grids[1]), fan_in, summed)
        return list(calls)

    assert passes(8, 8, 9) == passes(8, 8, 514) == [1]  # 255 * 514 * 128 is just below 2^24
    assert passes(8, 8, 515) == passes(8, 8, 576) == [1, 1]
    assert 2 <= len(passes(16, 8, 9)) <= 4
    assert passes(8, 8, 515, 515) == passes(8, 8, 576, 64) == [2]  # windows of 9: 57 channels
    assert passes(8, 8, 4608, 512) == [9]
    assert passes(8, 8, 49 * 64, 64) == [7]
    assert passes(8, 8, 121 * 64, 64) == [1, 1, 1]  # four channels are too few for a part
    assert len(passes(16, 8, 9, 9)) > 1
    assert passes(8, 8, 4608, channels=64) == passes(8, 4, 256, channels=64) == ["bytes"]
    assert "bytes" not in [*passes(8, 8, 255, channels=64), *passes(8, 8, 4608, channels=63)]
    assert "bytes" not in [*passes(16, 8, 4608, channels=64), *passes(8, 16, 512, channels=64)]
    assert passes(8, 8, 2**16, channels=64) == [1, "bytes"]  # and rounded: int32 may overflow


def test_more_products_than_one_bit_allows_are_refused():
    x = Codes(jnp.zeros((1, 1)), grid(8))
    w = Codes(jnp.zeros((1, 1)), grid(8, signed=True))
    assert exact_sums.linear(matmul, x, w, 2**22) is not None
    assert exact_sums.linear(matmul, x, w, 2**22 + 1) is None


@pytest.mark.parametrize("bits, count", list(product((4, 8, 16), (1, 49, 4096, 32768))))
def test_sums_are_exact(bits, count):
    codes = np.random.default_rng(count).integers(0, 2**bits, (2, count))
    codes[1] = 2**bits - 1
    assert exact_sums.sum_fits(count, 2**bits - 1) == (count * (2**bits - 1) < 2**31)
    if count * (2**bits - 1) >= 2**31:
        return

    def sums(x):
        exact = np.asarray(x, np.int64).sum(axis=1)
        assert np.abs(np.asarray(x, np.int64)).sum(axis=1).max() <= 2**24
        return jnp.asarray(exact.astype(np.float32))

    got = exact_sums.exact_sum(sums, Codes(jnp.asarray(codes, jnp.float32), grid(bits)), count)
    np.testing.assert_array_equal(got, codes.sum(axis=1))


def test_what_sums_and_products_fit():
    assert exact_sums.sum_fits(2**21, 255) and not exact_sums.sum_fits(2**21 + 1, 1)
    assert exact_sums.sum_fits(2**15, 2**16 - 1) and not exact_sums.sum_fits(2**15, 2**16)
    assert exact_sums.product_fits(8, 16) and not exact_sums.product_fits(9, 16)


def test_the_most_of_a_sum_is_held_by_int32_and_a_float32_near_it():
    assert 2**30 < exact_sums.MOST < 2**31 - 128 * 2**8
