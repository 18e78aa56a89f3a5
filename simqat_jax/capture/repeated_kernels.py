"""Products of data and a kernel that repeats along their batch, as in attention from queries.

The batch is an output channel of such a product. Of one kernel for all examples it is none.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax import lax
from jax.extend import core

from simqat_jax.capture.contractions import Form, form_of, identity, product_axes, rebound, traced
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.repetitions import computed_once
from simqat_jax.ir.graph import Add, BatchNorm, Contraction, Node, Operand, shape_of


class Operands(NamedTuple):
    """What a product of data and a kernel is made of.

    Attributes:
      kernel: one for all examples, where it was repeated.
      form: of the product with it.
      unrepeated: whether it was.
    """

    kernel: Operand
    form: Form
    unrepeated: bool


def shapes_once(draft: Draft) -> dict[int, tuple[int, ...]]:
    """Return the shape of each constant that repeats along an axis, with length 1 there."""
    return {
        v: shape_of(thin).shape
        for node, eqn in computed_once(draft).items()
        for v, thin in zip(node.outputs, eqn.outvars, strict=True)
    }


def unrepeated(
    draft: Draft, node: Contraction, swapped: bool, once: Mapping[int, tuple[int, ...]]
) -> Operands:
    """Return kernel and form of a product; of kernels that repeat along the batch, the first.

    With a batch of one, where nothing repeats, the batch is what the data's first axis is.

    Args:
      draft: the new nodes come in front of the product.
      node: the product.
      swapped: the data is its second operand.
      once: what `shapes_once` returned.
    """
    side = 0 if swapped else 1
    kernel, form = node.inputs[side], form_of(node.eqn, swapped)
    repeats = _repeated_axes(draft, node, side, once)
    full = identity(shape_of(node.eqn.invars[side]).shape)
    kept = [a for a in full if a not in repeats]
    if not repeats or _would_take_more(draft, node, side, kept):
        return Operands(kernel, form, unrepeated=False)
    one = _first_along(draft, node, kernel, repeats)
    avals = (draft.aval(one if n == side else v) for n, v in enumerate(node.inputs))
    eqn = rebound(node.eqn, *avals, dimension_numbers=_numbers_without(node.eqn, side, kept))
    form, made = form_of(eqn, swapped), _names(eqn, side, kept)
    order = tuple(form.output[made.index(name)] for name in _names(node.eqn, side, full))
    return Operands(one, form._replace(output=order), unrepeated=True)


def _repeated_axes(
    draft: Draft, node: Contraction, side: int, once: Mapping[int, tuple[int, ...]]
) -> list[int]:
    """Return the axes of a kernel that are the batch, along which it repeats."""
    kernel, full = node.inputs[side], shape_of(node.eqn.invars[side]).shape
    if node.convolves or not isinstance(kernel, int) or _is_converted(draft, kernel):
        return []
    thin, single = once.get(kernel, full), draft.graph.batch == 1
    batch = node.eqn.params["dimension_numbers"][1]
    return [
        a
        for of_data, a in zip(batch[1 - side], batch[side], strict=True)
        if thin[a] < full[a] or (single and of_data == 0 and full[a] == 1)
    ]


def _first_along(draft: Draft, node: Node, v: Operand, axes: Sequence[int]) -> int:
    """Return the first of a tensor along axes, which are left out."""
    lengths = [1 if a in axes else n for a, n in enumerate(draft.aval(v).shape)]
    start = [0] * len(lengths)
    first = traced(lambda x: lax.slice(x, start, lengths), draft.aval(v))
    taken = draft.once((v, "first", *axes), node, lambda: draft.made(node, v, first))
    squeezed = traced(lambda x: lax.squeeze(x, axes), draft.avals[taken])
    return draft.once((taken, "left out", *axes), node, lambda: draft.made(node, taken, squeezed))


def _numbers_without(eqn: core.JaxprEqn, side: int, kept: list[int]) -> object:
    """Return the axes of a product without those of one operand that are not kept."""
    sums, batch = eqn.params["dimension_numbers"]
    pairs = [pair for pair in zip(*batch, strict=True) if pair[side] in kept]
    both = (list(sums), [[pair[n] for pair in pairs] for n in range(2)])
    for of in both:
        of[side] = [kept.index(a) for a in of[side]]
    return tuple(tuple(map(tuple, of)) for of in both)


def _names(eqn: core.JaxprEqn, side: int, axes: Sequence[int]) -> list[tuple[bool, int]]:
    """Name each axis of a product after one of its data, or else of its kernel.

    Args:
      eqn: a matrix product.
      side: which operand the kernel is.
      axes: what the kernel's axes are called.
    """
    names = []
    for pair in product_axes(eqn):
        of_data, of_kernel = pair[1 - side], pair[side]
        if of_data is not None:
            names.append((True, of_data))
        elif of_kernel is not None:
            names.append((False, axes[of_kernel]))
    return names


def _is_converted(draft: Draft, v: int) -> bool:
    """Whether a kernel changes its type for the product: its codes are those before."""
    producer = draft.producers.get(v)
    return producer is not None and producer.primitive == "convert_element_type"


def _would_take_more(draft: Draft, node: Node, side: int, kept: list[int]) -> bool:
    """Whether a bias or BatchNorm behind the product would belong to it, and did not so far.

    Ranges that were observed are those of the product alone.
    """
    pairs = product_axes(node.eqn)
    channels = [k for k, pair in enumerate(pairs) if pair[side] in kept]
    behind = draft.only_reader(node.outputs[0], node)
    return channels == [len(pairs) - 1] and isinstance(behind, Add | BatchNorm)
