"""Pack codes of 2 or 4 bits into bytes, as files hold them."""

import math
from collections.abc import Sequence

import numpy as np

WIDTHS = (2, 4)
"""Bits of a code of which several share a byte."""


def packed_width(codes: np.ndarray) -> int | None:
    """Return the fewest bits in which int8 codes can be packed; None where they take a byte."""
    if codes.dtype != np.int8 or not codes.size:
        return None
    lowest, highest = int(codes.min()), int(codes.max())
    fitting = (w for w in WIDTHS if -(1 << w - 1) <= lowest and highest < 1 << w - 1)
    return next(fitting, None)


def packed_bytes(codes: np.ndarray) -> int:
    """Return how many bytes an array takes, packed where it can be."""
    width = packed_width(codes)
    return codes.nbytes if width is None else -(-codes.size * width // 8)


def bytes_of(count: int, num_bits: int) -> int:
    """Return how many bytes codes of a width take at most, packed where they can be."""
    width = next((w for w in WIDTHS if num_bits <= w), 8 if num_bits <= 8 else 16)
    return -(-count * width // 8)


def pack(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack codes in two's complement, `8 / width` a byte, the first in the lowest bits.

    Args:
      codes: int8 codes that fit, of any shape, in C order.
      width: bits of a code, of `WIDTHS`.

    Returns:
      uint8, shape (bytes,); what no code fills is zero.
    """
    count = 8 // width
    flat = np.ravel(codes).astype(np.uint8) & np.uint8((1 << width) - 1)
    rows = np.append(flat, np.zeros(-flat.size % count, np.uint8)).reshape(-1, count)
    return np.bitwise_or.reduce(rows << _shifts(width), axis=1)


def unpack(data: np.ndarray, width: int, shape: Sequence[int]) -> np.ndarray:
    """Undo `pack`.

    Raises:
      ValueError: no such width; no shape, or one of another number of bytes.
    """
    if width not in WIDTHS:
        raise ValueError(f"codes of {width} bits are not packed")
    size = math.prod(shape) if min(shape, default=0) >= 0 else -1
    if size < 0 or data.dtype != np.uint8 or data.ndim != 1 or data.size != -(-size * width // 8):
        raise ValueError(f"{data.size} bytes hold no codes of {width} bits of shape {tuple(shape)}")
    upper = (data[:, None] << (8 - width - _shifts(width))).view(np.int8)  # the sign at the top
    return (upper >> (8 - width)).reshape(-1)[:size].reshape(shape)


def _shifts(width: int) -> np.ndarray:
    return np.arange(0, 8, width, dtype=np.uint8)
