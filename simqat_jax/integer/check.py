"""Whether the parts of a program fit together: of one that comes from a file."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.ir.program import Context, Op, Program, Tensor, at_batch

_BATCH = 2
"""A batch size to try; programs have one form for all."""


def check(program: Program) -> None:
    """Check that each operation runs, and makes what the program says; runs none.

    Raises:
      ValueError: a constant or an array of another shape or type, an operation that does not run
        on its inputs or makes other outputs.
    """
    for tensor in program.tensors:
        if tensor.value is not None:
            wanted = tuple(1 if d < 0 else d for d in tensor.shape)
            dtype = tensor.dtype if tensor.grid is None else tensor.grid.dtype
            _check_array(f"constant {tensor.name}", tensor.value, wanted, (str(dtype),))
    for op in program.ops:
        try:
            _check(op, program.context(op, batch=_BATCH))
        except Exception as error:  # JAX raises as it likes
            raise ValueError(f"{op.path} ({op.kind}) does not fit its tensors: {error}") from error


def _check(op: Op, c: Context) -> None:
    needs = op.needs(c)
    required = {name for name, need in needs.items() if not need.optional}
    if not required <= op.arrays.keys() <= needs.keys():
        raise ValueError(f"it has arrays {sorted(op.arrays)}, and needs {sorted(needs)}")
    for name, array in op.arrays.items():
        _check_array(name, array, needs[name].shape, needs[name].dtypes)

    def run(arrays: dict[str, jax.Array], *inputs: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(op.run(dataclasses.replace(c, arrays=arrays), *inputs))

    made = jax.eval_shape(run, dict(op.prepared(c)), *map(_stored, c.inputs))
    for tensor, x in zip(c.outputs, made, strict=True):
        wanted = _stored(tensor)
        if (x.shape, x.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                f"for {_BATCH} examples it makes {x.dtype}{list(x.shape)} of {tensor.name}, and "
                f"the program says {wanted.dtype}{list(wanted.shape)}"
            )


def _check_array(
    name: str, array: np.ndarray, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]
) -> None:
    if str(array.dtype) not in dtypes or (shape is not None and array.shape != shape):
        wanted = " or ".join(dtypes) + ("" if shape is None else f" of shape {shape}")
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, and must be {wanted}")


def _stored(tensor: Tensor) -> jax.ShapeDtypeStruct:
    """Return what an operation sees of a tensor."""
    dtype = jnp.dtype(tensor.dtype) if tensor.grid is None else tensor.grid.stored_dtype
    return jax.ShapeDtypeStruct(at_batch(tensor.shape, _BATCH), dtype)
