"""Deviations, variances and lengths of tensors along axes on codes, see `numerics.norms`."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from simqat_jax.ir.compound import Spread
from simqat_jax.ir.graph import shape_of
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Need
from simqat_jax.numerics.affine import rounded_product, true_divide
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.norms import Statistics, deviation, variance
from simqat_jax.numerics.rounding import ROUNDINGS, Rounding
from simqat_jax.ops.norms import OfStatistics, fits, guard_in_codes, held
from simqat_jax.ops.operation import ONE_MULTIPLIER, ExactStep, IntegerOperation, LoweredStep


class SpreadOperation(IntegerOperation):
    """What a deviation, variance or length is on integers."""

    fuses_clamp = True

    def joins(self, inputs: int) -> bool:
        return True

    def form(self, step: Step) -> str:
        return "of its codes"

    def codes(self, at: ExactStep) -> jax.Array | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, Spread)
        statistics = Statistics(node.axes, node.centered)
        if x is None or not fits(statistics, x.codes.shape, x.grid):
            return None
        y = variance(x.codes, statistics)
        if node.rooted:
            guard = guard_in_codes(node.epsilon, node.least, 0.0, x.grid)
            y = deviation(y, guard, at.rounding.norm.root)
        y = rounded_product(y, _multiplier(node, x.grid, at.grid))
        return at.clamped(jnp.round(y).reshape(shape_of(node.eqn.outvars[0]).shape))

    def lower(self, at: LoweredStep) -> bool:
        node, grid = at.node, at.in_grid()
        assert isinstance(node, Spread) and isinstance(node.inputs[0], int)
        statistics = Statistics(node.axes, node.centered)
        if not fits(statistics, at.builder.shape(node.inputs[0]), grid):  # or over a free batch
            return False
        at.emit(
            SpreadOfCodes,
            (at.input(),),
            kind=at.placement.rounding.norm.spread,
            axes=node.axes,
            centered=node.centered,
            rooted=node.rooted,
            **held(guard_in_codes(node.epsilon, node.least, 0.0, grid)),
            clamp=at.clamp,
            arrays={"multiplier": _multiplier(node, grid, at.out_grid)},
        )
        return True


def _multiplier(node: Spread, x: Grid, y: Grid) -> jax.Array:
    """Return real units of a deviation, or a variance, in codes over those of an output code."""
    unit = x.params.scale if node.rooted else rounded_product(x.params.scale, x.params.scale)
    return true_divide(rounded_product(unit, jnp.float32(node.factor)), y.params.scale)


_NORMS = {r.norm.spread: r.norm for r in ROUNDINGS.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpreadOfCodes(OfStatistics):
    """A deviation or variance times "multiplier"; its kind names the runtime that takes the root.

    Attributes:
      rooted: the root is taken.
    """

    kinds = tuple(_NORMS)
    rooted: bool

    def rounds_as(self, rounding: Rounding) -> bool:
        return not self.rooted or self.kind == rounding.norm.spread

    def needs(self, c: Context) -> Mapping[str, Need]:
        return ONE_MULTIPLIER

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        y = variance(c.in_grid().centered(inputs[0]).astype(jnp.float32), self.statistics)
        if self.rooted:
            y = deviation(y, self.guard, _NORMS[self.kind].root)
        codes = jnp.round(rounded_product(y, c.arrays["multiplier"]))
        return (c.grid.from_float(codes.reshape(c.shape(c.outputs[0].shape)), self.clamp),)


OPERATIONS = {Spread: SpreadOperation()}
PROGRAM_OPERATIONS = (SpreadOfCodes,)
