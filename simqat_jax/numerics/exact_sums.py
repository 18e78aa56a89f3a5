"""Exact sums of centered codes (`code - zero_point`), carried as whole float32 numbers.

A float32 holds every integer up to 2^24: what may pass it is computed part by part of what is
summed up, or digit by digit.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simqat_jax.numerics.contraction import Sums, byte_sums, partial_sums
from simqat_jax.numerics.grid import Codes, Grid

_EXACT = 2**24
_INT32 = 2**31
MOST = int(0.99 * _INT32)
"""The largest magnitude of a sum, its bias included, that an integer layer may have."""

_LEAST_FAN_IN, _LEAST_CHANNELS = 256, 64
"""Smaller kernels are multiplied faster in float32."""
_FEWEST = 8
"""How many entries of an axis a part has at least: smaller matrix products take longer."""

Linear = Callable[[Sums, jax.Array, jax.Array, Any], Sequence[jax.Array]]
"""A convolution or matrix product of data and a kernel, by a function of `numerics.contraction`."""


def _digits(w: jax.Array, bits: int, count: int) -> list[jax.Array]:
    """Split integers into `count` digits of `bits` bits, lowest first, the last one signed."""
    digits = []
    for _ in range(count - 1):
        rest = jnp.floor(w * 2.0**-bits)
        digits.append(w - rest * 2.0**bits)
        w = rest
    return [*digits, w]


def linear(
    layer: Linear,
    x: Codes,
    kernel: Codes,
    fan_in: int,
    summed: int = 1,
    kernel_bits: int | None = None,
) -> tuple[jax.Array, jax.Array | None] | None:
    """Convolve or multiply centered codes exactly.

    Large kernels of 8 bits are multiplied in bytes. Else sums that may pass 2^24 are computed in
    parts, and where these have few entries digit by digit of the weights and of the input.

    Args:
      layer: the layer, without bias.
      x: the input.
      kernel: the kernel.
      fan_in: how many products a sum adds up.
      summed: the length of the axis whose parts the layer sums.
      kernel_bits: of a code of the kernel besides its sign; by default those of a symmetric grid.

    Returns:
      Sums modulo 2^32, int32; and where they may pass 2^30 the sums in float32, rounded. None
      where digits of one bit pass 2^24.
    """
    weight_bits = kernel.grid.num_bits - 1 if kernel_bits is None else kernel_bits
    largest = x.grid.largest
    rounded = largest * fan_in * 2**weight_bits >= 2**30
    approximate = layer(partial_sums, x.codes, kernel.codes, 1)[0] if rounded else None
    if kernel_bits is None and _is_for_bytes(x.grid, kernel, fan_in):
        whole = layer(byte_sums, x.codes, kernel.codes, x.grid.zero - x.grid.offset)
        if whole:
            return whole[0], approximate
    at_once = _EXACT // (largest * 2**weight_bits) // (fan_in // summed)
    if at_once >= min(_FEWEST, summed):
        parts = layer(partial_sums, x.codes, kernel.codes, math.ceil(summed / at_once))
        return sum((p.astype(jnp.int32) for p in parts), jnp.zeros((), jnp.int32)), approximate
    width = min(largest.bit_length(), int(math.log2(_EXACT / 2 / fan_in)))
    if width < 1:
        return None
    digit_bits = int(math.log2(_EXACT / (min(largest, 2**width) * fan_in)))
    total = jnp.zeros((), jnp.int32)
    for place, part in enumerate(_digits(x.codes, width, math.ceil(largest.bit_length() / width))):
        sums = _by_digits(
            lambda digit, part=part: layer(partial_sums, part, digit, 1)[0],
            kernel.codes,
            weight_bits,
            digit_bits,
        )
        total = total + (sums << (place * width))
    return total, approximate


def _is_for_bytes(x: Grid, kernel: Codes, fan_in: int) -> bool:
    """Whether 8 bits hold the codes, and a product of bytes is worth their conversion."""
    if max(x.num_bits, kernel.grid.num_bits) > 8:
        return False
    return fan_in >= _LEAST_FAN_IN and kernel.codes.size >= fan_in * _LEAST_CHANNELS


def _by_digits(
    sums: Callable[[jax.Array], jax.Array], w: jax.Array, width: int, digit_bits: int
) -> jax.Array:
    """Apply a linear function to integers of `width` bits and a sign, digit by digit; int32."""
    total = jnp.zeros((), jnp.int32)
    for place, digit in enumerate(_digits(w, digit_bits, max(1, math.ceil(width / digit_bits)))):
        total = total + (sums(digit).astype(jnp.int32) << (place * digit_bits))
    return total


def exact_sum(sums: Callable[[jax.Array], jax.Array], x: Codes, count: int) -> jax.Array:
    """Sum centered codes exactly with a function that adds up float32.

    Args:
      sums: adds up at most `count` elements, so many that `sum_fits`.
      x: the codes.
      count: how many elements a sum has.

    Returns:
      int32 sums.
    """
    return _by_digits(sums, x.codes, x.grid.num_bits, int(math.log2(_EXACT // 4 / count)))


def sum_fits(count: int, largest: int) -> bool:
    """Whether int32 and float32 digits hold sums of `count` codes up to `largest`."""
    return count * largest < _INT32 and count <= _EXACT // 8


def product_fits(x_bits: int, y_bits: int) -> bool:
    """Whether float32 holds products of codes of these widths."""
    return x_bits + y_bits <= 24
