"""Products of two tensors that both depend on the data, and lookups in tables.

`y = clip(rint(f32(acc) * m) + z_y)`, `m = f32(f32(f32(s_a * number) * s_b) / s_y)`, `acc` exact.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir.compound import Lookup, MatMul
from simqat_jax.ir.graph import Node
from simqat_jax.ir.program import Context, Need, Op, joined
from simqat_jax.numerics.affine import rounded_product, true_divide
from simqat_jax.numerics.exact_sums import MOST, linear
from simqat_jax.numerics.grid import Grid
from simqat_jax.ops.moves import Reshape, reshaped, turned
from simqat_jax.ops.operation import (
    ONE_MULTIPLIER,
    Clamp,
    Demand,
    ExactStep,
    LoweredStep,
    Operation,
    Situation,
    requantize,
)


class MatMulOperation(Operation):
    """What a product of two tensors is on integers."""

    fuses_clamp = True

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        return Demand(needed=data if wanted else ())

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        return situation.on_grid and (situation.needed or situation.wanted)

    def codes(self, at: ExactStep) -> jax.Array | None:
        a, b, *_ = at.inputs
        node = at.step.node
        assert isinstance(node, MatMul)
        if a is None or b is None or not _fits(node, a.codes.shape, a.grid, b.grid):
            return None
        terms, multiply = _terms(node, a.codes.shape), node.contraction
        summed, bits = multiply.summed_length, b.grid.largest.bit_length()
        sums = linear(multiply.multiplied, a, b, terms, summed, bits)
        if sums is None:
            return None
        factor = combined(node, at.reals)
        codes = at.requantized(sums[0], _multiplier(a.grid, b.grid, at.grid, factor))
        return jnp.where(rounded_product(a.grid.params.scale, factor) > 0, codes, jnp.nan)

    def lower(self, at: LoweredStep) -> bool:
        node, grids = at.node, (at.in_grid(0), at.in_grid(1))
        assert isinstance(node, MatMul) and isinstance(node.inputs[0], int)
        if not _fits(node, at.builder.shape(node.inputs[0]), *grids):  # or sums over a free batch
            return False
        known = [at.builder.is_data(v) or at.builder.value(v) for v in node.inputs]
        factor = combined(node, known)
        scaled = float(rounded_product(jnp.float32(grids[0].scale), factor))
        if not scaled > 0:  # no scale of a tensor
            return False
        at.check_unit(scaled, grids[1].params.scale)
        (sums_a, sums_b), (batch_a, batch_b) = node.contraction.eqn.params["dimension_numbers"]
        a = _side(at, at.input(0), tuple(batch_a), tuple(sums_a), last=True)
        b = _side(at, at.input(1), tuple(batch_b), tuple(sums_b), last=False)
        result = (*at.shape_of(a)[:2], at.shape_of(b)[2])
        arrays = {"multiplier": _multiplier(*grids, at.out_grid, factor)}
        fields = {"scale": scaled, "clamp": at.clamp}
        if result == at.builder.shape(at.step.output):
            at.emit(Multiplied, (a, b), arrays=arrays, **fields)
        else:
            held = {name: np.asarray(v) for name, v in arrays.items()}
            v = at.between(Multiplied, (a, b), result, at.out_grid, arrays=held, **fields)
            at.emit(Reshape, (v,))
        return True


def combined(node: MatMul, operands: Sequence[ArrayLike]) -> jax.Array:
    """Return the number that a product is scaled by; `operands`: the values of its inputs."""
    factor = jnp.ones((), jnp.float32)
    for number, divides in zip(operands[2:], node.divides, strict=False):
        v = jnp.asarray(number).astype(jnp.float32).reshape(())
        factor = true_divide(factor, v) if divides else rounded_product(factor, v)
    return factor


def _multiplier(a: Grid, b: Grid, y: Grid, factor: jax.Array) -> jax.Array:
    unit = rounded_product(rounded_product(a.params.scale, factor), b.params.scale)
    return true_divide(unit, y.params.scale)


def _terms(node: MatMul, shape: Sequence[int]) -> int:
    (sums, _), _ = node.contraction.eqn.params["dimension_numbers"]
    return math.prod(shape[axis] for axis in sums)


def _fits(node: MatMul, shape: Sequence[int], a: Grid, b: Grid) -> bool:
    """Whether int32 holds every sum."""
    terms = _terms(node, shape)
    return max(a.num_bits, b.num_bits) <= 8 and 0 < terms * a.largest * b.largest <= MOST


def _side(
    at: LoweredStep, source: int, batch: tuple[int, ...], sums: tuple[int, ...], *, last: bool
) -> int:
    """Bring an operand to three axes: batch, then rows and terms, or terms and columns."""
    shape = at.shape_of(source)
    free = tuple(a for a in range(len(shape)) if a not in (*batch, *sums))
    groups = (batch, free, sums) if last else (batch, sums, free)
    source = turned(at, source, tuple(a for group in groups for a in group))
    return reshaped(at, source, tuple(joined([shape[a] for a in group]) for group in groups))


class LookupOperation(Operation):
    """What a lookup is on integers: the table lies on the output's grid."""

    def is_quantized(self, node: Node, situation: Situation) -> bool:
        return situation.needed or situation.wanted

    def lower(self, at: LoweredStep) -> bool:
        assert isinstance(at.node, Lookup)
        table, picked = at.node.inputs
        grid = at.out_grid
        codes = np.asarray(grid.quantize(jnp.asarray(at.builder.value(table), jnp.float32)))
        indices = at.builder.number(picked)
        at.emit(LookUp, (indices,), clips=at.node.clips, arrays={"table": codes})
        return True


# Operations of the program -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplied(Op):
    """A product of (batch, rows, terms) and (batch, terms, columns); "multiplier" scales it.

    Attributes:
      scale: real units of a code of the first tensor, times what the product is scaled by.
      clamp: lowest and highest code of the output.
    """

    kinds = ("matmul",)
    scale: float
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return ONE_MULTIPLIER

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        a, b = inputs
        dims = (((2,), (1,)), ((0,), (0,)))
        sums = lax.dot_general(a, b, dims, preferred_element_type=jnp.int32)
        za, zb = (c.in_grid(k).stored_zero for k in range(2))
        # sum((a - za)(b - zb)): int8 operands are the fast ones.
        rows = jnp.sum(a.astype(jnp.int32), 2, keepdims=True)
        columns = jnp.sum(b.astype(jnp.int32), 1, keepdims=True)
        sums = sums - zb * rows - za * columns + za * zb * a.shape[2]
        return (requantize(c, sums, self.clamp),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookUp(Op):
    """Rows of codes, "table", that integers pick: the input, with a last axis of length 1.

    Attributes:
      clips: integers beyond the table's ends pick its ends; otherwise they pick codes of zero.
    """

    kinds = ("lookup",)
    clips: bool

    def needs(self, c: Context) -> Mapping[str, Need]:
        return {"table": Need((c.grid.dtype.name,))}

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        table, zero = c.grid.stored(c.arrays["table"]), c.grid.stored_zero
        mode = "clip" if self.clips else "fill"
        given = {"mode": mode, "fill_value": zero, "wrap_negative_indices": False}
        return (table.at[inputs[0][..., 0]].get(**given),)


OPERATIONS = {MatMul: MatMulOperation(), Lookup: LookupOperation()}
PROGRAM_OPERATIONS = (Multiplied, LookUp)
