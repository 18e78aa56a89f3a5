"""From integer sums back to codes: bias, multiplier, clamp."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import rounded_product, true_divide
from simqat_jax.numerics.grid import Grid

Bounds = tuple[float, float]
"""What a fused activation clamps to, real units."""
FREE: Bounds = (-math.inf, math.inf)


def integer_bias(bias: jax.Array, unit: jax.Array) -> jax.Array:
    """Round a bias to int32 multiples of `unit`, kept away from int32's ends by half of it."""
    codes = jnp.round(true_divide(bias.astype(jnp.float32), unit))
    return jnp.clip(codes, -(2.0**30), 2.0**30).astype(jnp.int32)


def scaled(acc: jax.Array, multiplier: ArrayLike) -> jax.Array:
    """Scale integer sums: `rint(f32(acc) * m)`, whole float32 numbers.

    Args:
      acc: int32 sums, bias included.
      multiplier: real units per sum over real units per output code; broadcasts against `acc`.
    """
    return jnp.round(acc.astype(jnp.float32) * multiplier)


def clamped(centered: jax.Array, grid: Grid, bounds: Bounds) -> jax.Array:
    """Clip whole numbers, `code - zero_point`, to the grid and to `bounds`."""
    lo, hi = code_bounds(bounds, grid)
    return jnp.clip(centered + grid.zero, lo, hi) - grid.zero


def code_bounds(bounds: Bounds, grid: Grid) -> tuple[ArrayLike, ArrayLike]:
    """Return the lowest and highest code of a tensor that is clamped to `bounds`."""
    limits, params = (grid.qmin, grid.qmax), grid.params
    lo, hi = (
        jnp.clip(jnp.round(true_divide(jnp.float32(b), params.scale)) + grid.zero, *limits)
        if math.isfinite(b)
        else limit
        for b, limit in zip(bounds, limits, strict=True)
    )
    return lo, hi


def room_for_bias(
    codes: jax.Array, dead: jax.Array, scale: jax.Array, bias: jax.Array, x_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Coarsen the weights of channels that are too small for their bias.

    A bias counts in units of `x_scale * scale`. Where weights are so small that int32 does not hold
    it, they lose digits that no output shows; where all are zero, the scale is the bias's alone.

    Args:
      codes: of the kernel, (inputs, C).
      dead: (C,), which channels have no code but 0.
      scale: of its channels, (C,), real units.
      bias: (C,), real units.
      x_scale: real units per code of the input.

    Returns:
      Codes and scales.
    """
    magnitude = true_divide(jnp.abs(bias.astype(jnp.float32)), x_scale)
    dead = dead & (magnitude > 0)
    least = jnp.maximum(jnp.where(dead, magnitude * 2.0**-23, magnitude * 2.0**-29), 1e-30)
    coarser = dead | (least > scale)
    new = jnp.where(coarser, least, scale)
    coarse = jnp.round(codes * true_divide(scale, new)[None])
    return jnp.where(coarser[None], coarse, codes), new


def channel_affine(
    slope: jax.Array, shift: jax.Array, x_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return a weight for each channel and its scale: 127, 0 or -127 where the shift allows.

    Args:
      slope: (C,), of `slope * x + shift`.
      shift: (C,), real units.
      x_scale: real units per code of `x`.
    """
    scale = jnp.where(slope == 0, 1.0, true_divide(jnp.abs(slope), 127.0))
    codes = jnp.sign(slope)[None] * 127
    kernel, scale = room_for_bias(codes, slope == 0, scale, shift, x_scale)
    return kernel[0], scale


def mean_multiplier(x_scale: ArrayLike, y_scale: ArrayLike, count: ArrayLike) -> jax.Array:
    """Return the multiplier of a sum that is divided by `count`: `s_x / f32(s_y * count)`.

    Args:
      x_scale: real units per code of what is added up.
      y_scale: real units per output code.
      count: one number, or one for each sum.
    """
    divisor = rounded_product(jnp.asarray(y_scale, jnp.float32), count)
    return true_divide(jnp.broadcast_to(jnp.asarray(x_scale, jnp.float32), divisor.shape), divisor)
