"""Layers that multiply data by a kernel: convolutions and matrix products.

`y = clip(rint(f32(acc + bias) * m[c]) + z_y)`, `m[c] = f32(f32(s_x * s_w[c]) / s_y)`, `acc` exact.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from simqat_jax.ir.graph import Node, Product
from simqat_jax.ir.plan import Quantizer, Step
from simqat_jax.ir.program import Context, Op, Shape
from simqat_jax.numerics.affine import true_divide
from simqat_jax.numerics.exact_sums import MOST, linear
from simqat_jax.numerics.grid import Codes, Grid, centered_codes, grid_of_range
from simqat_jax.numerics.observers import Range
from simqat_jax.numerics.requantize import integer_bias, room_for_bias
from simqat_jax.ops.batch_norm import folded
from simqat_jax.ops.moves import Reshape, Transpose, reshaped
from simqat_jax.ops.operation import (
    Clamp,
    Demand,
    ExactStep,
    LoweredStep,
    Operation,
    Situation,
    on_last_axis,
    requantize,
)

Module = nn.Conv | nn.Dense | nn.DenseGeneral


def module_of(node: Node) -> Module:
    """Return the Flax layer of a product."""
    assert node.layer is not None and isinstance(node.layer.module, Module)
    return node.layer.module


class Deployed(NamedTuple):
    """A layer as it is deployed, with the BatchNorm behind it folded in.

    Attributes:
      kernel: its codes.
      bias: real units, None for a layer without.
    """

    kernel: Codes
    bias: jax.Array | None


def deployed(
    step: Step,
    layers: Sequence[Mapping[str, jax.Array]],
    quantize: Callable[[jax.Array], Codes],
    x_scale: jax.Array,
) -> Deployed | None:
    """Fold and quantize a layer.

    Args:
      step: the layer and what is fused behind it.
      layers: for each layer of the step its parameters and statistics, by name, real units.
      quantize: quantizes a kernel.
      x_scale: real units per code of the input.

    Returns:
      None for a BatchNorm on batch statistics.
    """
    kernel, bias = layers[0]["kernel"], layers[0].get("bias")
    if step.norm is None:
        codes = quantize(kernel)
    elif step.norm.training:
        return None
    else:
        norm = step.norm.module
        codes, bias = folded(layers[1], norm.epsilon, kernel, bias, quantize, step.fold)
    if bias is None:
        return Deployed(codes, None)
    flat = bias.reshape(-1)
    scale = jnp.broadcast_to(codes.grid.params.scale, flat.shape)
    whole, scale = room_for_bias(codes.codes.reshape(-1, flat.size), scale, flat, x_scale)
    grid = dataclasses.replace(codes.grid, scale=scale, zero_point=jnp.zeros(scale.shape, int))
    return Deployed(Codes(whole.reshape(codes.codes.shape), grid), bias)


def deployed_arrays(
    step: Step,
    quantizer: Quantizer,
    layers: Sequence[Mapping[str, jax.Array]],
    kernel_range: Range | None,
    mask: jax.Array | None,
    x_scale: jax.Array,
    y_scale: jax.Array,
) -> dict[str, jax.Array]:
    """Return a layer's integer arrays: kernel, scale, bias and multiplier.

    Of `step` nothing counts but the number of features, the fold mode and the epsilon of a
    BatchNorm: layers that have these in common share one compiled function.

    Args:
      step: the layer and what is fused behind it.
      quantizer: of its kernel.
      layers: for each layer of the step its parameters and statistics, by name, real units.
      kernel_range: the kernel's range; None: that of the present values.
      mask: of the kernel, or None.
      x_scale: real units per code of the input.
      y_scale: those of the output.
    """
    layer = deployed(step, layers, partial(kernel_codes, quantizer, kernel_range), x_scale)
    assert layer is not None and isinstance(step.node, Product)
    codes = layer.kernel.codes if mask is None else layer.kernel.codes * mask
    count = step.node.num_channels
    scale = jnp.broadcast_to(layer.kernel.grid.params.scale, (count,))
    unit = x_scale * scale
    bias = jnp.zeros(count) if layer.bias is None else jnp.asarray(layer.bias).reshape(-1)
    return {
        "kernel": codes.astype(np.int8 if quantizer.spec.num_bits <= 8 else np.int16),
        "scale": scale,
        "bias": integer_bias(bias, unit),
        "multiplier": true_divide(unit, y_scale),
    }


def kernel_codes(quantizer: Quantizer, kernel_range: Range | None, kernel: jax.Array) -> Codes:
    """Quantize a kernel, viewed as (inputs, output channels).

    Args:
      quantizer: the kernel's.
      kernel_range: its range; None: that of the present values.
      kernel: real units, output channels last.
    """
    flat = jnp.asarray(kernel).reshape(-1, quantizer.num_channels or 1)
    ends = quantizer.observer.present_range(flat) if kernel_range is None else kernel_range
    grid = grid_of_range(*ends, quantizer.spec)
    return Codes(centered_codes(flat, grid).reshape(kernel.shape), grid)


class ProductOperation(Operation):
    """What a Conv, Dense or DenseGeneral is on integers."""

    fuses_clamp = True

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        return Demand(needed=data[:1])

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        return True

    def codes(self, at: ExactStep) -> jax.Array | None:
        x = at.inputs[0]
        if x is None:
            return None
        layer = deployed(at.step, at.layers, at.quantize_kernel, x.grid.params.scale)
        if layer is None:
            return None
        node, kernel = at.step.node, layer.kernel
        assert isinstance(node, Product)
        fan_in = kernel.codes.size // node.num_channels
        sums = linear(partial(_linear, module_of(node)), x, kernel, fan_in)
        if sums is None:
            return None
        acc, approximate = sums
        unit = x.grid.params.scale * kernel.grid.params.scale
        channels = acc.ndim - len(node.features)
        shape = (1,) * channels + acc.shape[channels:]

        def per_channel(v: jax.Array) -> jax.Array:
            return v if v.ndim == 0 else v.reshape(shape)

        no_bias = jnp.zeros((), jnp.int32)
        flat = None if layer.bias is None else layer.bias.reshape(-1)
        added = no_bias if flat is None else per_channel(integer_bias(flat, unit))
        multiplier = per_channel(true_divide(unit, at.grid.params.scale))
        codes = at.requantized(acc + added, multiplier)
        if approximate is None:
            return codes
        held = jnp.abs(approximate + added.astype(jnp.float32)) <= MOST
        return jnp.where(held, codes, jnp.nan)

    def lower(self, at: LoweredStep) -> bool:
        lower = _lower_conv if isinstance(module_of(at.node), nn.Conv) else _lower_dense
        lower(at, _arrays(at))
        return True


def _linear(module: Module, x: jax.Array, kernel: jax.Array) -> jax.Array:
    plain = module.clone(use_bias=False, dtype=jnp.float32, precision=lax.Precision.HIGHEST)
    result: Any = plain.apply({"params": {"kernel": kernel}}, x)
    return result


# Into the program --------------------------------------------------------------------------------


def _arrays(at: LoweredStep) -> dict[str, np.ndarray]:
    """Return kernel codes, and for each channel scale, bias and multiplier."""
    quantizer, module, norm = (
        at.placement.kernel_of(at.node),
        module_of(at.node),
        at.step.norm,
    )
    assert quantizer is not None and isinstance(at.node, Product)
    epsilon = norm and norm.module.epsilon
    key = (at.node.features, quantizer.spec, quantizer.num_channels, at.step.fold, epsilon)
    if key not in at.compiled:
        at.compiled[key] = jax.jit(partial(deployed_arrays, at.step, quantizer))
    kernel_range = at.ranges[quantizer.name] if quantizer.has_state else None
    mask = module.mask if isinstance(module, nn.Conv) else None
    scales = at.in_grid().params.scale, at.out_grid.params.scale
    values = at.layer_values()
    arrays = jax.device_get(at.compiled[key](values, kernel_range, mask, *scales))
    at.check_unit(at.in_grid().scale, arrays["scale"])
    return arrays


def _check_sums(at: LoweredStep, arrays: Mapping[str, np.ndarray]) -> None:
    kernel, bias = arrays["kernel"], arrays["bias"]
    grid = at.in_grid()
    sums = np.abs(kernel.astype(np.int64)).reshape(-1, kernel.shape[-1]).sum(axis=0)
    largest = int(np.max(sums * grid.largest + np.abs(bias.astype(np.int64))))
    if largest > MOST:
        raise ValueError(
            f"{'/'.join(at.node.path)}: its sums may reach {largest}, more than 32 bits "
            f"hold, with activations of {grid.num_bits} bits and {kernel.dtype} weights. Use "
            "fewer bits, or exclude the layer."
        )


def _convolution(eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Return the convolution inside a Flax layer."""
    found = [eqn]
    while found[0].primitive.name != "conv_general_dilated":
        first = found.pop(0)
        found += [e for sub in core.jaxprs_in_params(first.params) for e in sub.eqns]
    return found[0]


def _lower_conv(at: LoweredStep, arrays: dict[str, np.ndarray]) -> None:
    _check_sums(at, arrays)
    kernel, params = arrays["kernel"], _convolution(at.node.eqn).params
    padding, mode = _padding(module_of(at.node), params, kernel.shape)
    fields = {
        "strides": tuple(params["window_strides"]),
        "padding": padding,
        "pad_mode": mode,
        "input_dilation": tuple(params["lhs_dilation"]),
        "kernel_dilation": tuple(params["rhs_dilation"]),
        "groups": int(params["feature_group_count"]),
        "clamp": at.clamp,
        "arrays": arrays,
    }
    source, rank = at.input(), kernel.ndim
    shape, out = at.shape_of(source), at.builder.shape(at.step.output)
    if len(shape) == rank:
        at.emit(Conv, (source,), **fields)
        return
    # Flax flattens all batch axes into one.
    leading = shape[: len(shape) - rank + 1]
    lead = abs(math.prod(leading)) * (-1 if any(d < 0 for d in leading) else 1)
    flat = reshaped(at, source, (lead, *shape[len(shape) - rank + 1 :]))
    conv = at.between(Conv, flat, (lead, *out[len(out) - rank + 1 :]), at.out_grid, **fields)
    at.emit(Reshape, (conv,))


Pads = tuple[tuple[int, int], ...]


def _padding(
    module: Module, params: Mapping[str, Sequence[Sequence[int]]], shape: Shape
) -> tuple[Pads, Literal["constant", "wrap", "reflect"]]:
    """Return what a convolution pads, and with what: Flax itself pads in modes of its own."""
    own = module.padding if isinstance(module, nn.Conv) else None
    if not isinstance(own, str) or own not in ("CIRCULAR", "REFLECT", "CAUSAL"):
        return tuple((int(lo), int(hi)) for lo, hi in params["padding"]), "constant"
    dilation: Sequence = params["rhs_dilation"]
    lengths = [(k - 1) * d + 1 for k, d in zip(shape[:-2], dilation, strict=True)]
    if own == "CAUSAL":
        return ((lengths[0] - 1, 0),), "constant"
    pads = tuple(((k - 1) // 2, k // 2) for k in lengths)
    return pads, "wrap" if own == "CIRCULAR" else "reflect"


def _lower_dense(at: LoweredStep, arrays: dict[str, np.ndarray]) -> None:
    source, grid = at.input(), at.in_grid()
    shape, module = at.shape_of(source), module_of(at.node)
    own = module.axis if isinstance(module, nn.DenseGeneral) else -1
    axes = [a % len(shape) for a in ((own,) if isinstance(own, int) else own)]
    kept = [a for a in range(len(shape)) if a not in axes]
    order = (*kept, *axes)
    if order != tuple(range(len(shape))):
        moved = tuple(shape[a] for a in order)
        source = at.between(Transpose, source, moved, grid, permutation=order)
    depth = math.prod(shape[a] for a in axes)
    lead = tuple(shape[a] for a in kept)
    source = reshaped(at, source, (*lead, depth))
    kernel = arrays["kernel"] = arrays["kernel"].reshape(depth, -1)
    _check_sums(at, arrays)
    rows = (*lead, kernel.shape[1])
    if at.builder.shape(at.step.output) == rows:
        at.emit(Dense, (source,), clamp=at.clamp, arrays=arrays)
        return
    flat = at.between(Dense, source, rows, at.out_grid, clamp=at.clamp, arrays=arrays)
    at.emit(Reshape, (flat,))


# Operations of the program -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """A convolution of (batch, spatial ..., channels) with a kernel (spatial ..., in, out).

    Arrays: "kernel", "scale", "bias" and "multiplier" of each output channel.
    """

    kinds = ("conv",)
    strides: tuple[int, ...]
    padding: Pads
    pad_mode: Literal["constant", "wrap", "reflect"]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    clamp: Clamp

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        spatial = "DHW"[-len(self.strides) :]
        kernel = c.arrays["kernel"]
        acc = lax.conv_general_dilated(
            self._padded(x, c.in_grid()),
            kernel.astype(x.dtype),
            self.strides,
            "VALID",
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.groups,
            preferred_element_type=jnp.int32,
        )
        bias = _offset_bias(c, tuple(range(kernel.ndim - 1)))
        return (requantize(c, acc + on_last_axis(bias, acc), self.clamp),)

    def _padded(self, x: jax.Array, grid: Grid) -> jax.Array:
        if self.pad_mode != "constant":
            return jnp.pad(x, [(0, 0), *self.padding, (0, 0)], mode=self.pad_mode)
        zero = np.asarray(grid.stored_zero, x.dtype)
        steps = [d - 1 for d in self.input_dilation]
        inner = [(lo, hi, s) for (lo, hi), s in zip(self.padding, steps, strict=True)]
        return lax.pad(x, zero, [(0, 0, 0), *inner, (0, 0, 0)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Op):
    """A matrix product of (..., in) with a kernel (in, out); arrays as of a convolution."""

    kinds = ("dense",)
    clamp: Clamp

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        kernel = c.arrays["kernel"].astype(x.dtype)
        dims = (((x.ndim - 1,), (0,)), ((), ()))
        acc = lax.dot_general(x, kernel, dims, preferred_element_type=jnp.int32)
        return (requantize(c, acc + on_last_axis(_offset_bias(c, (0,)), acc), self.clamp),)


def _offset_bias(c: Context, axes: tuple[int, ...]) -> jax.Array:
    """The bias for codes as they are stored: less zero point times the kernel's sums."""
    sums = jnp.sum(c.arrays["kernel"].astype(jnp.int32), axis=axes)
    return c.arrays["bias"] - c.in_grid().stored_zero * sums


OPERATIONS = {Product: ProductOperation()}
PROGRAM_OPERATIONS = (Conv, Dense)
