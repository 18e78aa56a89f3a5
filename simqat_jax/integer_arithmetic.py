"""Integer arithmetic on centered codes (`code - zero_point`), carried as whole float32 numbers.

A float32 holds every integer up to 2^24, so that Flax's own layers can compute integer sums
exactly, on every device, and zero padding pads with the zero point.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simqat_jax.config import QuantSpec
from simqat_jax.numerics import (
    QuantParams,
    along_channel,
    quantize,
    true_divide,
)

_EXACT = 2**24
_INT32 = 2**31


class Codes(NamedTuple):
    """A tensor on a grid.

    Attributes:
      codes: `code - zero_point`, float32.
      params: the grid.
      spec: its width.
    """

    codes: jax.Array
    params: QuantParams
    spec: QuantSpec


def centered_codes(
    x: jax.Array, params: QuantParams, spec: QuantSpec, channel_axis: int | None = -1
) -> jax.Array:
    """Quantize to `code - zero_point`, float32."""
    codes = quantize(x, *params, spec, channel_axis)
    return (codes - along_channel(params.zero_point, codes.ndim, channel_axis)).astype(jnp.float32)


def real_values(tensor: Codes) -> jax.Array:
    """Dequantize: `(code - zero_point) * scale`, float32."""
    return tensor.codes * along_channel(tensor.params.scale, tensor.codes.ndim, -1)


def largest_code(spec: QuantSpec) -> int:
    """Return the largest magnitude that a centered code of an activation can have."""
    return 2 ** (spec.num_bits - 1) if spec.symmetric else spec.qmax - spec.qmin


def _limbs(w: jax.Array, bits: int, count: int) -> list[jax.Array]:
    """Split integers into `count` digits of `bits` bits, lowest first, the last one signed."""
    digits = []
    for _ in range(count - 1):
        rest = jnp.floor(w * 2.0**-bits)
        digits.append(w - rest * 2.0**bits)
        w = rest
    return [*digits, w]


def linear(
    layer: Any, x: jax.Array, w: jax.Array, x_spec: QuantSpec, w_spec: QuantSpec
) -> jax.Array | None:
    """Convolve or multiply centered codes exactly.

    Sums that may pass 2^24 are computed digit by digit of the weights.

    Args:
      layer: an unbound nn.Conv, nn.Dense or nn.DenseGeneral.
      x: centered codes of the input.
      w: centered codes of the kernel, in the kernel's shape.
    Returns: int32 sums, or None where int32 or float32 digits cannot hold them.
    """
    count = layer.features if isinstance(layer.features, int) else math.prod(layer.features)
    fan_in = w.size // count
    weight_bits, peak = w_spec.num_bits - 1, largest_code(x_spec) * fan_in
    if peak * 2**weight_bits >= _INT32 or peak * 2 > _EXACT:
        return None
    digit_bits = int(math.log2(_EXACT / peak))
    digits = _limbs(w, digit_bits, max(1, math.ceil(weight_bits / digit_bits)))
    plain: Any = layer.clone(use_bias=False, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    total = jnp.zeros((), jnp.int32)
    for place, digit in enumerate(digits):
        part = plain.apply({"params": {"kernel": digit}}, x)
        total = total + (part.astype(jnp.int32) << (place * digit_bits))
    return total


def requantize(
    acc: jax.Array,
    multiplier: jax.Array,
    params: QuantParams,
    spec: QuantSpec,
    bounds: tuple[float, float],
) -> jax.Array:
    """Scale integer sums to the output's grid: `clip(rint(f32(acc) * m) + zero_point)`, centered.

    Args:
      acc: int32 sums, bias included.
      multiplier: real units per sum over real units per output code; broadcasts against `acc`.
      params: the output's grid, per tensor.
      spec: the output's width.
      bounds: what the fused activation clamps to, real units.
    """
    lo, hi = (
        jnp.clip(jnp.round(true_divide(jnp.float32(b), params.scale)) + params.zero_point, *limits)
        if math.isfinite(b)
        else limits[end]
        for end, b in enumerate(bounds)
        for limits in ((spec.qmin, spec.qmax),)
    )
    codes = jnp.round(acc.astype(jnp.float32) * multiplier) + params.zero_point
    return jnp.clip(codes, lo, hi) - params.zero_point


def integer_bias(bias: jax.Array, unit: jax.Array) -> jax.Array:
    """Round a bias to int32 multiples of `unit`, kept away from int32's ends by half of it."""
    codes = jnp.round(true_divide(bias.astype(jnp.float32), unit))
    return jnp.clip(codes, -(2.0**30), 2.0**30).astype(jnp.int32)


def add(
    a: jax.Array,
    b: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    params: QuantParams,
    spec: QuantSpec,
    bounds: tuple[float, float],
) -> jax.Array:
    """Add centered codes of up to 8 bits in fixed point with 20 fractional bits, rounding half up.

    `ma = rint(ra * 2^sh)`, `(a * ma + b * mb + 2^(sh-1)) >> sh`, with `ra = s_a / s_c` and
    `sh = 20 - floor(log2(max(ra, rb)))`.

    Args:
      a: centered codes of the first operand.
      b: those of the second; `scales[1]` is negative for a subtraction.
      scales: real units per code of each.
      params: the output's grid.
      spec: the output's width.
      bounds: what the fused activation clamps to, real units.
    Source: XNNPACK, quantized addition.
    """
    ratios = [true_divide(scale, params.scale) for scale in scales]
    _, exponent = jnp.frexp(jnp.maximum(jnp.abs(ratios[0]), jnp.abs(ratios[1])))
    shift = jnp.clip(21 - exponent, 1, 30).astype(jnp.int32)
    ma, mb = (jnp.round(jnp.ldexp(r, shift)).astype(jnp.int32) for r in ratios)
    total = a.astype(jnp.int32) * ma + b.astype(jnp.int32) * mb + (1 << (shift - 1))
    return requantize(total >> shift, jnp.float32(1), params, spec, bounds)
