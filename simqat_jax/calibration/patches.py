"""A product of data and a kernel as a matrix product: the rows that meet the kernel's columns."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.ir.graph import Constant, Product, shape_of

A = TypeVar("A", jax.Array, np.ndarray)


def groups_of(node: Product) -> int:
    """Return how many groups of channels do not meet: of a depthwise convolution, all."""
    params = node.contraction.eqn.params
    if node.contraction.convolves:
        return int(params["feature_group_count"])
    (_, _), (batch, _) = params["dimension_numbers"]
    shape = shape_of(node.contraction.eqn.invars[0]).shape
    return math.prod(shape[axis] for axis in batch)


def columns(node: Product, kernel: A) -> A:
    """View a kernel as one matrix for each group, shape (G, K, C / G)."""
    groups = groups_of(node)
    return kernel.reshape(-1, groups, node.num_channels // groups).transpose(1, 0, 2)


def kernel_of(matrices: A, shape: tuple[int, ...]) -> A:
    """Undo `columns`: return a kernel of this shape."""
    return matrices.transpose(1, 0, 2).reshape(shape)


def patches(node: Product, x: jax.Array) -> jax.Array:
    """Return what the product multiplies by its kernel's columns, shape (G, rows, K), float32.

    `product(x) = patches(x) @ columns(kernel)`, up to the order of its axes.
    """
    x = x.astype(jnp.float32)
    for before in node.before:
        fixed = [jnp.asarray(v.value, x.dtype) for v in before.inputs if isinstance(v, Constant)]
        x = before.eqn.primitive.bind(x, *fixed, **before.eqn.params)
    params, groups = node.contraction.eqn.params, groups_of(node)
    if node.contraction.convolves:
        return _windows(node, x, groups)
    (sums, _), (batch, _) = params["dimension_numbers"]
    rows = [axis for axis in range(x.ndim) if axis not in (*sums, *batch)]
    count = math.prod(x.shape[axis] for axis in rows)
    return x.transpose((*batch, *rows, *sums)).reshape(groups, count, -1)


def _windows(node: Product, x: jax.Array, groups: int) -> jax.Array:
    """Return what a convolution's window sees at each of its places."""
    eqn = node.contraction.eqn
    params, (*window, _, _) = eqn.params, shape_of(eqn.invars[1]).shape
    strides, apart = params["window_strides"], params["rhs_dilation"]
    between = [d - 1 for d in params["lhs_dilation"]]
    sides = [(lo, hi, d) for (lo, hi), d in zip(params["padding"], between, strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *sides, (0, 0, 0)])
    spans = [(n - 1) * d + 1 for n, d in zip(window, apart, strict=True)]
    ends = [n - span for n, span in zip(x.shape[1:-1], spans, strict=True)]
    seen = []
    for place in np.ndindex(*window):
        first = [k * d for k, d in zip(place, apart, strict=True)]
        last = [k + end + 1 for k, end in zip(first, ends, strict=True)]
        part = lax.slice(x, (0, *first, 0), (len(x), *last, x.shape[-1]), (1, *strides, 1))
        seen.append(part.reshape(-1, groups, x.shape[-1] // groups))
    return jnp.stack(seen, axis=2).reshape(len(seen[0]), groups, -1).transpose(1, 0, 2)
