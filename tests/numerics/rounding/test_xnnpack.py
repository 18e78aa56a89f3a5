"""Sums and products as XNNPACK computes them, against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.rounding.xnnpack import XNNPACK

RNG = np.random.default_rng(0)
SCALES = {
    "the first one larger": (0.047, 0.013, 0.02),
    "the second one larger": (0.013, 0.047, 0.02),
    "ties": (0.25, 0.75, 0.5),
    "a power of two": (0.5, 0.1, 0.25),
    "far below the output's": (1e-5, 3e-5, 1.0),
    "a thousandth of the output's": (1.0, 0.9, 3e3),
    "a million times the output's": (1.0, 1.0, 1e-6),
}


def multipliers(ratios):
    """Whole numbers of 21 bits, or so that shifts are of 1 to 30 bits."""
    largest = max(map(Fraction, ratios))
    exponent = math.floor(math.log2(largest))
    assert Fraction(2) ** exponent <= largest < Fraction(2) ** (exponent + 1)
    shift = min(max(20 - exponent, 1), 30)
    return [round(Fraction(r) * 2**shift) for r in ratios], shift


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("subtracts", [False, True])
def test_sums_in_fixed_point(name, subtracts):
    a, b, y = (np.float32(s) for s in SCALES[name])
    grids = tuple(sq.Grid(float(s), 0, 0, 255) for s in (a, b, y))
    how = XNNPACK.subtract if subtracts else XNNPACK.add
    (ma, mb), shift = multipliers([float(a / y), float(b / y)])
    mb = -mb if subtracts else mb
    constants = how.constants(grids)
    assert [int(v) for v in constants] == [ma, mb, shift]
    p, q = RNG.integers(-255, 256, (2, 500)).astype(np.int32)
    half = Fraction(1, 2)
    want = [
        math.floor(Fraction(int(m) * ma + int(n) * mb, 2**shift) + half)
        for m, n in zip(p, q, strict=True)
    ]
    np.testing.assert_array_equal(how.apply(p, q, constants, grids), want)


def test_products_are_scaled_as_sums_of_a_layer():
    products = RNG.integers(-(255**2), 255**2, 500).astype(np.int32)
    multiplier = np.float32(0.0123)
    got = XNNPACK.multiply.apply(products, multiplier, sq.Grid(0.1, 77, 0, 255))
    np.testing.assert_array_equal(got, np.rint(products.astype(np.float32) * multiplier))
