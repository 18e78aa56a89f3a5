"""What an integer model is called with: arrays that fit its tensors."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.integer.table import shape_text
from simqat_jax.ir.program import Tensor, at_batch
from simqat_jax.numerics.arguments import shown


def real_values(tensors: Sequence[Tensor], leaves: Sequence[ArrayLike]) -> list[jax.Array]:
    """Return the inputs of a model, real values.

    Raises:
      TypeError: what is no array.
      ValueError: an array of another shape or kind; more or fewer arrays.
    """
    arrays = _arrays(tensors, leaves, "real values")
    for tensor, x in zip(tensors, arrays, strict=True):
        if tensor.grid is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{tensor.name} must be of a floating-point type, got {x.dtype}. Pass real values, "
                "scaled as in training, such as x.astype('float32') / 255; codes go to run_codes."
            )
        if tensor.grid is None and not _holds(jnp.dtype(tensor.dtype), x.dtype):
            raise ValueError(f"{tensor.name} must be of type {tensor.dtype}, got {x.dtype}.")
    pairs = zip(tensors, arrays, strict=True)
    return [x if t.grid is not None else x.astype(t.dtype) for t, x in pairs]


def _holds(dtype: np.dtype, given: np.dtype) -> bool:
    """Whether values of one type may be passed for those of another."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(given, jnp.floating):
        return True
    return np.can_cast(given, dtype, "same_kind")


def codes(tensors: Sequence[Tensor], leaves: Sequence[ArrayLike], remedy: str) -> list[jax.Array]:
    """Return codes (real values of what is on no grid); `remedy` says where they come from.

    Raises:
      TypeError: what is no array.
      ValueError: an array of another shape or type; more or fewer arrays.
    """
    arrays = _arrays(tensors, leaves, "codes")
    for tensor, x in zip(tensors, arrays, strict=True):
        grid = tensor.grid
        if grid is not None and x.dtype != grid.dtype:
            raise ValueError(
                f"{tensor.name}: codes must be of type {grid.dtype}, got {x.dtype}. {remedy}"
            )
    return arrays


def batch_size(tensors: Sequence[Tensor], arrays: Sequence[jax.Array]) -> int:
    """Return the batch size of arrays that fit tensors, 1 where there is none.

    Raises:
      ValueError: an array of another shape.
    """
    batch = 1
    for tensor, x in zip(tensors, arrays, strict=True):
        for want, got in zip(tensor.shape, x.shape, strict=False):
            batch = got // -want if want < 0 else batch
    for tensor, x in zip(tensors, arrays, strict=True):
        if x.shape != at_batch(tensor.shape, batch):
            raise ValueError(
                f"{tensor.name} must have shape {shape_text(tensor.shape)}, got {x.shape}."
            )
    return batch


def _arrays(tensors: Sequence[Tensor], leaves: Sequence[ArrayLike], what: str) -> list[jax.Array]:
    if len(leaves) != len(tensors):
        raise ValueError(f"the model takes {len(tensors)} arrays of {what}, got {len(leaves)}.")
    arrays = [_array(tensor.name, x, what) for tensor, x in zip(tensors, leaves, strict=True)]
    batch_size(tensors, arrays)
    return arrays


def _array(name: str, value: ArrayLike, what: str) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:  # text, None and whatever else is no array
        raise TypeError(f"{name} must be an array of {what}, got {shown(value)}.") from error
