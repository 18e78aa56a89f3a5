"""What runs on real values inside an integer model, and the ways there and back.

A node becomes the primitives that it is made of; one with a primitive that no table knows becomes
a function, which no file holds.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir import replay
from simqat_jax.ir.graph import Contraction, Float, Node
from simqat_jax.ir.program import Context, Function, Op, repeated
from simqat_jax.ir.program_builder import BATCH, ProgramBuilder
from simqat_jax.ops.flat import as_primitives
from simqat_jax.ops.operation import LoweredStep, Operation
from simqat_jax.ops.primitives import UnknownPrimitive, real


@dataclasses.dataclass(frozen=True, kw_only=True)
class FloatOp(Op):
    """An operation on real values: dequantized, computed, and left as they are.

    Attributes:
      constant_bytes: bytes of the constants that `function` holds.
      why: what it is made of that is no Primitive.
      function: computes it.
    """

    kinds = ("float",)
    constant_bytes: int = 0
    why: str = ""
    function: Function

    @property
    def computes_reals(self) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return self.constant_bytes + super().nbytes

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        reals = [real(tensor, x) for tensor, x in zip(c.inputs, inputs, strict=True)]
        return self.function(reals, c.batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoveOp(FloatOp):
    """What moves codes in a way that has no operation of its own: a function on centered codes."""

    kinds = ("move",)

    @property
    def computes_reals(self) -> bool:
        return False

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        first, *rest = inputs
        moved = self.function((c.in_grid().centered(first), *rest), c.batch)
        return [(x + c.grid.stored_zero).astype(c.grid.stored_dtype) for x in moved]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize(Op):
    """Real values to codes."""

    kinds = ("quantize",)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (c.grid.stored(c.grid.quantize(real(c.inputs[0], inputs[0]))),)


class FloatOperation(Operation):
    """What has no integer form: it stays float."""


def function_of(builder: ProgramBuilder, node: Node) -> Function:
    """Return what computes a node on the values of its data, at any batch size."""
    fixed, shapes = _fixed(builder, node), [builder.shape(v) for v in node.inputs]

    def function(values: Sequence[jax.Array], batch: int) -> Sequence[jax.Array]:
        rest = iter(values)
        operands = [
            next(rest) if x is None else repeated(x, shape, batch)
            for x, shape in zip(fixed, shapes, strict=True)
        ]
        if builder.free_batch:
            results = replay.at_batch(node, operands, BATCH, batch)
            return [jnp.asarray(x) for x in results]
        return replay.rounded(node, operands)

    return function


def _fixed(builder: ProgramBuilder, node: Node) -> list[ArrayLike | None]:
    """Return the operands that do not depend on the data, None for the others."""
    return [None if builder.is_data(v) else builder.held(v) for v in node.inputs]


def _append(builder: ProgramBuilder, node: Node, kind: type[FloatOp], why: str) -> FloatOp:
    """Add an operation in float, with its results as tensors on no grid."""
    function, fixed = function_of(builder, node), _fixed(builder, node)
    inputs = tuple(builder.number(v) for v in node.inputs if builder.is_data(v))
    path = "/".join((*node.path, node.op))
    outputs = tuple(builder.tensor(path, v, None) for v in node.outputs)
    arrays = [x for x in fixed if isinstance(x, jax.Array | np.ndarray)]
    builder.float_constants += [*fixed, *replay.constants(node)]
    op = kind(
        path=path,
        inputs=inputs,
        outputs=outputs,
        constant_bytes=sum(x.nbytes for x in arrays),
        why=why,
        function=function,
    )
    builder.ops.append(op)
    return op


def _append_real(builder: ProgramBuilder, node: Node) -> None:
    """Add a node on real values."""
    try:
        as_primitives(builder, node)
    except UnknownPrimitive as unknown:
        _append(builder, node, FloatOp, str(unknown))


def emit_float(at: LoweredStep) -> None:
    """Compute a step on real values, and quantize what is read as codes."""
    for node in at.step.nodes:
        _append_real(at.builder, node)
    for v in (at.step.output, *at.step.node.outputs[1:]):
        if v in at.placement.at:
            at.emit(Quantize, (at.builder.number(v),), v)


def emit_move(at: LoweredStep) -> None:
    """Move codes by primitives on their real values, whose codes are the same, or a function."""
    builder, grids = at.builder, at.placement.grids
    try:
        if builder.tensors[at.input()].dtype != "float32":
            raise UnknownPrimitive("a move of values of fewer digits than codes may have")
        as_primitives(builder, at.node)
    except UnknownPrimitive as unknown:
        op, tensors = _append(builder, at.node, MoveOp, str(unknown)), builder.tensors
        for v, i in zip(at.node.outputs, op.outputs, strict=True):
            if v in grids:
                tensors[i] = dataclasses.replace(tensors[i], grid=at.out_grid)
        return
    for v in at.node.outputs:
        if v in grids:
            at.emit(Quantize, (builder.number(v),), v)


OPERATIONS = {Float: FloatOperation(), Contraction: FloatOperation()}
PROGRAM_OPERATIONS = (FloatOp, MoveOp, Quantize)
