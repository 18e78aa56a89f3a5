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
    """Convolve with a kernel that picks each element of a window."""
    eqn = node.contraction.eqn
    *window, inner, _ = shape_of(eqn.invars[1]).shape
    size = math.prod(window) * inner
    picks = jnp.tile(jnp.eye(size).reshape(*window, inner, size), groups)
    exact = {
        "precision": (lax.Precision.HIGHEST,) * 2,
        "preferred_element_type": np.dtype(np.float32),
    }
    found = eqn.primitive.bind(x, picks, **{**eqn.params, **exact})
    return found.reshape(-1, groups, size).transpose(1, 0, 2)
