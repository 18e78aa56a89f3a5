"""The file of an integer model: a checksum, a program in JSON, arrays."""

import dataclasses
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from simqat_jax.files import as_path, atomic_file
from simqat_jax.integer.check import check
from simqat_jax.ir.program import (
    ArrayKey,
    Function,
    Op,
    Program,
    Structure,
    Tensor,
    array_key,
    at_batch,
)
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.packing import pack, packed_width, unpack
from simqat_jax.ops.floats import FloatOp, MoveOp
from simqat_jax.ops.registry import PROGRAM_OPERATIONS

FORMAT = 5
_READ = (3, 4, FORMAT)
"""The formats that can be read: 3 has no packed codes, 3 and 4 hold equal arrays again."""
_MAGIC = "simqat_jax integer model"

Arrays = dict[str, np.ndarray]
Json = Any
"""What JSON holds."""


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write a program to a file, see IntegerModel.save."""
    body = to_bytes(program)
    header = {"what": _MAGIC, "format": FORMAT, "sha256": _digest(body)}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("model.npz", body)


def to_bytes(program: Program) -> bytes:
    """Return a program as `of_bytes` reads it.

    Raises:
      ValueError: an operation in float that holds a loop; random keys made of inputs.
    """
    _check_no_keys(program)
    arrays: Arrays = {}
    fields = {
        "tensors": [_tensor_fields(t, n, arrays) for n, t in enumerate(program.tensors)],
        "ops": [_op_fields(program, op, n, arrays) for n, op in enumerate(program.ops)],
        "inputs": program.inputs,
        "outputs": program.outputs,
        "structure": _encoded(program.structure),
        "backend": program.backend,
        "metadata": program.metadata,
    }
    body, same = io.BytesIO(), _repeated(arrays)
    text = json.dumps(fields | {"same": same})
    arrays = {name: a for name, a in arrays.items() if name not in same}
    arrays["program"] = np.frombuffer(text.encode(), np.uint8)
    np.savez(body, allow_pickle=False, **arrays)
    return body.getvalue()


def _repeated(arrays: Arrays) -> dict[str, str]:
    """Return for each array that is equal to one before it that one's name."""
    first: dict[ArrayKey, str] = {}
    names = {name: first.setdefault(array_key(a), name) for name, a in arrays.items()}
    return {name: earlier for name, earlier in names.items() if name != earlier}


def _check_no_keys(program: Program) -> None:
    """Raise ValueError for random keys that a program makes of its inputs."""
    for tensor in program.tensors:
        try:
            jnp.dtype(tensor.dtype)
        except TypeError as error:
            raise ValueError(
                f"{tensor.name}: random numbers are drawn with a key that depends on the inputs "
                f"({tensor.dtype}), which no file holds. Let the model draw none in evaluation, or "
                "give it the random numbers themselves as an argument."
            ) from error


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program from a file, see IntegerModel.load."""
    body = _body(path)
    try:
        return of_bytes(body)
    except Exception as error:  # a file may hold anything, and JSON and NumPy raise accordingly
        raise ValueError(_damaged(path, error)) from error


def of_bytes(body: bytes) -> Program:
    """Read what `to_bytes` wrote; raises whatever JSON and NumPy raise where it is damaged."""
    arrays = _arrays(body)
    text = json.loads(arrays["program"].tobytes())
    arrays |= {name: arrays[earlier] for name, earlier in text.get("same", {}).items()}
    tensors = [_tensor(t, n, arrays) for n, t in enumerate(text["tensors"])]
    ops = [_op(op, n, arrays) for n, op in enumerate(text["ops"])]
    program = Program(
        tensors=tuple(tensors),
        ops=tuple(ops),
        inputs=_numbers(text["inputs"]),
        outputs=_numbers(text["outputs"]),
        structure=_decoded(text["structure"]),
        backend=_text(text["backend"]),
        metadata=dict(text["metadata"]),
    )
    program.validate()
    check(program)
    return program


def _body(path: str | os.PathLike[str]) -> bytes:
    """Return what the file holds, once its checksum is that of what was written.

    Reads no more than the archive's directory before it knows how large the parts are.
    """
    path = as_path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} cannot be read: it is no file.")
    try:
        with path.open("rb") as file:
            header, body = _parts(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(header, dict) or header.get("what") != _MAGIC:
        raise ValueError(f"{path} is no integer model of simqat_jax.")
    if header.get("format") not in _READ:
        raise ValueError(
            f"{path} has format {header.get('format')}; this version of simqat_jax reads "
            f"{' and '.join(map(str, _READ))}. Convert the model again."
        )
    if header.get("sha256") != _digest(body):
        raise ValueError(f"{path} is damaged: its checksum does not match.")
    return body


def _damaged(path: str | os.PathLike[str], error: Exception) -> str:
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{path} is no integer model of simqat_jax, or damaged: {reason}. Save the model again."


def _parts(file: BinaryIO) -> tuple[Json, bytes]:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        _check_members(archive, size)
        if sorted(archive.namelist()) != ["header.json", "model.npz"]:
            raise ValueError("it holds other parts than a header and a model")
        return json.loads(archive.read("header.json")), archive.read("model.npz")


def _arrays(body: bytes) -> Arrays:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        _check_members(archive, len(body))
        names = archive.namelist()
        return {name.removesuffix(".npy"): _array(name, archive.read(name)) for name in names}


def _array(name: str, data: bytes) -> np.ndarray:
    """Read an array whose header says that it is as large as it is."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype.kind not in "biufV":
        raise ValueError(f"{name} holds no numbers but {dtype}")
    if not dtype.itemsize or math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"{name} is not as large as its shape {shape}")
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check that an archive unpacks to no more than it is: `save` compresses nothing."""
    members = archive.infolist()
    compressed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    if compressed:
        raise ValueError(f"{', '.join(compressed)}: compressed, as `save` writes none")
    if len(set(archive.namelist())) < len(members):
        raise ValueError("two of its parts have one name")
    if sum(m.file_size for m in members) > size:
        raise ValueError("its parts are said to be larger than the file")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# Tensors and operations --------------------------------------------------------------------------


def _tensor_fields(tensor: Tensor, number: int, arrays: Arrays) -> Json:
    grid = None if tensor.grid is None else dataclasses.asdict(tensor.grid)
    fields = {"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype, "grid": grid}
    if tensor.value is not None:
        arrays[f"constant/{number}"] = tensor.value
    return fields | {"constant": tensor.value is not None}


def _tensor(fields: Json, number: int, arrays: Mapping[str, np.ndarray]) -> Tensor:
    dtype = jnp.dtype(_text(fields["dtype"]))
    value = arrays[f"constant/{number}"] if fields["constant"] else None
    if value is not None and value.dtype.kind == "V":  # NumPy's files know no bfloat16
        value = value.view(dtype)
    grid = None if fields["grid"] is None else Grid(**fields["grid"])
    return Tensor(_text(fields["name"]), _numbers(fields["shape"]), dtype.name, grid, value)


def _op_fields(program: Program, op: Op, number: int, arrays: Arrays) -> Json:
    held = dict(op.arrays)
    if isinstance(op, FloatOp):
        held["function"] = np.frombuffer(_exported(program, op), np.uint8)
    widths = {name: packed_width(a) for name, a in held.items()}
    narrow = {name: width for name, width in widths.items() if width is not None}
    packed = {name: {"width": width, "shape": held[name].shape} for name, width in narrow.items()}
    held |= {name: pack(held[name], width) for name, width in narrow.items()}
    arrays |= {f"{number}/{name}": a for name, a in held.items()}
    fields = {"kind": op.kind, "path": op.path, "inputs": op.inputs, "outputs": op.outputs}
    return fields | {"attributes": op.attributes, "arrays": sorted(held), "packed": packed}


def _op(fields: Json, number: int, arrays: Mapping[str, np.ndarray]) -> Op:
    held = {name: arrays[f"{number}/{name}"] for name in fields["arrays"]}
    for name, form in fields.get("packed", {}).items():
        held[name] = unpack(held[name], form["width"], _numbers(form["shape"]))
    given = _tuples(fields["attributes"])
    if "function" in held:
        given["function"] = _imported(held.pop("function").tobytes())
    return PROGRAM_OPERATIONS[fields["kind"]](
        kind=fields["kind"],
        path=_text(fields["path"]),
        inputs=_numbers(fields["inputs"]),
        outputs=_numbers(fields["outputs"]),
        arrays=held,
        **given,
    )


def _exported(program: Program, op: FloatOp) -> bytes:
    """Serialize a float function, for any batch size."""
    batch: Any = jax.export.symbolic_shape("batch")[0]
    dims = [program.tensors[i].shape for i in op.inputs]
    shapes = [
        jax.ShapeDtypeStruct(
            at_batch(program.tensors[i].shape, batch),
            np.int32 if _takes_codes(program, op, i) else program.tensors[i].dtype,
        )
        for i in op.inputs
    ]
    # Where the batch size can be read off: the first input that has it, and its axis.
    where = next(((p, axis) for p, d in enumerate(dims) for axis, n in enumerate(d) if n < 0), None)

    def run(*values: jax.Array) -> tuple[jax.Array, ...]:
        if where is None:
            return tuple(op.function(values, 1))
        position, axis = where
        size = values[position].shape[axis] // -dims[position][axis]
        return tuple(op.function(values, size))

    return bytes(jax.export.export(jax.jit(run))(*shapes).serialize())


def _takes_codes(program: Program, op: FloatOp, i: int) -> bool:
    return isinstance(op, MoveOp) and program.tensors[i].grid is not None


def _imported(data: bytes) -> Function:
    exported = jax.export.deserialize(bytearray(data))
    return lambda values, batch: tuple(exported.call(*values))


# JSON --------------------------------------------------------------------------------------------


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _numbers(value: Json) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(n) is not int for n in value):
        raise TypeError(f"{value!r} are no whole numbers")
    return tuple(value)


def _tuples(value: Json) -> Json:
    """Undo what JSON does to tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _encoded(structure: Structure) -> Json:
    """Write a structure so that JSON keeps tuples apart from lists."""
    if isinstance(structure, dict):
        return {"dict": {k: _encoded(v) for k, v in structure.items()}}
    if isinstance(structure, (list, tuple)):
        return {type(structure).__name__: [_encoded(v) for v in structure]}
    return structure


def _decoded(structure: Json) -> Structure:
    if not isinstance(structure, dict):
        return structure
    ((kind, value),) = structure.items()
    if kind == "dict":
        return {k: _decoded(v) for k, v in value.items()}
    return (tuple if kind == "tuple" else list)(map(_decoded, value))
