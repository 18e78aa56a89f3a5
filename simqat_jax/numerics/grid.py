"""The integer grid of a tensor, and tensors of codes on it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import DTypeLike

from simqat_jax.numerics.affine import (
    QuantParams,
    along_channel,
    quant_params,
    quantize,
    rounded_product,
)
from simqat_jax.numerics.arguments import (
    check_code_ends,
    check_codes,
    check_real,
    check_scale,
    check_zero_point,
)
from simqat_jax.numerics.spec import QuantSpec

STORED_OFFSET = 128
"""What separates the unsigned codes of 8 bits from the signed ones: uint8 less it is int8."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the codes of a tensor lie: `real = (code - zero_point) * scale`.

    Of a finished model `scale` and `zero_point` are numbers; while a model is evaluated they are
    arrays, of shape () or, with one grid per channel, (C,).

    Attributes:
      scale: real units per code, exactly a float32.
      zero_point: the code of real zero.
      qmin: lowest code.
      qmax: highest code.

    Raises:
      TypeError: what is no number or no array of numbers.
      ValueError: a scale that is not finite and above 0; a zero point that is no code; `qmin` not
        below `qmax`, or more than 16 bits.

    Examples:
      >>> Grid(scale=0.5, zero_point=128, qmin=0, qmax=255).dequantize(jnp.array([0, 128]))
      Array([-64.,   0.], dtype=float32)
    """

    scale: float | jax.Array
    zero_point: int | jax.Array
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        check_code_ends(self.qmin, self.qmax)
        check_scale(self.scale)
        check_zero_point(self.zero_point, self.qmin, self.qmax)

    @property
    def num_bits(self) -> int:
        """Width of the codes."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def per_channel(self) -> bool:
        """Whether each channel has a grid of its own."""
        return np.ndim(self.scale) > 0

    @property
    def largest(self) -> int:
        """The largest magnitude that `code - zero_point` can have."""
        return self.qmax - self.qmin if self.qmin >= 0 else self.qmax + 1

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type that holds every code: uint8 for 8 asymmetric bits."""
        sign = "i" if self.qmin < 0 else "u"
        return np.dtype(f"{sign}{1 if self.qmax < 256 and self.qmin >= -128 else 2}")

    @property
    def params(self) -> QuantParams:
        """Scale and zero point as arrays."""
        return QuantParams(
            jnp.asarray(self.scale, jnp.float32), jnp.asarray(self.zero_point, jnp.int32)
        )

    @property
    def zero(self) -> jax.Array:
        """The zero point, float32."""
        return self.params.zero_point.astype(jnp.float32)

    # Inside an integer model codes are int8 (uint8 less 128), or int32 where they are wider.

    @property
    def offset(self) -> int:
        """What a code is more than its stored form."""
        return STORED_OFFSET if self.dtype == np.uint8 else 0

    @property
    def signed_offset(self) -> int:
        """What has to be added to a code of at most 8 bits to make it an int8."""
        return 0 if self.qmin < 0 else -STORED_OFFSET

    @property
    def unsigned_offset(self) -> int:
        """What has to be added to a code of at most 8 bits to make it a uint8."""
        return STORED_OFFSET if self.qmin < 0 else 0

    def offset_in(self, dtype: DTypeLike) -> int:
        """What has to be added to a code of at most 8 bits to make it an int8 or a uint8."""
        return self.unsigned_offset if np.dtype(dtype) == np.uint8 else self.signed_offset

    def in_file(self, codes: ArrayLike, dtype: DTypeLike) -> np.ndarray:
        """Return codes of at most 8 bits as a file takes them: int8 or uint8."""
        return (np.asarray(codes, np.int32) + self.offset_in(dtype)).astype(dtype)

    def of_file(self, array: np.ndarray) -> np.ndarray:
        """Return the codes, int32, that a file returned as int8 or uint8."""
        return array.astype(np.int32) - self.offset_in(array.dtype)

    @property
    def stored_dtype(self) -> np.dtype:
        """The type in which a model holds the codes: int8 or int32."""
        return np.dtype(np.int8 if self.dtype.itemsize == 1 else np.int32)

    @property
    def stored_zero(self) -> int:
        """The stored form of the zero point."""
        return int(self.zero_point) - self.offset

    def stored(self, codes: ArrayLike) -> jax.Array:
        """Map codes to their stored form."""
        return (jnp.asarray(codes).astype(jnp.int32) - self.offset).astype(self.stored_dtype)

    def codes(self, stored: jax.Array) -> jax.Array:
        """Map the stored form to codes."""
        return (stored.astype(jnp.int32) + self.offset).astype(self.dtype)

    def centered(self, stored: jax.Array) -> jax.Array:
        """Map the stored form to `code - zero_point`, int32."""
        return stored.astype(jnp.int32) - self.stored_zero

    def from_float(self, centered: jax.Array, bounds: Sequence[int] | None = None) -> jax.Array:
        """Clip whole float32 numbers, `code - zero_point`, and store them."""
        lo, hi = (self.qmin, self.qmax) if bounds is None else bounds
        clipped = jnp.clip(centered + np.float32(self.zero_point), lo, hi)
        return (clipped - np.float32(self.offset)).astype(self.stored_dtype)

    def quantize(self, x: ArrayLike) -> jax.Array:
        """Map real values to codes.

        Raises:
          TypeError: no array of real numbers.
        """
        check_real("x", x)
        return quantize(x, *self.params, self, None).astype(self.dtype)

    def dequantize(self, codes: ArrayLike) -> jax.Array:
        """Map codes to real values, float32.

        Raises:
          TypeError: no array of integers.
        """
        check_codes("codes", codes)
        centered = (jnp.asarray(codes).astype(jnp.int32) - self.zero_point).astype(jnp.float32)
        return rounded_product(centered, np.float32(self.scale))


class Codes(NamedTuple):
    """A tensor on a grid.

    Whole numbers carried as float32, which holds every integer up to 2^24: Flax's own layers
    compute integer sums with them exactly, on every device, and pad with the zero point.

    Attributes:
      codes: `code - zero_point`, float32.
      grid: where they lie.
    """

    codes: jax.Array
    grid: Grid


class KernelCodes(NamedTuple):
    """A kernel on a grid.

    Attributes:
      codes: whole numbers, float32, output channels last; zero points are 0.
      grid: where they lie.
      dead: (C,), which output channels have no code but 0.
    """

    codes: jax.Array
    grid: Grid
    dead: jax.Array


QuantizeKernel = Callable[[jax.Array, jax.Array | None], KernelCodes]
"""Quantizes a kernel, real units, times a factor for each output channel; None: times nothing."""


def grid_of_range(lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> Grid:
    """Place the grid of `spec` on a range, as `quant_params` does."""
    return Grid(*quant_params(lo, hi, spec), spec.qmin, spec.qmax)


def centered_codes(x: jax.Array, grid: Grid, channel_axis: int | None = -1) -> jax.Array:
    """Quantize to `code - zero_point`, float32."""
    codes = quantize(x, *grid.params, grid, channel_axis)
    zero = along_channel(grid.params.zero_point, codes.ndim, channel_axis)
    return (codes - zero).astype(jnp.float32)


def real_values(tensor: Codes) -> jax.Array:
    """Dequantize: `(code - zero_point) * scale`, float32."""
    scale = along_channel(tensor.grid.params.scale, tensor.codes.ndim, -1)
    return rounded_product(tensor.codes, scale)


def codes_fit(dtype: np.dtype, grid: Grid | QuantSpec) -> bool:
    """Whether a float dtype holds every centered code of a width exactly."""
    return grid.qmax - grid.qmin < 2 ** (jnp.finfo(dtype).nmant + 1)
