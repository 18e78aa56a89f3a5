"""Codes of 2 and 4 bits in bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simqat_jax.numerics.packing import pack, packed_bytes, packed_width, unpack

ENDS = {2: (-2, 1), 4: (-8, 7)}


def by_hand(codes, width):
    """Bytes as sums of digits, the first code in the lowest."""
    count = 8 // width
    digits = [int(c) % 2**width for c in np.ravel(codes)]
    groups = [digits[k : k + count] for k in range(0, len(digits), count)]
    return [sum(d << (width * k) for k, d in enumerate(group)) for group in groups]


@given(st.sampled_from([2, 4]), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**31))
def test_there_and_back(width, shape, seed):
    lo, hi = ENDS[width]
    codes = np.random.default_rng(seed).integers(lo, hi + 1, shape).astype(np.int8)
    packed = pack(codes, width)
    assert packed.dtype == np.uint8 and packed.tolist() == by_hand(codes, width)
    back = unpack(packed, width, codes.shape)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(
    ("codes", "width", "size"),
    [
        ([-2, 1, 0], 2, 1),
        ([-2, 1, 0, 0, 1], 2, 2),
        ([-3, 1, 0], 4, 2),
        ([-2, 2], 4, 1),
        ([-8, 7, 0], 4, 2),
        ([-9, 0, 0], None, 3),
        ([8, 0], None, 2),
        ([], None, 0),
    ],
)
def test_the_fewest_bits_that_hold_all_codes(codes, width, size):
    codes = np.asarray(codes, np.int8)
    assert packed_width(codes) == width
    assert packed_bytes(codes) == size


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_nothing_but_int8_is_packed(dtype):
    values = np.ones(6, dtype)
    assert packed_width(values) is None
    assert packed_bytes(values) == values.nbytes


@pytest.mark.parametrize(
    ("size", "width", "shape"),
    [
        (2, 4, (5,)),
        (2, 4, (2,)),
        (2, 2, (3, 3)),
        (2, 3, (5,)),
        (2, 4, (-1, -4, 1)),
        (1, 4, (-1, 2)),
    ],
)
def test_shapes_of_other_sizes_and_widths_that_are_none(size, width, shape):
    with pytest.raises(ValueError, match=r"codes of . bits"):
        unpack(np.zeros(size, np.uint8), width, shape)


def test_what_is_no_row_of_bytes():
    for data in (np.zeros(2, np.int8), np.zeros((1, 2), np.uint8)):
        with pytest.raises(ValueError, match="hold no codes of 4 bits"):
            unpack(data, 4, (4,))
