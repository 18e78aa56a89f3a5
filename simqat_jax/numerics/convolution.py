"""Convolutions of whole numbers, exact on every platform."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

_PARAMS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation"),
    *("dimension_numbers", "feature_group_count"),
)
_NARROW = 512
"""Input channels of a group times output channels; below, XLA on CPU has no kernel of int8."""


def convolve(x: jax.Array, kernel: jax.Array, dtype: DTypeLike, **params: Any) -> jax.Array:
    """Convolve whole numbers; exact wherever `dtype` holds the sums.

    On CPU a convolution is one; of integers with few channels in float32 where that holds the sums:
    for them XLA has no kernel but its own loops. Libraries of other platforms may transform its
    inputs first (Winograd, FFT), which is not exact, and know no sums of 8-bit codes in 32 bits:
    there it is a matrix product of windows.

    Args:
      x: data, whole numbers, float or integer.
      kernel: of the same type.
      dtype: of the sums.
      params: of the primitive `conv_general_dilated`, without groups of the batch.
    """
    exact = {"precision": lax.Precision.HIGHEST, "preferred_element_type": np.dtype(dtype)}
    exact |= {name: params[name] for name in _PARAMS}
    whole = partial(lax.conv_general_dilated, batch_group_count=1, **exact)
    if _is_narrow(kernel, params["dimension_numbers"]):
        whole = partial(_in_float, whole, dtype)
    return lax.platform_dependent(x, kernel, cpu=whole, default=partial(by_windows, **exact))


def _is_narrow(kernel: jax.Array, numbers: lax.ConvDimensionNumbers) -> bool:
    """Whether a kernel of 8-bit codes has few channels, and float32 holds its sums."""
    out, into = (kernel.shape[axis] for axis in numbers.rhs_spec[:2])
    fan_in = kernel.size // out
    return kernel.dtype == np.int8 and into * out < _NARROW and fan_in * 2**14 <= 2**24


def _in_float(
    convolution: Callable[..., jax.Array], dtype: DTypeLike, x: jax.Array, kernel: jax.Array
) -> jax.Array:
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    return convolution(x, kernel, preferred_element_type=np.float32).astype(dtype)


def padded(
    x: jax.Array,
    value: ArrayLike,
    axes: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> jax.Array:
    """Pad the spatial axes of a convolution's input with a value, also between neighbours."""
    edges = [(0, 0, 0)] * x.ndim
    for axis, (lo, hi), step in zip(axes, padding, dilation, strict=True):
        edges[axis] = (lo, hi, step - 1)
    return lax.pad(x, jnp.asarray(value, x.dtype), edges)


def by_windows(
    x: jax.Array,
    kernel: jax.Array,
    *,
    window_strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    lhs_dilation: tuple[int, ...],
    rhs_dilation: tuple[int, ...],
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    precision: Any,
    preferred_element_type: DTypeLike,
) -> jax.Array:
    """Return what `lax.conv_general_dilated` does, as one matrix product."""
    (n, c, *of_x), (out, into, *of_kernel), out_spec = dimension_numbers
    x, kernel = x.transpose(n, *of_x, c), kernel.transpose(*of_kernel, into, out)
    rank = len(window_strides)
    x = padded(x, 0, range(1, rank + 1), padding, lhs_dilation)
    for i in range(rank):  # each spatial axis becomes two: places, and their windows
        axis, reach = 1 + 2 * i, rhs_dilation[i] * np.arange(kernel.shape[i])
        places = np.arange(0, x.shape[axis] - reach[-1], window_strides[i])
        x = jnp.take(x, places[:, None] + reach, axis=axis)
    groups = feature_group_count
    x = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    kernel = kernel.reshape(*kernel.shape[:-1], groups, kernel.shape[-1] // groups)
    windows = tuple(range(2, 2 * rank + 1, 2))
    numbers = (((*windows, x.ndim - 1), tuple(range(rank + 1))), ((x.ndim - 2,), (rank + 1,)))
    sums = lax.dot_general(
        x, kernel, numbers, precision=precision, preferred_element_type=preferred_element_type
    )
    sums = jnp.moveaxis(sums, 0, -2)
    sums = sums.reshape(*sums.shape[:-2], kernel.shape[-1] * groups)
    n, c, *of_sums = out_spec
    return sums.transpose(np.argsort((n, *of_sums, c)).tolist())
