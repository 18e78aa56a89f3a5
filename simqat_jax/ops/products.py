"""Layers that multiply data by a kernel: convolutions and matrix products.

`y = clip(rint(f32(acc + bias) * m[c]) + z_y)`, `m[c] = f32(f32(s_x * s_w[c]) / s_y)`, `acc` exact.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.ir.graph import Node, Product, shape_of
from simqat_jax.ir.plan import Quantizer, Step
from simqat_jax.ir.program import Context, Need, Op, Shape, joined
from simqat_jax.numerics.affine import true_divide
from simqat_jax.numerics.contraction import integer_dot
from simqat_jax.numerics.convolution import convolve, padded
from simqat_jax.numerics.exact_sums import MOST, linear
from simqat_jax.numerics.folding import magnitudes, scaled_kernel
from simqat_jax.numerics.grid import (
    Codes,
    Grid,
    KernelCodes,
    QuantizeKernel,
    centered_codes,
    grid_of_range,
)
from simqat_jax.numerics.observers import Range
from simqat_jax.numerics.requantize import integer_bias, room_for_bias
from simqat_jax.ops.batch_norm import folded
from simqat_jax.ops.moves import Reshape, Transpose, reshaped, turned
from simqat_jax.ops.operation import (
    Clamp,
    Demand,
    Everywhere,
    ExactStep,
    LoweredStep,
    Operation,
    Situation,
    of_channels,
    on_last_axis,
    requantize,
)


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
    quantize: QuantizeKernel,
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
        codes = quantize(kernel, None)
    elif step.norm.training:
        return None
    else:
        norm = step.norm.module
        codes, bias = folded(layers[1], norm.epsilon, kernel, bias, quantize, step.fold)
    if bias is None:
        return Deployed(Codes(codes.codes, codes.grid), None)
    flat = bias.reshape(-1)
    scale = jnp.broadcast_to(codes.grid.params.scale, flat.shape)
    rows = codes.codes.reshape(-1, flat.size)
    whole, scale = room_for_bias(rows, codes.dead, scale, flat, x_scale)
    grid = dataclasses.replace(codes.grid, scale=scale, zero_point=jnp.zeros(scale.shape, int))
    return Deployed(Codes(whole.reshape(codes.codes.shape), grid), bias)


def deployed_arrays(
    step: Step,
    quantizer: Quantizer,
    layers: Sequence[Mapping[str, jax.Array]],
    kernel_range: Range | None,
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
      x_scale: real units per code of the input.
      y_scale: those of the output.
    """
    assert isinstance(step.node, Product)
    count = step.node.num_channels
    quantize = partial(kernel_codes, quantizer, count, kernel_range)
    layer = deployed(step, layers, quantize, x_scale)
    assert layer is not None
    scale = jnp.broadcast_to(layer.kernel.grid.params.scale, (count,))
    unit = x_scale * scale
    bias = jnp.zeros(count) if layer.bias is None else jnp.asarray(layer.bias).reshape(-1)
    return {
        "kernel": layer.kernel.codes.astype(np.int8 if quantizer.spec.num_bits <= 8 else np.int16),
        "scale": scale,
        "bias": integer_bias(bias, unit),
        "multiplier": true_divide(unit, y_scale),
    }


def kernel_codes(
    quantizer: Quantizer,
    channels: int,
    kernel_range: Range | None,
    kernel: jax.Array,
    factor: jax.Array | None = None,
) -> KernelCodes:
    """Quantize a kernel, viewed as (inputs, output channels).

    Args:
      quantizer: the kernel's.
      channels: how many output channels there are.
      kernel_range: its range; None: that of the present values.
      kernel: real units, output channels last.
      factor: (C,), what each output channel is multiplied by first; None: by nothing.
    """
    flat = jnp.asarray(kernel).reshape(-1, channels)
    observer = quantizer.observer
    ends = observer.scaled_range(flat, factor) if kernel_range is None else kernel_range
    grid = grid_of_range(*ends, quantizer.spec)
    codes = centered_codes(scaled_kernel(flat, factor), grid)
    dead = centered_codes(magnitudes(flat, factor), grid) == 0
    return KernelCodes(codes.reshape(kernel.shape), grid, dead)


class ProductOperation(Operation):
    """What a product of data and a kernel is on integers."""

    fuses_clamp = True

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        return Demand(needed=data[:1])

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        return True

    def codes(self, at: ExactStep) -> jax.Array | Everywhere | None:
        x = at.inputs[0]
        if x is None:
            return None
        layer = deployed(at.step, at.layers, at.quantize_kernel, x.grid.params.scale)
        if layer is None:
            return None
        node, kernel = at.step.node, layer.kernel
        assert isinstance(node, Product)
        fan_in = kernel.codes.size // node.num_channels
        sums = linear(node.multiplied, x, kernel, fan_in, node.contraction.summed_length)
        if sums is None:
            return None
        acc, approximate = sums
        unit = x.grid.params.scale * kernel.grid.params.scale
        shape = [n if axis in node.channel_axes else 1 for axis, n in enumerate(acc.shape)]

        def per_channel(v: jax.Array) -> jax.Array:
            return v if v.ndim == 0 else v.reshape(shape)

        no_bias = jnp.zeros((), jnp.int32)
        flat = None if layer.bias is None else layer.bias.reshape(-1)
        added = no_bias if flat is None else per_channel(integer_bias(flat, unit))
        multiplier = per_channel(true_divide(unit, at.grid.params.scale))
        codes = at.requantized(acc + added, multiplier)
        if approximate is None:
            return Everywhere(codes)
        held = jnp.abs(approximate + added.astype(jnp.float32)) <= MOST
        return jnp.where(held, codes, jnp.nan)

    def lower(self, at: LoweredStep) -> bool:
        assert isinstance(at.node, Product)
        lower = _lower_conv if at.node.contraction.convolves else _lower_dense
        lower(at, at.node, _arrays(at, at.node))
        return True


# Into the program --------------------------------------------------------------------------------


def _arrays(at: LoweredStep, node: Product) -> dict[str, np.ndarray]:
    """Return kernel codes, and for each channel scale, bias and multiplier."""
    quantizer, norm = at.placement.weights[node], at.step.norm
    epsilon = norm and norm.module.epsilon
    kernel_range = at.ranges[quantizer.name] if quantizer.has_state else None
    scales = at.in_grid().params.scale, at.out_grid.params.scale
    arrays = at.shared.arrays(
        (node.features, quantizer.spec, quantizer.num_channels, at.step.fold, epsilon),
        partial(deployed_arrays, at.step, quantizer),
        at.layer_operands(),
        (*(kernel_range or ()), *scales),
        lambda: (at.layer_values(), kernel_range, *scales),
    )
    at.check_unit(at.in_grid().scale, arrays["scale"])
    return arrays


def _check_sums(at: LoweredStep, arrays: Mapping[str, np.ndarray]) -> None:
    kernel, bias = arrays["kernel"], arrays["bias"]
    grid = at.in_grid()
    rows = np.abs(kernel, dtype=np.int32).reshape(-1, kernel.shape[-1])
    sums = rows.sum(axis=0, dtype=np.int64)
    largest = int(np.max(sums * grid.largest + np.abs(bias.astype(np.int64))))
    if largest > MOST:
        raise ValueError(
            f"{'/'.join(at.node.path)}: its sums may reach {largest}, more than 32 bits "
            f"hold, with activations of {grid.num_bits} bits and {kernel.dtype} weights. Use "
            "fewer bits, or exclude the layer."
        )


Pads = tuple[tuple[int, int], ...]


def _lower_conv(at: LoweredStep, node: Product, arrays: dict[str, np.ndarray]) -> None:
    _check_sums(at, arrays)
    params = node.contraction.eqn.params
    fields = {
        "strides": tuple(params["window_strides"]),
        "padding": _padding(node),
        "input_dilation": tuple(params["lhs_dilation"]),
        "kernel_dilation": tuple(params["rhs_dilation"]),
        "groups": int(params["feature_group_count"]),
        "clamp": at.clamp,
        "arrays": arrays,
    }
    source, result = at.input(), _result(at, node)
    for flattened in (n for n in node.before if n.primitive == "reshape"):
        source = reshaped(at, source, at.builder.dims(shape_of(flattened.eqn.outvars[0]).shape))
    _emit(at, Conv, source, result, _Order(result, node.order), fields)


class _Order(NamedTuple):
    """Lengths of a result, and the order in which its axes leave."""

    shape: Shape
    order: tuple[int, ...]


def _result(at: LoweredStep, node: Product) -> Shape:
    return at.builder.dims(shape_of(node.contraction.eqn.outvars[0]).shape)


def _emit(
    at: LoweredStep, op: type[Op], source: int, flat: Shape, last: _Order, fields: dict[str, Any]
) -> None:
    """Add an operation, and what gives its result the shape and order of the product's.

    Args:
      at: the product.
      op: the operation.
      source: the tensor that it reads.
      flat: the shape that it computes.
      last: the shape of the whole result, and the order of its axes.
      fields: of the operation.
    """
    out, grid = at.builder.shape(at.step.output), at.out_grid
    in_order = last.order == tuple(range(len(last.order)))
    if in_order and flat == out:
        at.emit(op, (source,), **fields)
        return
    v = at.between(op, source, flat, grid, **fields)
    if not in_order:
        v, turned = reshaped(at, v, last.shape), tuple(last.shape[a] for a in last.order)
        if turned == out:
            at.emit(Transpose, (v,), permutation=last.order)
            return
        v = at.between(Transpose, v, turned, grid, permutation=last.order)
    at.emit(Reshape, (v,))


def _padding(node: Product) -> Pads:
    """Return what is padded with zeros, by the convolution and in front of it."""
    sides = np.asarray(node.contraction.eqn.params["padding"])
    for pad in (n for n in node.before if n.primitive == "pad"):
        config = pad.eqn.params["padding_config"]
        sides = sides + [(lo, hi) for lo, hi, _ in config[-len(sides) - 1 : -1]]
    return tuple((int(lo), int(hi)) for lo, hi in sides)


def _lower_dense(at: LoweredStep, node: Product, arrays: dict[str, np.ndarray]) -> None:
    (sums, _), (batch, _) = node.contraction.eqn.params["dimension_numbers"]
    source = at.input()
    shape = at.shape_of(source)
    rows = tuple(a for a in range(len(shape)) if a not in (*sums, *batch))
    order = (*rows, *batch, *sums)
    source = turned(at, source, order)
    depth, groups = (math.prod(shape[a] for a in axes) for axes in (sums, batch))
    lead = tuple(shape[a] for a in rows)
    if batch:
        _lower_groups(at, node, source, (lead, depth, groups), arrays)
        return
    source = reshaped(at, source, (*lead, depth))
    kernel = arrays["kernel"] = arrays["kernel"].reshape(depth, -1)
    _check_sums(at, arrays)
    last = _Order(_result(at, node), node.order)
    fields = {"clamp": at.clamp, "arrays": arrays}
    _emit(at, Dense, source, (*lead, kernel.shape[1]), last, fields)


def _lower_groups(
    at: LoweredStep,
    node: Product,
    source: int,
    lengths: tuple[Shape, int, int],
    arrays: dict[str, Any],
) -> None:
    """Lower matrix products side by side, each with its kernel: a 1x1 convolution in groups."""
    lead, depth, groups = lengths
    kernel = arrays["kernel"] = arrays["kernel"].reshape(1, 1, depth, -1)
    _check_sums(at, arrays)
    fields = {
        "strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "input_dilation": (1, 1),
        "kernel_dilation": (1, 1),
        "groups": groups,
        "clamp": at.clamp,
        "arrays": arrays,
    }
    rows = joined(lead)
    source = reshaped(at, source, (rows, 1, 1, groups * depth))
    # The convolution puts its rows first, the product its groups.
    result, count = _result(at, node), len(node.contraction.eqn.params["dimension_numbers"][1][0])
    first = range(count, count + len(lead))
    axes = (*first, *range(count), *range(count + len(lead), len(result)))
    order = tuple(axes.index(a) for a in node.order)
    last = _Order(tuple(result[a] for a in axes), order)
    _emit(at, Conv, source, (rows, 1, 1, kernel.shape[-1]), last, fields)


# Operations of the program -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conv(Op):
    """A convolution of (batch, spatial ..., channels) with a kernel (spatial ..., in, out).

    Arrays: "kernel", "scale", "bias" and "multiplier" of each output channel.
    """

    kinds = ("conv",)
    strides: tuple[int, ...]
    padding: Pads
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return _needs(c)

    def prepared(self, c: Context) -> Mapping[str, np.ndarray]:
        return _with_offset_bias(c, self.arrays)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        kernel = c.arrays["kernel"].astype(x.dtype)
        rank = len(self.strides)
        spatial = tuple(range(1, rank + 1))
        last = (0, rank + 1, *spatial)
        acc = convolve(
            self._padded(x, c.in_grid()),
            kernel,
            np.int32,
            window_strides=self.strides,
            padding=((0, 0),) * rank,
            lhs_dilation=(1,) * rank,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=lax.ConvDimensionNumbers(last, (rank + 1, rank, *range(rank)), last),
            feature_group_count=self.groups,
        )
        return (requantize(c, acc + on_last_axis(c.arrays["offset_bias"], acc), self.clamp),)

    def _padded(self, x: jax.Array, grid: Grid) -> jax.Array:
        zero = np.asarray(grid.stored_zero, x.dtype)
        return padded(x, zero, range(1, x.ndim - 1), self.padding, self.input_dilation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Op):
    """A matrix product of (..., in) with a kernel (in, out); arrays as of a convolution."""

    kinds = ("dense",)
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return _needs(c)

    def prepared(self, c: Context) -> Mapping[str, np.ndarray]:
        return _with_offset_bias(c, self.arrays)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        kernel = c.arrays["kernel"].astype(x.dtype)
        acc = integer_dot(x, kernel, ((x.ndim - 1,), (0,)))
        return (requantize(c, acc + on_last_axis(c.arrays["offset_bias"], acc), self.clamp),)


def _needs(c: Context) -> dict[str, Need]:
    return of_channels(Need(("int8", "int16")), c.outputs[0].shape[-1])


def _with_offset_bias(c: Context, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Add the bias for codes as they are stored: less zero point times the kernel's sums."""
    kernel, zero = arrays["kernel"], np.int64(c.in_grid().stored_zero)
    sums = kernel.sum(axis=tuple(range(kernel.ndim - 1)), dtype=np.int64)
    # int32, as the sums that it is added to: what overflows in one overflows back in the other.
    return {**arrays, "offset_bias": (arrays["bias"] - zero * sums).astype(np.int32)}


OPERATIONS = {Product: ProductOperation()}
PROGRAM_OPERATIONS = (Conv, Dense)
