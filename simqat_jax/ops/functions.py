"""Functions of each element: a lookup table on integer codes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from simqat_jax.ir.graph import Clamp, Elementwise, Graph, Node
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.ir.replay import pointwise
from simqat_jax.numerics.affine import dequantize
from simqat_jax.numerics.grid import Grid, centered_codes
from simqat_jax.ops.moves import clip_at_zero
from simqat_jax.ops.operation import Everywhere, ExactStep, IntegerOperation, LoweredStep


def lookup_table(
    node: Node, scalars: Sequence[ArrayLike], dtype: DTypeLike, x: Grid, y: Grid
) -> jax.Array:
    """Return an elementwise function of each code, lowest first, as centered codes.

    Args:
      node: the function.
      scalars: its inputs after the first, real units.
      dtype: of its first input.
      x: the input's grid.
      y: the output's.
    """
    codes = jnp.arange(x.qmin, x.qmax + 1)
    reals = dequantize(codes, *x.params, channel_axis=None).astype(dtype)
    values = pointwise(node, [reals, *scalars])
    return centered_codes(jnp.broadcast_to(values, reals.shape), y, None)  # it may be a constant


class TableOperation(IntegerOperation):
    """What an activation function or clip is on integers."""

    def form(self, step: Step) -> str:
        return "table lookup"

    def codes(self, at: ExactStep) -> Everywhere | None:
        x = at.inputs[0]
        if x is None:
            return None
        first, *scalars = at.reals
        table = lookup_table(at.step.node, scalars, first.dtype, x.grid, at.grid)
        index = x.codes.astype(jnp.int32) + x.grid.params.zero_point - x.grid.qmin
        return Everywhere(jnp.take(table, index))

    def lower(self, at: LoweredStep) -> bool:
        first, *others = at.node.inputs
        assert isinstance(first, int)
        dtype = at.builder.graph.avals[first].dtype
        scalars, grid = [at.builder.value(v) for v in others], at.out_grid
        table = lookup_table(at.node, scalars, dtype, at.in_grid(), grid)
        codes = (np.asarray(table).astype(np.int32) + int(grid.zero_point)).astype(grid.dtype)
        at.emit(Table, (at.input(),), arrays={"table": codes})
        return True


class ClampOperation(TableOperation):
    """What a relu or clip is that nothing before it takes along."""

    def carries_grid(self, node: Node, graph: Graph, *, per_channel: bool) -> bool:
        assert isinstance(node, Clamp)
        return all(b in (0.0, -math.inf, math.inf) for b in node.bounds)

    def move(self, at: LoweredStep) -> None:
        assert isinstance(at.node, Clamp)
        clip_at_zero(at, at.node.bounds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Op):
    """A table with a code for each code of the input, lowest first."""

    kinds = ("table",)

    def needs(self, c: Context) -> Mapping[str, Need]:
        x = c.in_grid()
        return {"table": Need((c.grid.dtype.name,), (x.qmax - x.qmin + 1,))}

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        index = c.in_grid().codes(inputs[0]).astype(jnp.int32) - c.in_grid().qmin
        return (c.grid.stored(jnp.take(c.arrays["table"], index)),)


OPERATIONS = {Elementwise: TableOperation(), Clamp: ClampOperation()}
PROGRAM_OPERATIONS = (Table,)
