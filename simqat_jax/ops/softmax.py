"""Softmax and its logarithm on codes, see `numerics.softmax`."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.ir.compound import LogSoftmax, Softmax
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Op
from simqat_jax.numerics import softmax
from simqat_jax.numerics.grid import Grid
from simqat_jax.ops.operation import ExactStep, IntegerOperation, LoweredStep


class _OfCodes(IntegerOperation):
    """What a softmax, or its logarithm, is on integers."""

    def joins(self, inputs: int) -> bool:
        return True

    def form(self, step: Step) -> str:
        return "of its codes"


class SoftmaxOperation(_OfCodes):
    """What a softmax is on integers."""

    def codes(self, at: ExactStep) -> jax.Array | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, Softmax)
        if x is None or not _fits(node.axis, x.codes.shape, x.grid):
            return None
        codes, scale = x.codes, x.grid.params.scale
        if node.masked:
            masked = jnp.where(at.reals[1] == node.keeps, codes, softmax.lowest(scale))
            codes = jnp.where(scale >= softmax.LEAST_SCALE, masked, jnp.nan)
        return at.clamped(softmax.softmax(codes, scale, node.axis, at.grid.params.scale))

    def lower(self, at: LoweredStep) -> bool:
        node = at.node
        assert isinstance(node, Softmax) and isinstance(node.inputs[0], int)
        if not _fits(node.axis, at.builder.shape(node.inputs[0]), at.in_grid()):  # or a free batch
            return False
        inputs = [at.input()]
        if node.masked:
            if at.in_grid().scale < softmax.LEAST_SCALE:
                return False
            inputs.append(at.mask(1))
        fields = {"axis": node.axis, "keeps": node.keeps}
        at.emit(SoftmaxOfCodes, inputs, **fields)
        return True


class LogSoftmaxOperation(_OfCodes):
    """What the logarithm of a softmax is on integers."""

    def codes(self, at: ExactStep) -> jax.Array | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, LogSoftmax)
        if x is None or not _fits(node.axis, x.codes.shape, x.grid):
            return None
        scales = x.grid.params.scale, at.grid.params.scale
        return at.clamped(softmax.log_softmax(x.codes, scales[0], node.axis, scales[1]))

    def lower(self, at: LoweredStep) -> bool:
        node = at.node
        assert isinstance(node, LogSoftmax) and isinstance(node.inputs[0], int)
        if not _fits(node.axis, at.builder.shape(node.inputs[0]), at.in_grid()):
            return False
        at.emit(LogSoftmaxOfCodes, (at.input(),), axis=node.axis)
        return True


def _fits(axis: int, shape: Sequence[int], x: Grid) -> bool:
    """Whether the sums are exact."""
    return x.num_bits <= 8 and 0 < shape[axis] <= softmax.MOST_TERMS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxOfCodes(Op):
    """A softmax along an axis; a second input, if any, is a mask.

    Attributes:
      axis: along which.
      keeps: the value of the mask where a code stays; elsewhere it counts as the lowest.
    """

    kinds = ("softmax",)
    axis: int
    keeps: bool

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        grid = c.in_grid()
        codes, scale = grid.centered(inputs[0]).astype(jnp.float32), grid.params.scale
        if len(inputs) > 1:
            mask = inputs[1] == np.asarray(self.keeps)
            codes = jnp.where(mask, codes, softmax.lowest(scale))
        return (c.grid.from_float(softmax.softmax(codes, scale, self.axis, c.grid.params.scale)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSoftmaxOfCodes(Op):
    """The logarithm of a softmax along an axis."""

    kinds = ("log_softmax",)
    axis: int

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        grid = c.in_grid()
        codes, scale = grid.centered(inputs[0]).astype(jnp.float32), grid.params.scale
        y = softmax.log_softmax(codes, scale, self.axis, c.grid.params.scale)
        return (c.grid.from_float(y),)


OPERATIONS = {Softmax: SoftmaxOperation(), LogSoftmax: LogSoftmaxOperation()}
PROGRAM_OPERATIONS = (SoftmaxOfCodes, LogSoftmaxOfCodes)
