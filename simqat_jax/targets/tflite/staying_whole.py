"""Which tensors of codes stay whole numbers in float, since nothing reads their codes."""

from collections import defaultdict

from simqat_jax.ir.program import Op, Program
from simqat_jax.ops.matmul import Multiplied
from simqat_jax.ops.moves import Reshape
from simqat_jax.ops.norms import Normalize
from simqat_jax.ops.softmax import LogSoftmaxOfCodes, SoftmaxOfCodes
from simqat_jax.ops.spreads import SpreadOfCodes

_WHOLE = (Multiplied, Normalize, SpreadOfCodes, SoftmaxOfCodes, LogSoftmaxOfCodes)
"""Operations that compute with whole numbers in float."""


def staying_whole(program: Program) -> frozenset[int]:
    """Return the tensors that operations on whole numbers make and that only such read."""
    readers: dict[int, list[Op]] = defaultdict(list)
    for op in program.ops:
        for i in op.inputs:
            readers[i].append(op)
    read_whole: set[int] = set()
    for op in reversed(program.ops):
        for i in op.outputs:
            whole = all(
                isinstance(r, _WHOLE) or (isinstance(r, Reshape) and r.outputs[0] in read_whole)
                for r in readers[i]
            )
            if whole and readers[i] and i not in program.outputs:
                read_whole.add(i)
    found: set[int] = set()
    for op in program.ops:
        made_whole = isinstance(op, _WHOLE) or (isinstance(op, Reshape) and op.inputs[0] in found)
        if made_whole:
            found.update(read_whole.intersection(op.outputs))
    return frozenset(found)
