"""Every operation: of a graph, by the class of its node; of a program, by its name in files."""

from simqat_jax.ir.graph import Node
from simqat_jax.ir.program import Op
from simqat_jax.ops import (
    arithmetic,
    batch_norm,
    extremes,
    floats,
    functions,
    masked,
    matmul,
    moves,
    norms,
    primitives,
    products,
    softmax,
    spreads,
    sums,
)
from simqat_jax.ops.operation import Operation

_FAMILIES = (
    *(products, matmul, batch_norm, norms, spreads, softmax),
    *(arithmetic, extremes, sums, masked, functions, moves, floats, primitives),
)

OPERATIONS: dict[type[Node], Operation] = {
    kind: operation for family in _FAMILIES for kind, operation in family.OPERATIONS.items()
}
PROGRAM_OPERATIONS: dict[str, type[Op]] = {
    kind: op for family in _FAMILIES for op in family.PROGRAM_OPERATIONS for kind in op.kinds
}


def operation_of(node: Node) -> Operation:
    """Return what a node is on integers."""
    return OPERATIONS[type(node)]
