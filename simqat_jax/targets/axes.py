"""Matrix products along axes that come back to their places: the same codes with fewer moves.

A product along any axis is a transposition, a product along the last axis, and a transposition.
`jax.image.resize` multiplies each axis so, and leaves the axes in another order in between: every
transposition moves several axes, which runtimes do one number at a time. Where all axes are back in
their places at the end, each product needs no more than its own axis moved to the end and back.
"""

import dataclasses
from collections.abc import Sequence

from simqat_jax.ir.program import Op, Program, Shape, Tensor, joined
from simqat_jax.ops.moves import Reshape, Transpose
from simqat_jax.ops.products import Dense


def moving_one_axis(program: Program) -> Program:
    """Return a program with the same codes whose resizes move one axis at a time."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for i in op.inputs:
            readers.setdefault(i, []).append(op)
    only = {i: found[0] for i, found in readers.items() if len(found) == 1}
    for i in program.outputs:
        only.pop(i, None)
    tensors, ops, done = list(program.tensors), [], set[int]()
    for op in program.ops:
        chain = _chain(op, only, program.tensors) if op.outputs[0] not in done else []
        if chain:
            done.update(link.outputs[0] for link in chain)
            ops += _moved(chain, tensors)
        elif op.outputs[0] not in done:
            ops.append(op)
    return dataclasses.replace(program, tensors=tuple(tensors), ops=tuple(ops))


def _chain(op: Op, only: dict[int, Op], tensors: Sequence[Tensor]) -> list[Op]:
    """Return transpositions and products from `op` on, as many as leave every axis in its place."""
    chain: list[Op] = []
    order, back = tuple(range(len(tensors[op.outputs[0]].shape))), 0
    link: Op | None = op if isinstance(op, Transpose) else None
    while isinstance(link, Transpose | Dense):
        chain.append(link)
        if isinstance(link, Transpose):
            order = tuple(order[a] for a in link.permutation)
        if order == tuple(range(len(order))):
            back = len(chain)
        link = only.get(link.outputs[0])
    products = [link for link in chain[:back] if isinstance(link, Dense)]
    return chain[:back] if products else []


def _moved(chain: Sequence[Op], tensors: list[Tensor]) -> list[Op]:
    """Return the products of a chain, each with its axis moved to the end and back."""
    ops: list[Op] = []
    path, source = chain[-1].path, chain[0].inputs[0]
    shape = tensors[source].shape
    order = tuple(range(len(shape)))

    def made(like: int, lengths: Shape) -> int:
        tensors.append(dataclasses.replace(tensors[like], name=f"{path}/moved", shape=lengths))
        return len(tensors) - 1

    def moved(source: int, target: int) -> Transpose:
        return Transpose(path=path, inputs=(source,), outputs=(target,), permutation=(0, 2, 1))

    for link in chain:
        if isinstance(link, Transpose):
            order = tuple(order[a] for a in link.permutation)
            continue
        axis, count, product = order[-1], link.arrays["kernel"].shape[-1], link.outputs[0]
        lead, trail = (joined(part) for part in (shape[:axis], shape[axis + 1 :]))
        split = made(source, (lead, shape[axis], trail))
        last = made(source, (lead, trail, shape[axis]))
        result = made(product, (lead, trail, count))
        back = made(product, (lead, count, trail))
        ops += [
            Reshape(path=path, inputs=(source,), outputs=(split,)),
            moved(split, last),
            dataclasses.replace(link, inputs=(last,), outputs=(result,)),
            moved(result, back),
        ]
        source, shape = back, (*shape[:axis], count, *shape[axis + 1 :])
    return [*ops, Reshape(path=path, inputs=(source,), outputs=chain[-1].outputs)]
