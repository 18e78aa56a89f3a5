"""Masks on codes: what they leave out is zero, and means divide by how many they leave in.

`rint(sum(q - z_x) * f32(s_x / (s_y * n))) + z_y`, where `n` is a number for each count, held in a
table with the multipliers; a mean of nothing is zero.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir.compound import CountedMean, Masked, Selected
from simqat_jax.ir.graph import shape_of
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.numerics.exact_sums import exact_sum, sum_fits
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.requantize import mean_multiplier, scaled
from simqat_jax.ops.moves import MoveOperation, check_codes_fit
from simqat_jax.ops.operation import (
    Clamp,
    ExactStep,
    IntegerOperation,
    LoweredStep,
    SharedGridOperation,
)


class MaskedOperation(MoveOperation):
    """What a mask is on integers: zero is a code of every grid, and so are its ends."""

    def move(self, at: LoweredStep) -> None:
        check_codes_fit(at)
        assert isinstance(at.node, Masked)
        grid, fill = at.out_grid, at.node.fill
        code = int(grid.zero_point) if fill == 0 else grid.qmin if fill < 0 else grid.qmax
        at.emit(Mask, (at.input(), at.mask(1)), keeps=at.node.keeps, code=code)


class SelectedOperation(SharedGridOperation):
    """What a choice between two tensors is on integers: one between their codes."""

    def lower(self, at: LoweredStep) -> bool:
        at.emit(Select, [at.operand(0), at.operand(1), at.mask(2)])
        return True


class CountedMeanOperation(IntegerOperation):
    """What a mean of what a mask leaves in is on integers."""

    fuses_clamp = True

    def joins(self, inputs: int) -> bool:
        return True

    def codes(self, at: ExactStep) -> jax.Array | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, CountedMean)
        if x is None:
            return None
        terms = math.prod(x.codes.shape[a] for a in node.axes)
        if not sum_fits(terms, x.grid.largest):
            return None
        total = exact_sum(lambda codes: jnp.sum(codes, node.axes), x, terms)
        counts, divisors = at.reals[1:]
        multiplier = _at(_multipliers(x.grid, at.grid, divisors), counts)
        return at.requantized(total.reshape(shape_of(node.eqn.outvars[0]).shape), multiplier)

    def lower(self, at: LoweredStep) -> bool:
        node, grid = at.node, at.in_grid()
        assert isinstance(node, CountedMean) and isinstance(node.inputs[0], int)
        lengths = [at.builder.shape(node.inputs[0])[a] for a in node.axes]
        if min(lengths, default=1) < 0 or not sum_fits(math.prod(lengths), grid.largest):
            return False
        multiplier = _multipliers(grid, at.out_grid, at.builder.held(node.inputs[2]))
        given = {"clamp": at.clamp, "arrays": {"multiplier": multiplier}}
        at.emit(CountedSum, (at.input(), at.input(1)), axes=node.axes, **given)
        return True


def _multipliers(x: Grid, y: Grid, divisors: ArrayLike) -> jax.Array:
    """Return what sums are multiplied by at each count; where they are divided by zero, by zero."""
    divisors = jnp.asarray(divisors)
    usual = mean_multiplier(x.params.scale, y.params.scale, jnp.where(divisors == 0, 1, divisors))
    return jnp.where(divisors == 0, 0, usual)


def _at(table: ArrayLike, counts: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[counts].get(mode="promise_in_bounds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask(Op):
    """Codes, and another `code` where the second input, truth values, is not `keeps`."""

    kinds = ("mask",)
    keeps: bool
    code: int

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        x, truth = inputs
        return (jnp.where(truth == self.keeps, x, np.asarray(self.code - c.grid.offset, x.dtype)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select(Op):
    """Codes of the first input where the third, truth values, is false, else of the second."""

    kinds = ("select",)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        no, yes, truth = inputs
        return (jnp.where(truth, yes, no),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CountedSum(Op):
    """A sum along axes; "multiplier" holds a number for each count, the second input."""

    kinds = ("counted_sum",)
    axes: tuple[int, ...]
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return {"multiplier": Need(("float32",))}

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        codes, counts = inputs
        sums = jnp.sum(c.in_grid().centered(codes), axis=self.axes)
        sums = sums.reshape(c.shape(c.outputs[0].shape))
        return (c.grid.from_float(scaled(sums, _at(c.arrays["multiplier"], counts)), self.clamp),)


OPERATIONS = {
    Masked: MaskedOperation(),
    Selected: SelectedOperation(),
    CountedMean: CountedMeanOperation(),
}
PROGRAM_OPERATIONS = (Mask, Select, CountedSum)
