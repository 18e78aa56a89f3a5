"""The larger or smaller of two tensors, on codes."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from simqat_jax.ir.graph import Extremum
from simqat_jax.ir.program import Context, Op
from simqat_jax.ops.moves import check_codes_fit
from simqat_jax.ops.operation import LoweredStep, SharedGridOperation

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtremumOfCodes(Op):
    """The higher or lower of two codes on one grid."""

    kinds = tuple(_KINDS.values())
    broadcasts = True

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        higher = self.kind == _KINDS["max"]
        return (jnp.maximum(*inputs) if higher else jnp.minimum(*inputs),)


OPERATIONS = {Extremum: ExtremumOperation()}
PROGRAM_OPERATIONS = (ExtremumOfCodes,)
