"""The larger or smaller of two tensors, and where a tensor is largest or smallest, on codes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from simqat_jax.ir.graph import Extremum, Position
from simqat_jax.ir.plan import Placement, Step
from simqat_jax.ir.program import Context, Op
from simqat_jax.ops.moves import check_codes_fit
from simqat_jax.ops.operation import Demand, LoweredStep, Operation, SharedGridOperation

_KINDS = {"max": "maximum", "min": "minimum"}


class ExtremumOperation(SharedGridOperation):
    """What the larger or smaller of two tensors is on integers: that of their codes."""

    def lower(self, at: LoweredStep) -> bool:
        kind = _KINDS[at.node.primitive]
        at.emit(ExtremumOfCodes, [at.operand(p) for p in range(2)], kind=kind)
        return True

    def move(self, at: LoweredStep) -> None:
        check_codes_fit(at)
        self.lower(at)


class PositionOperation(Operation):
    """What argmax and argmin are on integers: codes of one grid have the order of their values."""

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        return Demand(wanted=data)

    def counts(self, step: Step, placement: Placement) -> bool:
        node, avals = step.node, placement.graph.avals
        v = node.inputs[0]
        if not isinstance(v, int) or v not in placement.grids:
            return False
        # Values of fewer digits may be equal where codes are not.
        types = str(avals[v].dtype), str(avals[node.outputs[0]].dtype)
        return types == ("float32", "int32") and not placement.grids[v].spec.per_channel

    def form(self, step: Step) -> str:
        return "of its codes"

    def lower(self, at: LoweredStep) -> bool:
        kind, (axis,) = at.node.primitive, at.node.eqn.params["axes"]
        x, path = at.input(), "/".join((*at.node.path, at.node.op))
        outputs = (at.builder.tensor(path, at.step.output, None),)
        op = PositionOfCodes(path=path, inputs=(x,), outputs=outputs, kind=kind, axis=int(axis))
        at.builder.ops.append(op)
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtremumOfCodes(Op):
    """The higher or lower of two codes on one grid."""

    kinds = tuple(_KINDS.values())
    broadcasts = True

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        higher = self.kind == _KINDS["max"]
        return (jnp.maximum(*inputs) if higher else jnp.minimum(*inputs),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionOfCodes(Op):
    """The first place along an axis of the highest or lowest code; its output has no grid."""

    kinds = ("argmax", "argmin")
    axis: int

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        position = lax.argmax if self.kind == "argmax" else lax.argmin
        return (position(inputs[0], self.axis, jnp.int32),)


OPERATIONS = {Extremum: ExtremumOperation(), Position: PositionOperation()}
PROGRAM_OPERATIONS = (ExtremumOfCodes, PositionOfCodes)
