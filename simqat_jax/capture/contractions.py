"""Convolutions and matrix products with their data first and their kernel's channels last."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
from jax.extend import core

from simqat_jax.ir.graph import shape_of

Axes = tuple[int, ...]
"""Axes of an array, or an order of them."""


class Form(NamedTuple):
    """A contraction of data and a kernel as this library writes it.

    A kernel ends in its output channels: (inputs ..., channels ...) of a matrix product,
    (spatial ..., in, out) of a convolution, whose data is (batch, spatial ..., channels).

    Attributes:
      data: in which order the axes of the data are taken first.
      kernel: likewise those of the kernel.
      eqn: the contraction of both.
      output: in which order the axes of its result are taken behind it.
      channel_axes: the axes of its result that the output channels are.
      features: their lengths.
    """

    data: Axes
    kernel: Axes
    eqn: core.JaxprEqn
    output: Axes
    channel_axes: Axes
    features: tuple[int, ...]


def form_of(eqn: core.JaxprEqn, swapped: bool) -> Form:
    """Return the form of a contraction.

    Args:
      eqn: a convolution or matrix product.
      swapped: the data is its second operand; never of a convolution.
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _convolution(eqn)
    return _matrix_product(eqn, swapped)


def identity(axes: Sequence[int]) -> Axes:
    """Return the order that leaves as many axes as they are."""
    return tuple(range(len(axes)))


def in_order(aval: jax.ShapeDtypeStruct, order: Axes) -> jax.ShapeDtypeStruct:
    """Return shape and dtype of a transposed array."""
    return jax.ShapeDtypeStruct(tuple(aval.shape[a] for a in order), aval.dtype)


def traced(function: Callable[..., object], *avals: jax.ShapeDtypeStruct) -> core.JaxprEqn:
    """Return the one equation of a function."""
    (eqn,) = jax.make_jaxpr(function)(*avals).jaxpr.eqns
    return eqn


def transposition(aval: jax.ShapeDtypeStruct, order: Axes) -> core.JaxprEqn:
    """Return what transposes an array, even if to what it is."""
    return traced(lambda x: lax.transpose_p.bind(x, permutation=order), aval)


def rebound(eqn: core.JaxprEqn, *avals: jax.ShapeDtypeStruct, **params: object) -> core.JaxprEqn:
    """Return an equation of other operands, with some parameters changed."""
    return traced(lambda *xs: eqn.primitive.bind(*xs, **{**eqn.params, **params}), *avals)


def product_axes(eqn: core.JaxprEqn) -> list[tuple[int | None, int | None]]:
    """Return for each axis of a matrix product that of each operand; None: it has none."""
    sums, batch = eqn.params["dimension_numbers"]
    axes: list[tuple[int | None, int | None]] = list(zip(*batch, strict=True))
    for side, v in enumerate(eqn.invars):
        free = [a for a in range(shape_of(v).ndim) if a not in (*sums[side], *batch[side])]
        axes += [(a, None) if side == 0 else (None, a) for a in free]
    return axes


def _matrix_product(eqn: core.JaxprEqn, swapped: bool) -> Form:
    (contracted, batch), step = eqn.params["dimension_numbers"], -1 if swapped else 1
    (x_sums, k_sums), (x_batch, k_batch) = contracted[::step], batch[::step]
    x, kernel = map(shape_of, eqn.invars[::step])
    free = [a for a in range(kernel.ndim) if a not in (*k_sums, *k_batch)]
    order = (*k_sums, *k_batch, *free)
    sums, count = len(k_sums), len(k_batch)
    rows = x.ndim - sums - count
    inner = in_order(kernel, order)
    channels = tuple(range(count)), tuple(range(count + rows, count + rows + len(free)))
    # The second operand's own axes come last: those of the kernel, unless it was the first.
    output = (*channels[0], *channels[1], *range(count, count + rows))
    if swapped or order != identity(order):
        dims = ((x_sums, range(sums)), (x_batch, range(sums, sums + count)))
        numbers = tuple(tuple(map(tuple, pair)) for pair in dims)
        precision = eqn.params["precision"]
        precision = precision[::step] if isinstance(precision, tuple) else precision
        eqn = rebound(eqn, x, inner, dimension_numbers=numbers, precision=precision)
    return Form(
        data=identity(x.shape),
        kernel=order,
        eqn=eqn,
        output=output if swapped else identity(output),
        channel_axes=(*channels[0], *channels[1]),
        features=inner.shape[sums:],
    )


def _convolution(eqn: core.JaxprEqn) -> Form:
    x, kernel = map(shape_of, eqn.invars)
    numbers, last = eqn.params["dimension_numbers"], x.ndim - 1
    (n, c, *space), (o, i, *taps) = numbers.lhs_spec, numbers.rhs_spec
    data, order = (n, *space, c), (*taps, i, o)
    n_out, c_out, *space_out = numbers.out_spec
    out = (n_out, *space_out, c_out)
    inner = in_order(kernel, order)
    if (data, order, out) != (identity(data),) * 3:
        spec = (0, last, *range(1, last))
        standard = lax.ConvDimensionNumbers(spec, (last, last - 1, *range(last - 1)), spec)
        eqn = rebound(eqn, in_order(x, data), inner, dimension_numbers=standard)
    return Form(
        data=data,
        kernel=order,
        eqn=eqn,
        output=tuple(out.index(a) for a in range(len(out))),
        channel_axes=(last,),
        features=inner.shape[-1:],
    )
