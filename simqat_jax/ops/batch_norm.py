"""BatchNorm: folded into the layer before it, or on its own as one weight for each channel."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from simqat_jax.ir.compound import ChannelAffine
from simqat_jax.ir.graph import BatchNorm, Node
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.numerics.affine import along_channel, own_rounding, rounded_product, true_divide
from simqat_jax.numerics.folding import (
    BatchNormFold,
    batch_norm_state,
    folding_scale,
    left_to_scale,
    running_affine,
)
from simqat_jax.numerics.grid import Codes, Grid, KernelCodes, QuantizeKernel
from simqat_jax.numerics.requantize import channel_affine, integer_bias
from simqat_jax.ops.operation import (
    Clamp,
    Everywhere,
    ExactStep,
    IntegerOperation,
    LoweredStep,
    of_channels,
    on_last_axis,
    requantize,
)


def folded(
    values: Mapping[str, jax.Array],
    epsilon: float,
    kernel: jax.Array,
    bias: jax.Array | None,
    quantize: QuantizeKernel,
    fold: BatchNormFold,
) -> tuple[KernelCodes, jax.Array]:
    """Fold a BatchNorm on running statistics into the layer before it, as it is deployed.

    `none` folds after quantizing: `|gamma| / sigma` goes into the scale and the sign into the
    codes. The other modes quantize the folded kernel.

    Args:
      values: the BatchNorm's parameters and statistics, by name, real units.
      epsilon: the BatchNorm's.
      kernel: of the layer, real units, output channels last.
      bias: of the layer, or None.
      quantize: quantizes the kernel.
      fold: the mode.

    Returns:
      The kernel's codes, and the bias in real units.
    """
    norm = batch_norm_state(values, epsilon)
    slope, shift = running_affine(norm)
    if bias is not None:
        shift = shift + rounded_product(bias.astype(jnp.float32), slope)
    if fold == "none":
        plain = quantize(kernel, None)
        signed = plain.codes * along_channel(jnp.sign(slope), kernel.ndim, -1)
        old = plain.grid.params.scale
        scale = jnp.where(slope == 0, old, old * jnp.abs(slope))
        grid = dataclasses.replace(plain.grid, scale=scale)
        return KernelCodes(signed, grid, plain.dead | (slope == 0)), shift
    whole, left = quantize(kernel, folding_scale(norm)), left_to_scale(norm)
    old, dead = whole.grid.params.scale, norm.gamma == 0
    scale = jnp.where(left < 1, jnp.where(left == 0, old, old * left), old)
    codes = jnp.where(along_channel(dead, kernel.ndim, -1), 0.0, whole.codes)
    grid = dataclasses.replace(whole.grid, scale=scale)
    return KernelCodes(codes, grid, whole.dead | dead), shift


def _channel_arrays(slope: jax.Array, shift: jax.Array, x: Grid, y: Grid) -> dict[str, jax.Array]:
    """Return a weight for each channel, its scale, bias and multiplier."""
    kernel, scale = channel_affine(slope, shift, x.params.scale)
    unit = x.params.scale * scale
    return {
        "kernel": kernel.astype(jnp.int8),
        "scale": scale,
        "bias": integer_bias(shift, unit),
        "multiplier": true_divide(unit, y.params.scale),
    }


def _sums(centered: jax.Array, arrays: Mapping[str, jax.Array]) -> jax.Array:
    """Return `code * weight + bias` of each channel, int32."""
    kernel, bias = (
        on_last_axis(arrays[name].astype(jnp.int32), centered) for name in ("kernel", "bias")
    )
    return centered * kernel + bias


class BatchNormOperation(IntegerOperation):
    """What a BatchNorm on its own is on integers: a 1x1 depthwise convolution."""

    fuses_clamp = True

    def refusal(self, node: Node) -> str | None:
        assert isinstance(node, BatchNorm)
        last = node.on_last_axis
        return None if last else "the feature axis of this BatchNorm is not the last one"

    def form(self, step: Step) -> str:
        return "on its own: a 1x1 depthwise convolution"

    def codes(self, at: ExactStep) -> Everywhere | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, BatchNorm)
        if x is None or node.training:
            return None
        affine = running_affine(batch_norm_state(at.layers[0], node.module.epsilon))
        return _affine_codes(at, x, *affine)

    def lower(self, at: LoweredStep) -> bool:
        assert isinstance(at.node, BatchNorm)
        (values,), epsilon = at.layer_values(), at.node.module.epsilon
        _emit_affine(at, *running_affine(batch_norm_state(values, epsilon)))
        return True


class ChannelAffineOperation(IntegerOperation):
    """What a BatchNorm written by hand is on integers: what one on its own is."""

    fuses_clamp = True

    def form(self, step: Step) -> str:
        return "a BatchNorm written by hand: a 1x1 depthwise convolution"

    def codes(self, at: ExactStep) -> Everywhere | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, ChannelAffine)
        if x is None or node.training:
            return None
        return _affine_codes(at, x, *_slope_and_shift(node, at.reals[1:]))

    def lower(self, at: LoweredStep) -> bool:
        node = at.node
        assert isinstance(node, ChannelAffine)
        if node.training:
            return False
        values = [jnp.asarray(at.builder.value(v)) for v in node.inputs[1:]]
        _emit_affine(at, *_slope_and_shift(node, values))
        return True


def _slope_and_shift(
    node: ChannelAffine, numbers: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Return by what each channel is multiplied, and what is added then."""
    channels = numbers[0].shape[-1:]
    slope, shift = jnp.ones(channels, jnp.float32), jnp.zeros(channels, jnp.float32)
    for step, v in zip(node.steps, numbers, strict=False):
        v = v.astype(jnp.float32).reshape(channels)
        match step:
            case "add":
                shift = own_rounding(shift + v)
            case "sub":
                shift = own_rounding(shift - v)
            case "mul":
                slope, shift = rounded_product(slope, v), rounded_product(shift, v)
            case _:
                slope, shift = true_divide(slope, v), true_divide(shift, v)
    return slope, shift


def _affine_codes(at: ExactStep, x: Codes, slope: jax.Array, shift: jax.Array) -> Everywhere:
    arrays = _channel_arrays(slope, shift, x.grid, at.grid)
    sums = _sums(x.codes.astype(jnp.int32), arrays)
    return Everywhere(at.requantized(sums, on_last_axis(arrays["multiplier"], sums)))


def _emit_affine(at: LoweredStep, slope: jax.Array, shift: jax.Array) -> None:
    arrays = _channel_arrays(slope, shift, at.in_grid(), at.out_grid)
    at.check_unit(at.in_grid().scale, arrays["scale"])
    at.emit(Affine, (at.input(),), clamp=at.clamp, arrays=arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine(Op):
    """A BatchNorm of its own: "kernel", "scale", "bias" and "multiplier" of each channel."""

    kinds = ("affine",)
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        count = c.outputs[0].shape[-1]
        return of_channels(Need(("int8",), (count,)), count)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        sums = _sums(c.in_grid().centered(inputs[0]), c.arrays)
        return (requantize(c, sums, self.clamp),)


OPERATIONS = {BatchNorm: BatchNormOperation(), ChannelAffine: ChannelAffineOperation()}
PROGRAM_OPERATIONS = (Affine,)
