"""The numerics as users call them: what they pass is checked, then `affine`, `observers` compute.

Values are checked where they are at hand: under `jit` types and shapes alone are.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from simqat_jax.numerics import affine, folding, observers
from simqat_jax.numerics.affine import CodeRange, QuantParams
from simqat_jax.numerics.arguments import (
    check_axis,
    check_code_range,
    check_codes,
    check_ends,
    check_flag,
    check_floats,
    check_kind,
    check_mapping,
    check_real,
    check_scale,
    check_spec,
    check_whole,
    check_zero_point,
    shown,
)
from simqat_jax.numerics.observers import RangeState
from simqat_jax.numerics.spec import QuantSpec


def quant_params(lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> QuantParams:
    """Place the grid of `spec` on a range.

    The range is widened to hold zero. Asymmetric: `scale = (hi - lo) / (qmax - qmin)`,
    `zero_point = clip(rint(qmin - lo / scale), qmin, qmax)`. Symmetric:
    `scale = max(|lo|, |hi|) / (2^(num_bits-1) - 1)`, zero point 0.

    Args:
      lo: lowest value, real units, shape () or (C,).
      hi: highest value, real units, same shape.
      spec: width and kind of the grid.

    Returns:
      QuantParams of shape () or (C,). An all-zero or empty range gives scale 1.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: `lo` and `hi` of different shapes, or with more than one axis; `lo` above
        `hi`; NaN or Inf, but for the empty range of `init_range`.

    Examples:
      >>> quant_params(-1.0, 1.0, QuantSpec(symmetric=True, narrow_range=True)).zero_point
      Array(0, dtype=int32)

    Source:
      Jacob et al., arXiv:1712.05877, section 3. The source system clips the largest positive
      symmetric weight and divides by zero for a dead channel; this does neither.
    """
    check_spec(spec)
    check_ends(lo, hi, finite=True)
    return affine.quant_params(lo, hi, spec)


def quantize(
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    spec: CodeRange,
    channel_axis: int | None = -1,
) -> jax.Array:
    """Map real values to integer codes: `clip(rint(x / scale) + zero_point, qmin, qmax)`.

    Round half to even, then add the zero point, then clip.

    Args:
      x: values, real units, any shape and float dtype (computed in float32).
      scale: shape () or (C,), real units per code.
      zero_point: same shape, integer codes.
      spec: gives `qmin` and `qmax`.
      channel_axis: the axis of `x` with C entries; None: per tensor.

    Returns:
      Int32 codes of x's shape. NaN has no code and becomes the zero point.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: shapes that do not fit; a scale that is not finite and above 0; a zero point that
        is no code.

    Examples:
      >>> spec = QuantSpec()
      >>> quantize([0.0, 0.2, 1.0], *quant_params(0.0, 1.0, spec), spec)
      Array([  0,  51, 255], dtype=int32)

    Source:
      ONNX operator QuantizeLinear.
    """
    check_real("x", x)
    check_scale(scale)
    check_code_range(spec)
    check_zero_point(zero_point, spec.qmin, spec.qmax)
    check_axis(channel_axis)
    return affine.quantize(x, scale, zero_point, spec, channel_axis)


def dequantize(
    codes: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    channel_axis: int | None = -1,
) -> jax.Array:
    """Map integer codes to real values: `(codes - zero_point) * scale`.

    Args:
      codes: integer codes, any shape and integer dtype.
      scale: shape () or (C,), real units per code.
      zero_point: same shape, integer codes.
      channel_axis: the axis of `codes` with C entries; None: per tensor.

    Returns:
      Float32 values of the shape of `codes`, real units.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: shapes that do not fit; a scale that is not finite and above 0.

    Examples:
      >>> dequantize([0, 128, 255], 0.5, 128)
      Array([-64. ,   0. ,  63.5], dtype=float32)

    Source:
      ONNX operator DequantizeLinear.
    """
    check_codes("codes", codes)
    check_scale(scale)
    check_codes("zero_point", zero_point)
    check_axis(channel_axis)
    return affine.dequantize(codes, scale, zero_point, channel_axis)


def fake_quant(
    x: ArrayLike,
    lo: ArrayLike,
    hi: ArrayLike,
    spec: QuantSpec,
    channel_axis: int | None = -1,
) -> jax.Array:
    """Round `x` to the grid that `spec` places on `[lo, hi]`: `dequantize(quantize(x))`.

    Gradient: the straight-through estimator passes the gradient to `x` unchanged where
    `qmin <= rint(x / scale) + zero_point <= qmax` and blocks it elsewhere; `lo` and `hi` get none.

    Args:
      x: values, real units, any shape and float dtype (computed in float32).
      lo: lowest value of the range, real units, shape () or (C,).
      hi: highest value, same shape.
      spec: width and kind of the grid.
      channel_axis: the axis of `x` with C entries; None: per tensor.

    Returns:
      Values of x's shape and dtype, each on the grid. NaN stays NaN.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: shapes that do not fit; `lo` above `hi`; NaN or Inf in them, but for an empty
        range.

    Examples:
      >>> fake_quant(jnp.array([-1.0, 0.3, 9.0]), 0.0, 3.0, QuantSpec(num_bits=2))
      Array([0., 0., 3.], dtype=float32)

    Source:
      Krishnamoorthi, arXiv:1806.08342, section 2.4.
    """
    check_floats("x", x)
    check_ends(lo, hi, finite=True)
    check_spec(spec)
    check_axis(channel_axis)
    return affine.fake_quant(x, lo, hi, spec, channel_axis)


# Ranges ------------------------------------------------------------------------------------------


def init_range(num_channels: int | None = None, *, nonnegative: bool = False) -> RangeState:
    """Return the empty range.

    Args:
      num_channels: one range for each of so many channels; None: one per tensor.
      nonnegative: the tensor holds nothing below zero: its range starts at zero and stays there.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: `num_channels` below 1.

    Examples:
      >>> observed(init_range())
      Array(False, dtype=bool)
    """
    if num_channels is not None:
        check_whole("num_channels", num_channels, 1, ", or None for one range per tensor")
    check_flag("nonnegative", nonnegative)
    return observers.init_range(num_channels, nonnegative=nonnegative)


def observed(state: RangeState) -> jax.Array:
    """Tell whether the range has seen a finite batch: bool, shape ().

    Raises:
      TypeError: no RangeState.
    """
    _check_state(state)
    return observers.observed(state)


def update_range(state: RangeState, lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> RangeState:
    """Take one batch's extremes into the state.

    `ema`: `new = decay * old + (1 - decay) * batch`, the first batch initialises; `minmax`:
    running extremes; `batch`: the batch's own.

    Args:
      state: the state before.
      lo: lowest value of the batch, real units, shape of `state.lo`.
      hi: highest value, same shape.
      spec: names the observer, one of these, and its decay.

    Returns:
      The state after; unchanged but for `nonfinite + 1` if any extreme is NaN or Inf.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: a shape other than the state's; `lo` above `hi`; another observer.

    Examples:
      >>> update_range(init_range(), -1.0, 2.0, QuantSpec()).hi
      Array(2., dtype=float32)

    Source:
      Krishnamoorthi, arXiv:1806.08342, section 3. The source system weighs old and new the other
      way round.
    """
    _check_state(state)
    check_ends(lo, hi, finite=False)
    check_spec(spec)
    return observers.update_range(state, lo, hi, spec)


def observe(
    state: RangeState, x: ArrayLike, spec: QuantSpec, channel_axis: int | None = -1
) -> RangeState:
    """Take the extremes of `x` into the state: `update_range(state, min(x), max(x), spec)`.

    Args:
      state: the state before, from `init_range` or an earlier `observe`.
      x: values, real units, any shape and float dtype.
      spec: names the observer, `ema`, `minmax` or `batch`; `per_channel` keeps `channel_axis`.
      channel_axis: the channel axis of `x` where `spec.per_channel`.

    Returns:
      The state after.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: `x` is empty, `spec.per_channel` and `x` has no such axis, or another observer.

    Examples:
      >>> observe(init_range(), jnp.array([0.5, 2.0]), QuantSpec()).lo
      Array(0.5, dtype=float32)
    """
    _check_state(state)
    check_real("x", x)
    check_spec(spec)
    check_axis(channel_axis)
    return observers.observe(state, x, spec, channel_axis)


def _check_state(state: RangeState) -> None:
    remedy = "Start with init_range(); of a restored dictionary make one with RangeState(**state)."
    check_kind("state", state, RangeState, remedy)
    for field in RangeState._fields:
        check_real(f"state.{field}", getattr(state, field))


# BatchNorm ---------------------------------------------------------------------------------------


def fold_batch_norm(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    bn_params: Mapping[str, ArrayLike],
    bn_stats: Mapping[str, ArrayLike],
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Fold a BatchNorm into the layer before it, as for inference.

    `kernel * gamma / sigma`, `beta + (bias - mean) * gamma / sigma`.

    Args:
      kernel: of a Conv or Dense, output channels last, (..., C).
      bias: (C,), or None for a layer without.
      bn_params: "scale" and "bias" of the BatchNorm, (C,), either may be missing.
      bn_stats: its running "mean" and "var", (C,).
      epsilon: the BatchNorm's.

    Returns:
      Kernel and bias of the one layer that computes both, float32.

    Raises:
      TypeError: an argument of the wrong type.
      ValueError: missing statistics, or shapes that do not fit; a negative variance or `epsilon`;
        values that are none of a BatchNorm's.

    Examples:
      >>> kernel, bias = fold_batch_norm(
      ...     jnp.ones((2, 1)), None, {"scale": jnp.array([3.0])},
      ...     {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}, 0.0)
      >>> kernel[:, 0], bias
      (Array([1.5, 1.5], dtype=float32), Array([-1.5], dtype=float32))

    Source:
      Jacob et al., arXiv:1712.05877, section 3.2.
    """
    check_real("kernel", kernel)
    if not np.ndim(kernel):
        raise ValueError("kernel must have output channels as its last axis, got a single number.")
    if bias is not None:
        check_real("bias", bias)
    for name, values, known in (
        ("bn_params", bn_params, {"scale", "bias"}),
        ("bn_stats", bn_stats, {"mean", "var"}),
    ):
        check_mapping(name, values, f"Pass the BatchNorm's {' and '.join(sorted(known))}.")
        if strangers := sorted(map(str, values.keys() - known)):
            raise ValueError(f"{name} holds {strangers}, and may hold {sorted(known)} alone.")
        for key, value in values.items():
            check_real(f"{name}[{key!r}]", value)
    check_real("epsilon", epsilon)
    if np.ndim(epsilon):
        raise ValueError(f"epsilon must be a single number, got {shown(epsilon)}.")
    _check_not_negative("epsilon", epsilon)
    _check_not_negative("bn_stats['var']", bn_stats.get("var", 0.0))
    return folding.fold_batch_norm(kernel, bias, bn_params, bn_stats, epsilon)


def _check_not_negative(name: str, value: ArrayLike) -> None:
    if not isinstance(value, Tracer) and not np.all(np.asarray(value) >= 0):
        raise ValueError(f"{name} must be 0 or more, got {shown(value)}.")
