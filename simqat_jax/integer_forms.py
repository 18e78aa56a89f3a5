"""The integer form of each operation: from the codes of its inputs to the codes of its output."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax import integer_arithmetic as integer
from simqat_jax.config import QuantSpec
from simqat_jax.folding import batch_norm_state, folding_scale, running_affine, scaled_kernel
from simqat_jax.graph import LAYER_KINDS, Node
from simqat_jax.integer_arithmetic import Codes
from simqat_jax.numerics import (
    QuantParams,
    along_channel,
    dequantize,
    quant_params,
    rounded_product,
    true_divide,
)
from simqat_jax.planning import Quantizer, Step
from simqat_jax.replay import pointwise

_FREE = (-math.inf, math.inf)
_Output = tuple[QuantParams, QuantSpec, tuple[float, float]]


def integer_form(
    step: Step,
    inputs: Sequence[Codes | None],
    layer: tuple[Codes, jax.Array | None] | None,
    values: Mapping[str, Any],
    operands: Sequence[Any],
    params: QuantParams,
    spec: QuantSpec,
    backend: str,
) -> jax.Array | None:
    """Compute the codes of a step's output from those of its inputs.

    Args:
      step: a quantized step.
      inputs: the codes of each of its inputs; None for one that is no tensor on a grid.
      layer: for a Conv or Dense, what `deployed_layer` returns.
      values: for a BatchNorm its parameters and statistics, by name, real units.
      operands: each of its inputs in real units.
      params: the output's grid.
      spec: the output's width.
      backend: whose rounding to mirror.
    Returns: centered codes, NaN where int32 does not hold the sum; None where the step has no exact
      integer form: per-channel activations, a BatchNorm on batch statistics, too wide sums.
    """
    x = inputs[0]
    if x is None or spec.per_channel or x.spec.per_channel:
        return None
    if step.node.kind in ("elementwise", "clamp"):
        table = lookup_table(step.node, operands, x.params, x.spec, params, spec)
        index = x.codes.astype(jnp.int32) + x.params.zero_point - x.spec.qmin
        return jnp.take(table, index)
    output = (params, spec, step.clamp.bounds if step.clamp else _FREE)
    kind = step.node.kind
    if kind in LAYER_KINDS and layer is not None:
        return _linear(step, x, *layer, output)
    if kind == "batch_norm":
        return _batch_norm(step, x, values, output)
    if kind == "mean":
        return _mean(step, x, operands, output)
    if kind in ("add", "mul") and len(inputs) == 2 and inputs[1] is not None:
        if kind == "mul":
            return _mul(x, inputs[1], output, backend)
        return (_add_onnx if backend == "onnx" else _add)(step, x, inputs[1], output)
    return None


def deployed_layer(
    step: Step,
    values: Sequence[Mapping[str, Any]],
    quantize: Callable[[jax.Array], Codes],
    bn_fold: str,
    x_scale: jax.Array,
) -> tuple[Codes, jax.Array | None] | None:
    """Return the kernel's codes and the real bias of a Conv or Dense with BatchNorm folded in.

    `bn_fold = "none"` folds after quantizing: `|gamma| / sigma` goes into the scale and the sign
    into the codes. The other modes quantize the folded kernel.

    Args:
      step: the layer and what is fused behind it.
      values: for each node of the step its parameters and statistics, by name, real units.
      quantize: quantizes a kernel.
      bn_fold: the mode.
      x_scale: real units per code of the input.
    Returns: None for a BatchNorm on batch statistics.
    """
    layer = _folded_layer(step, values, quantize, bn_fold)
    if layer is None:
        return None
    kernel, bias = layer
    if bias is None:
        return layer
    flat = bias.reshape(-1)
    scale = jnp.broadcast_to(kernel.params.scale, flat.shape)
    codes, scale = _with_room_for_bias(kernel.codes.reshape(-1, flat.size), scale, flat, x_scale)
    params = QuantParams(scale, jnp.zeros(scale.shape, jnp.int32))
    return Codes(codes.reshape(kernel.codes.shape), params, kernel.spec), bias


def _folded_layer(
    step: Step,
    values: Sequence[Mapping[str, Any]],
    quantize: Callable[[jax.Array], Codes],
    bn_fold: str,
) -> tuple[Codes, jax.Array | None] | None:
    kernel, bias = values[0]["kernel"], values[0].get("bias")
    if step.batch_norm is None or step.batch_norm.layer is None:
        return quantize(kernel), bias
    if step.batch_norm.layer.training:
        return None
    module: Any = step.batch_norm.layer.module
    norm = batch_norm_state(values[1], module.epsilon)
    slope, shift = running_affine(norm)
    if bias is not None:
        shift = shift + rounded_product(bias.astype(jnp.float32), slope)
    if bn_fold == "none":
        plain = quantize(kernel)
        signed = plain.codes * along_channel(jnp.sign(slope), kernel.ndim, -1)
        scale = jnp.where(slope == 0, plain.params.scale, plain.params.scale * jnp.abs(slope))
        return Codes(signed, plain.params._replace(scale=scale), plain.spec), shift
    folded = quantize(scaled_kernel(kernel, folding_scale(norm)))
    alive = along_channel(norm.gamma != 0, kernel.ndim, -1)
    return folded._replace(codes=jnp.where(alive, folded.codes, 0.0)), shift


def deployed_arrays(
    step: Step,
    quantizer: Quantizer,
    bn_fold: str,
    values: Sequence[Mapping[str, jax.Array]],
    state: Any,
    mask: jax.Array | None,
    x_scale: jax.Array,
    y_scale: jax.Array,
) -> dict[str, jax.Array]:
    """Return a layer's integer arrays: kernel, scale, bias and multiplier.

    Of `step` nothing counts but the number of features and the epsilon of a BatchNorm: layers that
    have these in common share one compiled function.

    Args:
      step: the layer and what is fused behind it.
      quantizer: of its kernel.
      bn_fold: the mode.
      values: for each node of the step its parameters and statistics, by name, real units.
      state: the kernel's RangeState; None: the range is that of the present values.
      mask: of the kernel, or None.
      x_scale: real units per code of the input.
      y_scale: those of the output.
    """

    def quantized(kernel: jax.Array) -> Codes:
        flat = jnp.asarray(kernel).reshape(-1, quantizer.num_channels or 1)
        if state is not None:
            lo, hi = jnp.asarray(state.lo), jnp.asarray(state.hi)
        else:
            axis = None if quantizer.num_channels is None else 0
            hi = jnp.max(jnp.abs(flat), axis=axis)
            lo = -hi
        params = quant_params(lo, hi, quantizer.spec)
        codes = integer.centered_codes(flat, params, quantizer.spec)
        return Codes(codes.reshape(kernel.shape), params, quantizer.spec)

    layer = deployed_layer(step, values, quantized, bn_fold, x_scale)
    assert layer is not None
    kernel, bias = layer
    codes = kernel.codes if mask is None else kernel.codes * mask
    features = step.node.layer.module.features  # type: ignore[union-attr]
    count = features if isinstance(features, int) else math.prod(features)
    scale = jnp.broadcast_to(kernel.params.scale, (count,))
    unit = x_scale * scale
    bias = jnp.zeros(count) if bias is None else jnp.asarray(bias).reshape(-1)
    return {
        "kernel": codes.astype(np.int8 if quantizer.spec.num_bits <= 8 else np.int16),
        "scale": scale,
        "bias": integer.integer_bias(bias, unit),
        "multiplier": true_divide(unit, y_scale),
    }


def _linear(
    step: Step, x: Codes, kernel: Codes, bias: jax.Array | None, output: _Output
) -> jax.Array | None:
    """`rint(f32(acc + bias) * f32(s_x * s_w) / s_y)`."""
    assert step.node.layer is not None
    module: Any = step.node.layer.module
    sums = integer.linear(module, x.codes, kernel.codes, x.spec, kernel.spec)
    if sums is None:
        return None
    acc, approximate = sums
    unit = x.params.scale * kernel.params.scale
    rank = 1 if isinstance(module.features, int) else len(module.features)
    shape = (1,) * (acc.ndim - rank) + acc.shape[acc.ndim - rank :]

    def per_channel(v: jax.Array) -> jax.Array:
        return v if v.ndim == 0 else v.reshape(shape)

    added = 0 if bias is None else per_channel(integer.integer_bias(bias.reshape(-1), unit))
    multiplier = per_channel(true_divide(unit, output[0].scale))
    codes = integer.requantize(acc + added, multiplier, *output)
    if approximate is None:
        return codes
    held = jnp.abs(approximate + jnp.asarray(added, jnp.float32)) <= integer.MOST
    return jnp.where(held, codes, jnp.nan)


def _batch_norm(
    step: Step, x: Codes, values: Mapping[str, Any], output: _Output
) -> jax.Array | None:
    """A BatchNorm of its own: a 1x1 depthwise convolution, with one weight of +-127 a channel."""
    layer = step.node.layer
    if layer is None or layer.training or x.spec.num_bits > 16:
        return None
    module: Any = layer.module
    slope, shift = running_affine(batch_norm_state(values, module.epsilon))
    kernel, scale = channel_affine(slope, shift, x.params.scale)
    unit = x.params.scale * scale
    acc = (x.codes * along_channel(kernel, x.codes.ndim, -1)).astype(jnp.int32)
    acc = acc + along_channel(integer.integer_bias(shift, unit), acc.ndim, -1)
    multiplier = along_channel(true_divide(unit, output[0].scale), acc.ndim, -1)
    return integer.requantize(acc, multiplier, *output)


def lookup_table(
    node: Node,
    operands: Sequence[Any],
    x_params: QuantParams,
    x_spec: QuantSpec,
    params: QuantParams,
    spec: QuantSpec,
) -> jax.Array:
    """Return an elementwise function of each code, lowest first, as centered codes.

    Args:
      node: the function.
      operands: each of its inputs in real units; of the first only the dtype counts.
      x_params: the input's grid.
      x_spec: its width.
      params: the output's grid.
      spec: its width.
    """
    codes = jnp.arange(x_spec.qmin, x_spec.qmax + 1)
    x = dequantize(codes, *x_params, channel_axis=None).astype(operands[0].dtype)
    return integer.centered_codes(pointwise(node, [x, *operands[1:]]), params, spec, None)


def _mean(step: Step, x: Codes, operands: Sequence[Any], output: _Output) -> jax.Array | None:
    """`rint(sum(q - z_x) * f32(s_x / (s_y * n))) + z_y`."""
    node = step.node
    divisor = 1.0 if node.divisor is None else operands[-1]
    if np.size(divisor) != 1:
        return None
    divisor = jnp.asarray(divisor, jnp.float32).reshape(())
    adder = node.parts[0] if node.parts else node  # without the division behind it
    count = sum_count(node, x.codes.shape)
    total = integer.exact_sum(lambda codes: adder.run(codes)[0], x.codes, count, x.spec)
    if total is None:
        return None
    unit = true_divide(x.params.scale, rounded_product(output[0].scale, divisor))
    return integer.requantize(total, unit, *output)


def sum_count(node: Node, shape: Sequence[int]) -> int:
    """Return how many elements of a tensor of this shape a sum or pooled sum adds up."""
    params = node.eqn.params
    if "axes" in params:
        return math.prod(shape[axis] for axis in params["axes"])
    return math.prod(params["window_dimensions"])


def _add(step: Step, x: Codes, y: Codes, output: _Output) -> jax.Array | None:
    if max(x.spec.num_bits, y.spec.num_bits) > 8:
        return None
    sign = -1 if step.node.op == "sub" else 1
    scales = (x.params.scale, sign * y.params.scale)
    return integer.add(x.codes, y.codes, scales, *output)


def channel_affine(
    slope: jax.Array, shift: jax.Array, x_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return a weight for each channel and its scale: 127, 0 or -127 where the shift allows."""
    scale = jnp.where(slope == 0, 1.0, true_divide(jnp.abs(slope), 127.0))
    kernel, scale = _with_room_for_bias(jnp.sign(slope)[None] * 127, scale, shift, x_scale)
    return kernel[0], scale


def _with_room_for_bias(
    codes: jax.Array, scale: jax.Array, bias: jax.Array, x_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Coarsen the weights of channels that are too small for their bias.

    A bias counts in units of `x_scale * scale`. Where weights are so small that int32 does not hold
    it, they lose digits that no output shows; where all are zero, the scale is the bias's alone.

    Args:
      codes: of the kernel, (inputs, C).
      scale: of its channels, (C,), real units.
      bias: (C,), real units.
      x_scale: real units per code of the input.
    Returns: codes and scales.
    """
    magnitude = true_divide(jnp.abs(bias.astype(jnp.float32)), x_scale)
    dead = jnp.all(codes == 0, axis=0) & (magnitude > 0)
    least = jnp.where(dead, magnitude * 2.0**-23, magnitude * 2.0**-29)
    coarser = dead | (least > scale)
    new = jnp.where(coarser, jnp.maximum(least, 1e-30), scale)
    coarse = jnp.round(codes * true_divide(scale, new)[None])
    return jnp.where(coarser[None], coarse, codes), new


def _add_onnx(step: Step, x: Codes, y: Codes, output: _Output) -> jax.Array | None:
    if max(x.spec.num_bits, y.spec.num_bits) > 8:
        return None
    params, spec, bounds = output
    if step.node.op == "sub":
        codes = integer.subtract_onnxruntime(x.codes, y.codes, x.params, y.params, params)
    else:
        pairs = [(v.codes.astype(jnp.int32) + v.params.zero_point, v.params) for v in (x, y)]
        (a, a_params), (b, b_params) = pairs
        codes = integer.add_onnxruntime(
            a, b, *integer.add_onnxruntime_multipliers(a_params, b_params, params)
        )
    lo, hi = integer.code_bounds(bounds, params, spec)
    return jnp.clip(codes, lo, hi) - params.zero_point.astype(jnp.float32)


def _mul(x: Codes, y: Codes, output: _Output, backend: str) -> jax.Array | None:
    if not integer.product_fits(x.spec.num_bits, y.spec.num_bits):
        return None
    product = (x.codes * y.codes).astype(jnp.int32)
    unit = true_divide(x.params.scale * y.params.scale, output[0].scale)
    if backend == "tflite":
        return integer.requantize(product, unit, *output)
    params, spec, bounds = output
    codes = integer.multiply_onnxruntime(product, unit, params.zero_point)
    lo, hi = integer.code_bounds(bounds, params, spec)
    return jnp.clip(codes, lo, hi) - params.zero_point.astype(jnp.float32)
