"""What stands in the way of a file."""

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import numpy as np

from simqat_jax.integer.refusals import MOVE_OUT, REPLACE, RefusedError, place, raise_all
from simqat_jax.ir.program import Op, Program
from simqat_jax.ops.floats import FloatOp, MoveOp
from simqat_jax.ops.primitives import Primitive

_COMPUTED = ("float32", "int32", "bool")
_HELD = (*_COMPUTED, "uint8", "int8")
OTHER_FILE = (
    'Write it for ONNX Runtime, with export_onnx(convert(..., backend="onnx"), path), or run the '
    "integer model itself (IntegerModel.save)."
)
"""A remedy for what TFLite alone cannot hold."""
_PICK = (
    "Where one element of each example is taken, `x[jnp.arange(len(x)), k]`, take it by a product, "
    "which is exact: `(x * jax.nn.one_hot(k, x.shape[1])[..., None]).sum(1)`."
)
"""The remedy for what takes another element of each example."""
_RUN = "or run the integer model itself (IntegerModel.save), which computes this in float"

_EARLIER = (
    ": no runtime computes wider codes exactly. SimQATConfig(targets=...) tells before training."
)


def _remedy(where: str) -> str:
    """Return what to do about a float operation that no file holds, for where it stands."""
    return MOVE_OUT.get(where, f"{REPLACE}, {_RUN}. Exclusion does not help.")


def refuse(op: Op, problem: str, remedy: str) -> NoReturn:
    """Raise RefusedError for an operation that a file cannot hold exactly."""
    raise RefusedError(op, problem, remedy)


def refuse_float(program: Program, op: Op) -> NoReturn:
    """Raise RefusedError for what no file holds, with a remedy for where it stands."""
    where = place(program, op)
    what = "moves codes" if isinstance(op, MoveOp) else "computed in float"
    why = op.why if isinstance(op, FloatOp) else op.kind
    remedy = _PICK if why.startswith("gather") else _remedy(where)
    refuse(op, f"{what} in a way that no file holds ({why}), {where}", remedy)


def refuse_primitive(program: Program, op: Op, problem: str) -> NoReturn:
    """Raise RefusedError for a primitive that a runtime lacks."""
    refuse(op, problem, _remedy(place(program, op)))


def check_shape(op: Op, shape: Sequence[int]) -> None:
    """Raise RefusedError for a shape that no reshape can name: -1 stands for one length alone."""
    if sum(d < 0 for d in shape) > 1:
        refuse(op, "more than one of its lengths depends on the batch size", "Reshape to others.")


def check_types(program: Program, op: Primitive) -> None:
    """Raise RefusedError for a primitive on numbers of a type that no file computes with."""
    known = _COMPUTED if op.computes_reals else _HELD
    for i in (*op.inputs, *op.outputs):
        dtype = program.tensors[i].dtype
        if dtype not in known:
            remedy = _given(program, op, dtype) or (
                "Compute it in float32 or int32 (`dtype` of a layer, `astype`)."
            )
            refuse(op, f"{op.name} of {dtype}, which no file computes with", remedy)


def _given(program: Program, op: Op, dtype: str) -> str | None:
    """Return the remedy where an operation reads an input of this type; None: it reads none."""
    read = set(op.inputs)
    for other in reversed(program.ops[: program.ops.index(op)]):
        if not read.isdisjoint(other.outputs):
            read.update(other.inputs)
    given = [program.tensors[i] for i in program.inputs if i in read]
    names = [tensor.name for tensor in given if tensor.dtype == dtype]
    if not names:
        return None
    to = "int32" if dtype.removeprefix("u").startswith("int") else "float32"
    return f'Give the model {to} in front of the call, `x.astype("{to}")`, for {", ".join(names)}.'


def refuse_wide(program: Program, op: Op) -> None:
    """Raise RefusedError for weights or activations of more than 8 bits.

    ONNX Runtime has no integer kernels for 16 bits and adds in float, in an order of its own.
    LiteRT multiplies sums by a factor of 15 bits: half a code off at full scale.
    """
    if op.arrays.get("kernel", np.zeros((), np.int8)).dtype != np.int8:
        remedy = "Use SimQATConfig(weight=QuantSpec(num_bits=8)) or fewer bits" + _EARLIER
        refuse(op, "its weights have more than 8 bits", remedy)
    grids = [program.tensors[i].grid for i in (*op.inputs, *op.outputs)]
    if any(grid is not None and grid.dtype.itemsize > 1 for grid in grids):
        remedy = "Use SimQATConfig(activation=QuantSpec(num_bits=8)) or fewer bits" + _EARLIER
        refuse(op, "its activations have more than 8 bits", remedy)


def each(ops: Sequence[Op], act: Callable[[Op], None], file: str) -> None:
    """Do something for every operation; raise ValueError for all refusals together.

    What depends on a refused operation is left out: it would be refused for that alone.
    """
    refused, unknown = [], set[int]()
    for op in ops:
        if unknown.isdisjoint(op.inputs):
            try:
                act(op)
                continue
            except RefusedError as error:
                refused.append(error)
        unknown.update(op.outputs)
    raise_all(refused, file)


def check(ops: Iterable[Op], act: Callable[[Op], None], file: str) -> None:
    """Check every operation, whatever it depends on; raise ValueError for all refusals together."""
    refused = []
    for op in ops:
        try:
            act(op)
        except RefusedError as error:
            refused.append(error)
    raise_all(refused, file)
