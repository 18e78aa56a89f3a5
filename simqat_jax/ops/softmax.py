"""Softmax and its logarithm on codes, see `numerics.softmax`."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir.compound import LogSoftmax, OfExponentials, Softmax
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Op
from simqat_jax.numerics import softmax
from simqat_jax.numerics.grid import Grid
from simqat_jax.ops.operation import Everywhere, ExactStep, IntegerOperation, LoweredStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfExponentialsOfCodes(Op):
    """A softmax along axes, or its logarithm; a second input, if any, is a mask.

    Attributes:
      axis: along which; of several a tuple.
      keeps: the value of the mask where a code stays; elsewhere it counts as the lowest.
    """

    compute: ClassVar[Callable[..., jax.Array]]
    """From centered codes, their scale, axes and the scale of results to these."""

    axis: softmax.Axes
    keeps: bool = True

    @property
    def axes(self) -> tuple[int, ...]:
        """Along which, as a tuple."""
        return (self.axis,) if isinstance(self.axis, int) else self.axis

    @staticmethod
    def reach(y: Grid) -> ArrayLike:
        """Return how far below the highest number a masked one has to be, real units."""
        del y
        return softmax.FARTHEST

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        grid = c.in_grid()
        codes, scale = grid.centered(inputs[0]).astype(jnp.float32), grid.params.scale
        if len(inputs) > 1:
            mask = inputs[1] == np.asarray(self.keeps)
            codes = jnp.where(mask, codes, softmax.lowest(scale, self.reach(c.grid)))
        y = type(self).compute(codes, scale, self.axis, c.grid.params.scale)
        return (c.grid.from_float(y),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxOfCodes(OfExponentialsOfCodes):
    """A softmax along axes."""

    kinds = ("softmax",)
    compute = staticmethod(softmax.softmax)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSoftmaxOfCodes(OfExponentialsOfCodes):
    """The logarithm of a softmax along axes; what is masked has the lowest code."""

    kinds = ("log_softmax",)
    compute = staticmethod(softmax.log_softmax)

    @staticmethod
    def reach(y: Grid) -> ArrayLike:
        return softmax.reach_of_logarithm(y)


class OfExponentialsOperation(IntegerOperation):
    """What a softmax, or its logarithm, is on integers."""

    def __init__(self, op: type[OfExponentialsOfCodes]):
        self.op = op

    def joins(self, inputs: int) -> bool:
        return True

    def form(self, step: Step) -> str:
        return "of its codes"

    def codes(self, at: ExactStep) -> jax.Array | Everywhere | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, OfExponentials)
        if x is None or not _fits(node.axes, x.codes.shape, x.grid):
            return None
        codes, scale, reach = x.codes, x.grid.params.scale, self.op.reach(at.grid)
        if node.masked:
            masked = jnp.where(at.reals[1] == node.keeps, codes, softmax.lowest(scale, reach))
            codes = jnp.where(softmax.holds_lowest(scale, reach), masked, jnp.nan)
        codes = at.clamped(self.op.compute(codes, scale, node.axes, at.grid.params.scale))
        return codes if node.masked else Everywhere(codes)

    def lower(self, at: LoweredStep) -> bool:
        node, x = at.node, at.in_grid()
        assert isinstance(node, OfExponentials) and isinstance(node.inputs[0], int)
        if not _fits(node.axes, at.builder.shape(node.inputs[0]), x):
            return False
        inputs = [at.input()]
        if node.masked:
            if not softmax.holds_lowest(x.scale, self.op.reach(at.out_grid)):
                return False
            inputs.append(at.mask(1))
        axis = node.axes[0] if len(node.axes) == 1 else node.axes
        at.emit(self.op, inputs, axis=axis, keeps=node.keeps)
        return True


def _fits(axes: Sequence[int], shape: Sequence[int], x: Grid) -> bool:
    """Whether the sums are exact, and none is over the batch of a free size."""
    lengths = [shape[a] for a in axes]
    return x.num_bits <= 8 and min(lengths) > 0 and math.prod(lengths) <= softmax.MOST_TERMS


OPERATIONS = {
    Softmax: OfExponentialsOperation(SoftmaxOfCodes),
    LogSoftmax: OfExponentialsOperation(LogSoftmaxOfCodes),
}
PROGRAM_OPERATIONS = (SoftmaxOfCodes, LogSoftmaxOfCodes)
