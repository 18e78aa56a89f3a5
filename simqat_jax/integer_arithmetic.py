"""Integer arithmetic on centered codes (`code - zero_point`), carried as whole float32 numbers.

A float32 holds every integer up to 2^24, so that Flax's own layers can compute integer sums
exactly, on every device, and zero padding pads with the zero point.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.config import QuantSpec
from simqat_jax.numerics import (
    QuantParams,
    along_channel,
    quantize,
    rounded_product,
    true_divide,
)

_EXACT = 2**24
_INT32 = 2**31
MOST = int(0.99 * _INT32)
"""The largest magnitude of a sum, its bias included, that an integer layer may have."""


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
    return rounded_product(tensor.codes, along_channel(tensor.params.scale, tensor.codes.ndim, -1))


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
) -> tuple[jax.Array, jax.Array | None] | None:
    """Convolve or multiply centered codes exactly.

    Sums that may pass 2^24 are computed digit by digit of the weights and of the input.

    Args:
      layer: an unbound nn.Conv, nn.Dense or nn.DenseGeneral.
      x: centered codes of the input.
      w: centered codes of the kernel, in the kernel's shape.
    Returns: sums modulo 2^32, int32; and where they may pass 2^30 the sums in float32, rounded.
      None where digits of one bit pass 2^24.
    """
    count = layer.features if isinstance(layer.features, int) else math.prod(layer.features)
    fan_in, weight_bits = w.size // count, w_spec.num_bits - 1
    largest = largest_code(x_spec)
    width = min(largest.bit_length(), int(math.log2(_EXACT / 2 / fan_in)))
    if width < 1:
        return None
    digit_bits = int(math.log2(_EXACT / (min(largest, 2**width) * fan_in)))
    plain: Any = layer.clone(use_bias=False, dtype=jnp.float32, precision=jax.lax.Precision.HIGHEST)

    def apply(x: jax.Array, w: jax.Array) -> jax.Array:
        return plain.apply({"params": {"kernel": w}}, x)

    total = jnp.zeros((), jnp.int32)
    for place, part in enumerate(_limbs(x, width, math.ceil(largest.bit_length() / width))):
        sums = _by_digits(partial(apply, part), w, weight_bits, digit_bits)
        total = total + (sums << (place * width))
    return total, apply(x, w) if largest * fan_in * 2**weight_bits >= 2**30 else None


def _by_digits(
    linear: Callable[[jax.Array], jax.Array], w: jax.Array, width: int, digit_bits: int
) -> jax.Array:
    """Apply a linear function to integers of `width` bits and a sign, digit by digit; int32."""
    total = jnp.zeros((), jnp.int32)
    for place, digit in enumerate(_limbs(w, digit_bits, max(1, math.ceil(width / digit_bits)))):
        total = total + (linear(digit).astype(jnp.int32) << (place * digit_bits))
    return total


def exact_sum(
    sums: Callable[[jax.Array], jax.Array], x: jax.Array, count: int, spec: QuantSpec
) -> jax.Array | None:
    """Sum centered codes exactly with a function that adds up float32.

    Args:
      sums: adds up at most `count` elements.
      x: centered codes.
      spec: their width.
    Returns: int32 sums, or None where `sum_fits` tells that they are too many.
    """
    if not sum_fits(count, spec):
        return None
    return _by_digits(sums, x, spec.num_bits, int(math.log2(_EXACT // 4 / count)))


def sum_fits(count: int, spec: QuantSpec) -> bool:
    """Whether int32 and float32 digits hold sums of `count` codes of this width."""
    return count * largest_code(spec) < _INT32 and count <= _EXACT // 8


def product_fits(x_bits: int, y_bits: int) -> bool:
    """Whether float32 holds products of codes of these widths."""
    return x_bits + y_bits <= 24


def codes_fit(dtype: Any, spec: QuantSpec) -> bool:
    """Whether a float dtype holds every centered code of a width exactly."""
    return spec.qmax - spec.qmin < 2 ** (jnp.finfo(np.dtype(dtype)).nmant + 1)


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
    lo, hi = code_bounds(bounds, params, spec)
    zero_point = params.zero_point.astype(jnp.float32)
    codes = jnp.round(acc.astype(jnp.float32) * multiplier) + zero_point
    return jnp.clip(codes, lo, hi) - zero_point


def code_bounds(
    bounds: tuple[float, float], params: QuantParams, spec: QuantSpec
) -> tuple[ArrayLike, ArrayLike]:
    """Return the lowest and highest code of a tensor that is clamped to `bounds`, real units."""
    limits, zero_point = (spec.qmin, spec.qmax), params.zero_point.astype(jnp.float32)
    lo, hi = (
        jnp.clip(jnp.round(true_divide(jnp.float32(b), params.scale)) + zero_point, *limits)
        if math.isfinite(b)
        else limit
        for b, limit in zip(bounds, limits, strict=True)
    )
    return lo, hi


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
    ma, mb, shift = add_multipliers(scales, params.scale)
    total = a.astype(jnp.int32) * ma + b.astype(jnp.int32) * mb + (1 << (shift - 1))
    return requantize(total >> shift, jnp.float32(1), params, spec, bounds)


def add_multipliers(
    scales: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(ma, mb, sh)` of `add`, int32."""
    ratios = [true_divide(s, scale) for s in scales]
    _, exponent = jnp.frexp(jnp.maximum(jnp.abs(ratios[0]), jnp.abs(ratios[1])))
    shift = jnp.clip(21 - exponent, 1, 30).astype(jnp.int32)
    ma, mb = (jnp.round(jnp.ldexp(r, shift)).astype(jnp.int32) for r in ratios)
    return ma, mb, shift


def multiply_onnxruntime(
    product: jax.Array, multiplier: ArrayLike, zero_point: ArrayLike
) -> jax.Array:
    """Scale a product of centered codes: `rint(f32(product * m) + z)`, float32, not clipped.

    The zero point is added before rounding, which moves ties.

    Args:
      product: int32.
      multiplier: real units of a product over those of an output code.
      zero_point: of the output.
    Source: ONNX Runtime, QLinearMul.
    """
    scaled = rounded_product(product.astype(jnp.float32), multiplier)
    return jnp.round(scaled + jnp.asarray(zero_point, jnp.float32))


def subtract_onnxruntime(
    a: jax.Array, b: jax.Array, a_params: QuantParams, b_params: QuantParams, params: QuantParams
) -> jax.Array:
    """Subtract real values: `rint((a * s_a - b * s_b) / s_c) + z_c`, float32, not clipped.

    Args:
      a: centered codes of the first operand.
      b: those of the second.
      a_params: the grid of the first operand.
      b_params: that of the second.
      params: that of the output.
    Source: ONNX Runtime, which has no integer subtraction.
    """
    a, b = (
        rounded_product(v.astype(jnp.float32), p.scale) for v, p in ((a, a_params), (b, b_params))
    )
    return jnp.round(true_divide(a - b, params.scale)) + params.zero_point.astype(jnp.float32)


def _fused_multiply_add(x: ArrayLike, y: ArrayLike, addend: ArrayLike) -> jax.Array:
    """Return `x * y + addend` of float32, rounded once.

    In float64 the product is exact, and the sum is rounded to odd before it is rounded to float32.
    """
    with jax.enable_x64(True):
        product, addend = (
            jnp.asarray(x).astype(jnp.float64) * jnp.asarray(y).astype(jnp.float64),
            jnp.asarray(addend).astype(jnp.float64),
        )
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = jax.lax.bitcast_convert_type(total, jnp.int64)
        outward = (error > 0) == (total > 0)
        odd = bits + jnp.where(outward, 1, -1).astype(jnp.int64)
        inexact = (error != 0) & (bits & 1 == 0)
        total = jnp.where(inexact, jax.lax.bitcast_convert_type(odd, jnp.float64), total)
        return total.astype(jnp.float32)


def add_onnxruntime_multipliers(
    a: QuantParams, b: QuantParams, params: QuantParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(ra, rb, z)` of `add_onnxruntime` for the grids of its operands, float32.

    `z = z_c - fma(ra, z_a, f32(rb * z_b))`, as the x86-64 build of ONNX Runtime contracts it.
    """
    ra, rb = (true_divide(p.scale, params.scale) for p in (a, b))
    za, zb, zc = (p.zero_point.astype(jnp.float32) for p in (a, b, params))
    return ra, rb, zc - _fused_multiply_add(ra, za, rounded_product(rb, zb))


def add_onnxruntime(
    a: jax.Array, b: jax.Array, ra: ArrayLike, rb: ArrayLike, z: ArrayLike
) -> jax.Array:
    """Add codes of up to 8 bits: `rint(fma(a, ra, fma(b, rb, z)))`, float32, not clipped.

    Args:
      a: codes of the first operand, int32, zero point not subtracted.
      b: those of the second.
      ra: real units per code of `a` over those of the output.
      rb: likewise of `b`.
      z: zero point of the output less those of the operands at its scale.
    Source: ONNX Runtime, QLinearAdd; each `fma` rounds once, to float32.
    """
    return jnp.round(_fused_multiply_add(a, ra, _fused_multiply_add(b, rb, z)))
