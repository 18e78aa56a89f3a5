"""Affine quantization: pure functions on arrays, no Flax.

Every function is exact by construction: eager and jitted results are the same bits on a CPU.
"""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from simqat_jax.numerics.spec import QuantSpec


class QuantParams(NamedTuple):
    """Where the integer grid lies: `real = (code - zero_point) * scale`.

    Invariant: `scale.shape == zero_point.shape`, `()` per tensor or `(C,)` per channel.
    """

    scale: jax.Array
    """Real units per code, float32, always positive and finite."""
    zero_point: jax.Array
    """The code of real zero, int32."""


class CodeRange(Protocol):
    """What quantizing needs of a QuantSpec, or of a grid."""

    @property
    def qmin(self) -> int:
        """Lowest integer code."""
        ...

    @property
    def qmax(self) -> int:
        """Highest integer code."""
        ...


def _rint(x: jax.Array) -> jax.Array:
    """Round to the nearest whole number, halves to even."""
    return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def true_divide(x: jax.Array, divisor: ArrayLike) -> jax.Array:
    """Divide with one correct rounding: `f32(x / divisor)`.

    XLA rewrites division by a broadcast or constant divisor into a product with its reciprocal,
    and by a square root into `rsqrt`: one unit in the last place off for every third quotient,
    enough to move a rounding tie to another code. A divisor that is a `select` is left alone.
    """
    divisor = jnp.broadcast_to(jnp.asarray(divisor, x.dtype), x.shape)
    return lax.div(x, lax.select(lax.ne(x, x), x, divisor))


def rounded_product(x: jax.Array, factor: ArrayLike) -> jax.Array:
    """Multiply with a rounding of its own: `f32(x * factor)`.

    Compilers contract a product and the sum behind it into one fused multiply-add, which rounds
    once instead of twice, with jit and not without. They do not reach through a minimum, and no
    compiler can tell that this one changes nothing. (A product that overflows becomes finite.)
    """
    product = x * factor
    return lax.min(product, lax.full_like(product, np.finfo(product.dtype).max))


def own_rounding(x: jax.Array) -> jax.Array:
    """Return a result of arithmetic as it is, for compilers to leave alone.

    They neither contract it with what reads it nor reassociate it: no compiler sees that this
    select changes nothing. Without jit nothing is contracted.
    """
    if not isinstance(x, Tracer):
        return x
    return lax.select(lax.ne(x, x), lax.full_like(x, np.nan), x)


def computed_once(codes: jax.Array) -> jax.Array:
    """Return codes as they are, for compilers to compute once, however many read them.

    XLA on CPU fuses a sum into everything that reads it, and the sums in front of it as well: each
    norm of a residual stream computes the stream anew from its start. It does not see through a
    loop, here one that no code makes turn.
    """
    if not isinstance(codes, Tracer) or not codes.size:
        return codes
    return lax.platform_dependent(codes, cpu=_behind_a_loop, default=lambda codes: codes)


def _behind_a_loop(codes: jax.Array) -> jax.Array:
    turns = jnp.where(codes.reshape(-1)[0].astype(jnp.int32) > 2**24, 1, 0)
    one = jnp.ones((), codes.dtype)
    return lax.while_loop(lambda c: c[1] > 0, lambda c: (c[0] + one, c[1] - 1), (codes, turns))[0]


def along_channel(v: jax.Array, ndim: int, channel_axis: int | None) -> jax.Array:
    """Reshape `(C,)` so that it broadcasts along `channel_axis` of `ndim` axes; `()` stays."""
    if v.ndim == 0:
        return v
    shape = [1] * ndim
    shape[channel_axis if channel_axis is not None else -1] = v.shape[0]
    return v.reshape(shape)


def _check_channels(name: str, v: jax.Array, x: jax.Array, channel_axis: int | None) -> None:
    if v.ndim == 0:
        return
    if channel_axis is None:
        raise ValueError(
            f"{name} has shape {v.shape} but channel_axis is None (per tensor). Pass the channel "
            "axis of x, or a scalar."
        )
    if not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(f"channel_axis {channel_axis} does not exist in x of shape {x.shape}.")
    if v.shape != (x.shape[channel_axis],):
        raise ValueError(
            f"{name} has shape {v.shape}, but x of shape {x.shape} has {x.shape[channel_axis]} "
            f"channels along axis {channel_axis}."
        )


def quant_params(lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> QuantParams:
    """Place the grid of `spec` on a range, see `checked.quant_params`."""
    starts_at_zero = not isinstance(lo, jax.Array) and not np.any(lo)
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    if lo.shape != hi.shape or lo.ndim > 1:
        raise ValueError(
            f"lo and hi must both be scalars or both of shape (C,), got {lo.shape} and {hi.shape}."
        )
    return _placed(lo, hi, spec, starts_at_zero)


@partial(jax.jit, static_argnums=(2, 3))  # traced once for all quantizers that are alike
def _placed(lo: jax.Array, hi: jax.Array, spec: QuantSpec, starts_at_zero: bool) -> QuantParams:
    hi = lax.max(hi, lax.full_like(hi, 0))
    if not starts_at_zero:
        lo = lax.min(lo, lax.full_like(lo, 0))
    if spec.symmetric:
        span, steps = hi if starts_at_zero else lax.max(-lo, hi), 2 ** (spec.num_bits - 1) - 1
    else:
        span, steps = hi if starts_at_zero else hi - lo, spec.qmax - spec.qmin
    # The difference of finite values can overflow. A subnormal scale is flushed to zero by some
    # backends: such a range counts as all zero.
    scale = true_divide(lax.min(span, lax.full_like(span, np.finfo(np.float32).max)), float(steps))
    scale = lax.select(scale >= np.finfo(np.float32).tiny, scale, lax.full_like(scale, 1))
    if spec.symmetric or starts_at_zero:
        zero_point = 0 if spec.symmetric else spec.qmin
        return QuantParams(scale, lax.full_like(scale, zero_point, jnp.int32))
    codes = spec.qmin - _rint(lax.div(lo, scale))  # the scale is a select, as in `true_divide`
    codes = lax.clamp(jnp.float32(spec.qmin), codes, jnp.float32(spec.qmax))
    return QuantParams(scale, codes.astype(jnp.int32))


def _codes(x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """Unclipped codes as float32: integers up to 2^24 are exact, and no cast can saturate."""
    return _rint(true_divide(x, scale)) + zero_point.astype(jnp.float32)


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    spec: CodeRange,
    channel_axis: int | None,
) -> jax.Array:
    """Map real values to integer codes, see `checked.quantize`."""
    x = jnp.asarray(x, jnp.float32)
    scale, zero_point = jnp.asarray(scale, jnp.float32), jnp.asarray(zero_point, jnp.int32)
    _check_channels("scale", scale, x, channel_axis)
    _check_channels("zero_point", zero_point, x, channel_axis)
    scale = along_channel(scale, x.ndim, channel_axis)
    zero_point = along_channel(zero_point, x.ndim, channel_axis)
    codes = jnp.clip(_codes(x, scale, zero_point), spec.qmin, spec.qmax)
    return jnp.where(jnp.isnan(codes), zero_point, codes.astype(jnp.int32))


def dequantize(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    channel_axis: int | None,
) -> jax.Array:
    """Map integer codes to real values, see `checked.dequantize`."""
    codes = jnp.asarray(codes).astype(jnp.int32)
    scale, zero_point = jnp.asarray(scale, jnp.float32), jnp.asarray(zero_point, jnp.int32)
    _check_channels("scale", scale, codes, channel_axis)
    _check_channels("zero_point", zero_point, codes, channel_axis)
    scale = along_channel(scale, codes.ndim, channel_axis)
    zero_point = along_channel(zero_point, codes.ndim, channel_axis)
    return (codes - zero_point).astype(jnp.float32) * scale


class _Rule(NamedTuple):
    """What is static about fake quantization."""

    qmin: int
    qmax: int
    keeps_input: bool
    """Whether the backward pass finds the mask anew, from the input, instead of keeping it."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(x: jax.Array, scale: jax.Array, zero_point: jax.Array, rule: _Rule) -> jax.Array:
    return _nearest(x, scale, zero_point, rule)


@partial(jax.jit, static_argnums=3)
def _nearest(x: jax.Array, scale: jax.Array, zero_point: jax.Array, rule: _Rule) -> jax.Array:
    codes = _codes(x.astype(jnp.float32), scale, zero_point)
    codes = lax.clamp(jnp.float32(rule.qmin), codes, jnp.float32(rule.qmax))
    return ((codes - zero_point.astype(jnp.float32)) * scale).astype(x.dtype)


def _inside(x: jax.Array, scale: jax.Array, zero_point: jax.Array, rule: _Rule) -> jax.Array:
    """Return whether each value is inside of the range.

    The codes are those of `_nearest`, in other words: what compilers find twice they compute once,
    and a quotient that both need would be stored as a float tensor between them.
    """
    x = x.astype(jnp.float32)
    quotient = lax.div(x, lax.select(lax.eq(x, x), jnp.broadcast_to(scale, x.shape), x))
    codes = _rint(quotient) + zero_point.astype(jnp.float32)
    return lax.eq(lax.clamp(jnp.float32(rule.qmin), codes, jnp.float32(rule.qmax)), codes)


@partial(jax.jit, static_argnums=3)
def _fake_quant_fwd(x, scale, zero_point, rule):
    y = _nearest(x, scale, zero_point, rule)
    if rule.keeps_input:
        return y, (x, scale, zero_point)
    return y, _packed(_inside(x, scale, zero_point, rule))


@partial(jax.jit, static_argnums=0)
def _fake_quant_bwd(rule, kept, g):
    if rule.keeps_input:
        x, scale, zero_point = kept
        inside = _inside(x, scale, zero_point, rule)
    else:
        inside = _unpacked(kept, g.shape)
    return lax.select(inside, g, lax.full_like(g, 0)), None, None


def _packed(mask: jax.Array) -> jax.Array:
    """Store a mask in the bits of bytes, along its last axis.

    Compilers fuse the comparison that makes a mask into what reads it, so that the backward pass
    would keep the whole float tensor for it; they do not fuse this reduction.
    """
    mask = jnp.atleast_1d(mask)
    whole = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % 8)])
    bits = whole.reshape(*mask.shape[:-1], -1, 8).astype(jnp.uint8)
    bits = bits << lax.broadcasted_iota(jnp.uint8, bits.shape, bits.ndim - 1)
    # The sum of bits that are apart is their union, and one that backends also take over devices,
    # where the last axis is divided among them: on CPUs XLA has no union there.
    return lax.reduce(bits, np.uint8(0), lax.add, (bits.ndim - 1,))


def _unpacked(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the mask of this shape that `_packed` stored."""
    shifts = lax.broadcasted_iota(jnp.uint8, (*packed.shape, 8), packed.ndim)
    bits = (packed[..., None] >> shifts) & np.uint8(1)
    mask = bits.reshape(*packed.shape[:-1], -1) != 0
    return mask[..., : shape[-1] if shape else 1].reshape(shape)


_fake_quant.defvjp(_fake_quant_fwd, _fake_quant_bwd)


def fake_quant(
    x: ArrayLike,
    lo: ArrayLike,
    hi: ArrayLike,
    spec: QuantSpec,
    channel_axis: int | None = -1,
    *,
    keeps_input: bool = False,
) -> jax.Array:
    """Round `x` to the grid that `spec` places on `[lo, hi]`, see `checked.fake_quant`.

    With `keeps_input` the backward pass takes `x` itself instead of a mask of bits: less work, and
    no more memory where `x` is kept for something else.
    """
    x = jnp.asarray(x)
    params = quant_params(lo, hi, spec)
    _check_channels("lo", params.scale, x, channel_axis)
    scale, zero_point = (along_channel(v, x.ndim, channel_axis) for v in params)
    return _fake_quant(x, scale, zero_point, _Rule(spec.qmin, spec.qmax, keeps_input))


@jax.custom_vjp
def straight_through(exact: jax.Array, simulated: jax.Array) -> jax.Array:
    """Return `exact`, with the gradient of `simulated` (which is dead code without one).

    Args:
      exact: the value, any shape.
      simulated: the differentiable stand-in, same shape and dtype.
    """
    del simulated
    return exact


straight_through.defvjp(
    lambda exact, simulated: (straight_through(exact, simulated), None),
    lambda _, g: (jnp.zeros_like(g), g),
)
