"""Sums, differences and products of two tensors, each runtime's own way."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simqat_jax.ir.graph import Add, Mul, Node
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.numerics import rounding
from simqat_jax.numerics.affine import computed_once, true_divide
from simqat_jax.numerics.exact_sums import product_fits
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.rounding import ROUNDINGS, Rounding
from simqat_jax.ops.operation import (
    ONE_MULTIPLIER,
    Clamp,
    Everywhere,
    ExactStep,
    IntegerOperation,
    LoweredStep,
)


class _Binary(IntegerOperation):
    """Of two tensors, or of one and a constant."""

    fuses_clamp = True
    quantizes_constants = True

    def joins(self, inputs: int) -> bool:
        return inputs > 1


def _sum_of(node: Node, how: Rounding) -> rounding.Sum:
    assert isinstance(node, Add)
    return how.subtract if node.subtracts else how.add


def _sum_fits(a: Grid, b: Grid) -> bool:
    """Whether runtimes add codes of these widths."""
    return max(a.num_bits, b.num_bits) <= 8


class AddOperation(_Binary):
    """What a sum or difference is on integers."""

    def codes(self, at: ExactStep) -> Everywhere | None:
        operands = at.operands()
        if operands is None:
            return None
        a, b = operands
        if not _sum_fits(a.grid, b.grid):
            return None
        how, grids = _sum_of(at.step.node, at.rounding), (a.grid, b.grid, at.grid)
        x, y = (v.codes.astype(jnp.int32) for v in operands)
        sums = how.apply(x, y, how.constants(grids), grids)
        return Everywhere(computed_once(at.clamped(sums)))

    def lower(self, at: LoweredStep) -> bool:
        ids, (a, b) = _pair(at)
        if not _sum_fits(a, b):
            return False
        how = _sum_of(at.node, at.placement.rounding)
        multipliers = tuple(m.item() for m in how.constants((a, b, at.out_grid)))
        at.emit(Sum, ids, kind=how.kind, multipliers=multipliers, clamp=at.clamp)
        return True


class MulOperation(_Binary):
    """What a product of two tensors is on integers."""

    def codes(self, at: ExactStep) -> Everywhere | None:
        operands = at.operands()
        if operands is None:
            return None
        a, b = operands
        if not product_fits(a.grid.num_bits, b.grid.num_bits):
            return None
        products = (a.codes * b.codes).astype(jnp.int32)
        multiplier = _multiplier(a.grid, b.grid, at.grid)
        return Everywhere(at.clamped(at.rounding.multiply.apply(products, multiplier, at.grid)))

    def lower(self, at: LoweredStep) -> bool:
        ids, (a, b) = _pair(at)
        if not product_fits(a.num_bits, b.num_bits):
            return False
        at.check_unit(a.scale, b.params.scale)
        arrays = {"multiplier": _multiplier(a, b, at.out_grid)}
        kind = at.placement.rounding.multiply.kind
        at.emit(Multiply, ids, kind=kind, clamp=at.clamp, arrays=arrays)
        return True


def _multiplier(a: Grid, b: Grid, y: Grid) -> jax.Array:
    """Return real units of a product of codes over those of an output code."""
    return true_divide(a.params.scale * b.params.scale, y.params.scale)


def _pair(at: LoweredStep) -> tuple[list[int], tuple[Grid, Grid]]:
    """Return both operands and their grids."""
    ids = [at.operand(position) for position in range(2)]
    a, b = (at.builder.tensors[i].grid for i in ids)
    assert a is not None and b is not None
    return ids, (a, b)


# Operations of the program -----------------------------------------------------------------------

_SUMS = {how.kind: how for r in ROUNDINGS.values() for how in (r.add, r.subtract)}
_PRODUCTS = {r.multiply.kind: r.multiply for r in ROUNDINGS.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Op):
    """A sum or difference of two tensors; its kind names the rounding.

    Attributes:
      multipliers: what the rounding needs to know of the grids.
      clamp: lowest and highest code of the output.
    """

    kinds = tuple(_SUMS)
    broadcasts = True
    multipliers: tuple[float, ...] = ()
    clamp: Clamp

    def rounds_as(self, rounding: Rounding) -> bool:
        return self.kind in (rounding.add.kind, rounding.subtract.kind)

    @property
    def attributes(self) -> dict[str, Any]:
        given = super().attributes
        return given if self.multipliers else {"clamp": self.clamp}

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        grids = (c.in_grid(0), c.in_grid(1), c.grid)
        a, b = (grid.centered(x) for grid, x in zip(grids[:2], inputs, strict=True))
        centered = _SUMS[self.kind].apply(a, b, self.multipliers, grids)
        return (computed_once(c.grid.from_float(centered, self.clamp)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiply(Op):
    """A product of two tensors; its kind names the rounding; "multiplier" scales it."""

    kinds = tuple(_PRODUCTS)
    broadcasts = True
    clamp: Clamp

    def rounds_as(self, rounding: Rounding) -> bool:
        return self.kind == rounding.multiply.kind

    def needs(self, c: Context) -> Mapping[str, Need]:
        return ONE_MULTIPLIER

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        a, b = (c.in_grid(p).centered(x) for p, x in enumerate(inputs))
        centered = _PRODUCTS[self.kind].apply(a * b, c.arrays["multiplier"], c.grid)
        return (c.grid.from_float(centered, self.clamp),)


OPERATIONS = {Add: AddOperation(), Mul: MulOperation()}
PROGRAM_OPERATIONS = (Sum, Multiply)
