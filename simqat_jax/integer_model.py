"""An integer-only model: tensors on fixed grids, operations on their codes, one jitted function."""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from simqat_jax.files import atomic_file
from simqat_jax.integer_operations import OPERATIONS, Context, Grid, Op, Tensor

FORMAT = 1
_MAGIC = "simqat_jax integer model"


class IntegerModel:
    """A model on integer codes: int8 kernels, int32 biases, fixed scales.

    Made by `convert` or `IntegerModel.load`.

    Attributes:
      tensors: every tensor, by number.
      ops: the operations, in order.
      inputs: numbers of the input tensors, one for each array of the call.
      outputs: numbers of the output tensors.
      structure: the outputs as they are returned, with an index of `outputs` for each.
      backend: whose rounding it mirrors: "tflite" or "onnx".
      metadata: library version and configuration.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        ops: Sequence[Op],
        inputs: Sequence[int],
        outputs: Sequence[int],
        structure: Any,
        backend: str,
        metadata: Mapping[str, Any],
    ):
        self.tensors = tuple(tensors)
        self.ops = tuple(ops)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.structure = structure
        self.backend = backend
        self.metadata = dict(metadata)
        self._run = jax.jit(self._run_stored)
        self._quantize = jax.jit(self._quantize_all)
        self._dequantize = jax.jit(self._dequantize_all)

    @property
    def params(self) -> list[dict[str, np.ndarray]]:
        """The weights: for each operation its arrays, by name."""
        return [op.arrays for op in self.ops]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and constants."""
        constants = [t.value for t in self.tensors if t.value is not None]
        return sum(op.nbytes for op in self.ops) + sum(a.nbytes for a in constants)

    # Running ---------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """Run on real values.

        Args:
          args: what the float model takes: arrays of the converted sample's shapes, with any
            batch size.
        Returns: what the float model returns.
        Raises: ValueError: an array of another shape or kind.
        """
        leaves = jax.tree.leaves(args)
        results = self._dequantize(self._codes(self._quantized(leaves)))
        raw = dict(zip(self.inputs, leaves, strict=True))
        return self._structured([raw.get(i, r) for i, r in zip(self.outputs, results, strict=True)])

    def quantize(self, *args: Any) -> Any:
        """Map inputs to their codes; what has none stays as it is. One array: itself, else a list.

        Raises: ValueError: an array of another shape or kind.
        """
        codes = self._quantized(jax.tree.leaves(args))
        return codes[0] if len(codes) == 1 else codes

    def run_codes(self, *codes: Any) -> Any:
        """Run on codes, as `quantize` returns them.

        Returns: what the float model returns, as codes (real values of what is on no grid).
        Raises: ValueError: an array of another shape or type.
        """
        return self._structured(self._codes(jax.tree.leaves(codes)))

    def dequantize(self, codes: Any) -> Any:
        """Map what `run_codes` returned to real values."""
        leaves = jax.tree.leaves(codes)
        return jax.tree.unflatten(jax.tree.structure(codes), self._dequantize(leaves))

    def _quantized(self, leaves: Sequence[Any]) -> list[jax.Array]:
        leaves = [jnp.asarray(x) for x in leaves]
        self._batch(leaves, "real values")
        for i, x in zip(self.inputs, leaves, strict=True):
            tensor = self.tensors[i]
            if tensor.grid is not None and not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{tensor.name} must be of a floating-point type, got {x.dtype}.")
        return self._quantize(leaves)

    def _codes(self, leaves: Sequence[Any]) -> list[jax.Array]:
        leaves = [jnp.asarray(x) for x in leaves]
        self._batch(leaves, "codes")
        for i, x in zip(self.inputs, leaves, strict=True):
            grid = self.tensors[i].grid
            if grid is not None and x.dtype != grid.dtype:
                raise ValueError(
                    f"{self.tensors[i].name}: codes must be of type {grid.dtype}, got {x.dtype}. "
                    "Make them with quantize(x)."
                )
        return self._run(self.params, leaves)

    def _batch(self, leaves: Sequence[Any], what: str) -> int:
        """Check shapes; return the batch size (1 where there is none)."""
        if len(leaves) != len(self.inputs):
            raise ValueError(
                f"the model takes {len(self.inputs)} arrays of {what}, got {len(leaves)}."
            )
        batch = 1
        for i, x in zip(self.inputs, leaves, strict=True):
            for want, got in zip(self.tensors[i].shape, jnp.shape(x), strict=False):
                batch = got // -want if want < 0 else batch
        for i, x in zip(self.inputs, leaves, strict=True):
            tensor = self.tensors[i]
            if jnp.shape(x) != tuple(-d * batch if d < 0 else d for d in tensor.shape):
                raise ValueError(
                    f"{tensor.name} must have shape {_shape_text(tensor.shape)}, got "
                    f"{jnp.shape(x)}."
                )
        return batch

    def _quantize_all(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        grids = [self.tensors[i].grid for i in self.inputs]
        return [x if g is None else g.quantize(x) for g, x in zip(grids, leaves, strict=True)]

    def _dequantize_all(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        tensors = [self.tensors[i] for i in self.outputs]
        return [
            x if t.grid is None else t.grid.dequantize(x).astype(t.dtype)
            for t, x in zip(tensors, leaves, strict=True)
        ]

    def _run_stored(
        self, params: Sequence[Mapping[str, jax.Array]], leaves: Sequence[jax.Array]
    ) -> list[jax.Array]:
        batch = self._batch(leaves, "codes")
        env: dict[int, jax.Array] = {}

        def put(i: int, x: Any) -> None:
            grid = self.tensors[i].grid
            env[i] = jnp.asarray(x) if grid is None else grid.stored(x)

        for i, tensor in enumerate(self.tensors):
            if tensor.value is not None:
                put(i, tensor.value)
        for i, x in zip(self.inputs, leaves, strict=True):
            put(i, x)
        for op, arrays in zip(self.ops, params, strict=True):
            self._run_op(op, arrays, env, batch)
        grids = [self.tensors[i].grid for i in self.outputs]
        values = [env[i] for i in self.outputs]
        return [x if g is None else g.codes(x) for g, x in zip(grids, values, strict=True)]

    def _run_op(
        self, op: Op, arrays: Mapping[str, jax.Array], env: dict[int, jax.Array], batch: Any
    ) -> None:
        inputs, output = [self.tensors[i] for i in op.inputs], self.tensors[op.outputs[0]]
        if op.kind in ("quantize", "float"):
            reals = [self._real(i, env) for i in op.inputs]
            if op.kind == "quantize":
                assert output.grid is not None
                env[op.outputs[0]] = output.grid.stored(output.grid.quantize(reals[0]))
            else:
                assert op.function is not None
                env.update(zip(op.outputs, op.function(reals, batch), strict=True))
            return
        context = Context(op, inputs, output, arrays, batch)
        env[op.outputs[0]] = OPERATIONS[op.kind](context, *(env[i] for i in op.inputs))

    def _real(self, i: int, env: Mapping[int, jax.Array]) -> jax.Array:
        tensor = self.tensors[i]
        if tensor.grid is None:
            return env[i]
        return tensor.grid.dequantize(tensor.grid.codes(env[i])).astype(tensor.dtype)

    def _structured(self, values: Sequence[Any]) -> Any:
        def build(template: Any) -> Any:
            if isinstance(template, dict):
                return {k: build(v) for k, v in template.items()}
            if isinstance(template, (list, tuple)):
                return type(template)(map(build, template))
            return values[template] if isinstance(template, int) else template

        return build(self.structure)

    # Showing ---------------------------------------------------------------------------------

    def __str__(self) -> str:
        table = [("operation", "where", "output", "shape", "scale", "zero", "bytes")]
        table += [self._input_row(i) for i in self.inputs]
        for op in self.ops:
            tensor = self.tensors[op.outputs[0]]
            size = op.nbytes
            kind = (
                "float (dequantized, computed, quantized again)" if op.kind == "float" else op.kind
            )
            table.append((kind, op.path, *_tensor_cells(tensor), f"{size:,}" if size else ""))
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in table
        ]
        floats = sum(op.kind == "float" for op in self.ops)
        lines.append(
            f"{len(self.ops)} operations, {floats} of them in float; {self.nbytes:,} bytes; "
            f"rounding as in {self.backend}."
        )
        return "\n".join(lines)

    def _input_row(self, i: int) -> tuple[str, ...]:
        return ("input", "", *_tensor_cells(self.tensors[i]), "")

    # Files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write the model to one file; no file appears under this name unless it is whole.

        Raises: ValueError: an operation in float that holds a loop. OSError: an unwritable path.
        """
        arrays: dict[str, np.ndarray] = {}
        ops = []
        for n, op in enumerate(self.ops):
            held = dict(op.arrays)
            if op.function is not None:
                held["function"] = np.frombuffer(self._exported(op), np.uint8)
            arrays |= {f"{n}/{name}": a for name, a in held.items()}
            fields = {"kind": op.kind, "path": op.path, "inputs": op.inputs, "outputs": op.outputs}
            ops.append(fields | {"attributes": op.attributes, "arrays": sorted(held)})
        tensors = []
        for n, t in enumerate(self.tensors):
            grid = None if t.grid is None else dataclasses.asdict(t.grid)
            fields = {"name": t.name, "shape": t.shape, "dtype": t.dtype, "grid": grid}
            tensors.append(fields | {"constant": t.value is not None})
            if t.value is not None:
                arrays[f"constant/{n}"] = t.value
        program = {
            "tensors": tensors,
            "ops": ops,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "structure": _encoded(self.structure),
            "backend": self.backend,
            "metadata": self.metadata,
        }
        body = io.BytesIO()
        arrays["program"] = np.frombuffer(json.dumps(program).encode(), np.uint8)
        np.savez(body, allow_pickle=False, **arrays)
        header = {"what": _MAGIC, "format": FORMAT, "sha256": _digest(body.getvalue())}
        with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
            archive.writestr("header.json", json.dumps(header))
            archive.writestr("model.npz", body.getvalue())

    def _exported(self, op: Op) -> bytes:
        """Serialize a float function, for any batch size."""
        assert op.function is not None
        function = op.function
        (batch,) = jax.export.symbolic_shape("batch")
        centered = op.kind == "move"
        shapes = [
            jax.ShapeDtypeStruct(
                tuple(-d * batch if d < 0 else d for d in self.tensors[i].shape),
                np.int32 if centered and self.tensors[i].grid else self.tensors[i].dtype,
            )
            for i in op.inputs
        ]
        position = next(
            (p for p, s in enumerate(shapes) if any(d < 0 for d in self._dims(op, p))), 0
        )

        def run(*values: Any) -> Any:
            dims = self._dims(op, position)
            axis = next((k for k, d in enumerate(dims) if d < 0), None)
            size = 1 if axis is None else values[position].shape[axis] // -dims[axis]
            return tuple(function(values, size))

        return bytes(jax.export.export(jax.jit(run))(*shapes).serialize())

    def _dims(self, op: Op, position: int) -> tuple[int, ...]:
        return self.tensors[op.inputs[position]].shape

    @classmethod
    def load(cls, path: str | os.PathLike) -> "IntegerModel":
        """Read a model that `save` wrote.

        Raises: FileNotFoundError: no such file. ValueError: a file that is no model, of another
          format, truncated or altered.
        """
        data = Path(path).read_bytes()
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                header = json.loads(archive.read("header.json"))
                body = archive.read("model.npz")
        except (
            *(zipfile.BadZipFile, zlib.error, KeyError, ValueError),
            *(EOFError, OSError, NotImplementedError),
        ) as error:
            raise ValueError(
                f"{path} is no integer model of simqat_jax, or damaged: {error}."
            ) from error
        if not isinstance(header, dict) or header.get("what") != _MAGIC:
            raise ValueError(f"{path} is no integer model of simqat_jax.")
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {header.get('format')}; this version of simqat_jax reads "
                f"{FORMAT}. Convert the model again."
            )
        if header.get("sha256") != _digest(body):
            raise ValueError(f"{path} is damaged: its checksum does not match.")
        with np.load(io.BytesIO(body)) as arrays:
            program = json.loads(arrays["program"].tobytes())
            tensors = [
                Tensor(
                    t["name"],
                    tuple(t["shape"]),
                    t["dtype"],
                    None if t["grid"] is None else Grid(**t["grid"]),
                    arrays[f"constant/{n}"] if t["constant"] else None,
                )
                for n, t in enumerate(program["tensors"])
            ]
            ops = []
            for n, op in enumerate(program["ops"]):
                held = {name: arrays[f"{n}/{name}"] for name in op["arrays"]}
                function = held.pop("function", None)
                ops.append(
                    Op(
                        op["kind"],
                        op["path"],
                        tuple(op["inputs"]),
                        tuple(op["outputs"]),
                        _tuples(op["attributes"]),
                        held,
                        None if function is None else _imported(function.tobytes()),
                    )
                )
        return cls(
            tensors,
            ops,
            program["inputs"],
            program["outputs"],
            _decoded(program["structure"]),
            program["backend"],
            program["metadata"],
        )


def _imported(data: bytes) -> Callable[..., Sequence[jax.Array]]:
    exported = jax.export.deserialize(bytearray(data))
    return lambda values, batch: tuple(exported.call(*values))


def _tuples(value: Any) -> Any:
    """Undo what JSON does to tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _encoded(structure: Any) -> Any:
    """Write a structure so that JSON keeps tuples apart from lists."""
    if isinstance(structure, dict):
        return {"dict": {k: _encoded(v) for k, v in structure.items()}}
    if isinstance(structure, (list, tuple)):
        return {type(structure).__name__: [_encoded(v) for v in structure]}
    return structure


def _decoded(structure: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    ((kind, value),) = structure.items()
    if kind == "dict":
        return {k: _decoded(v) for k, v in value.items()}
    return (tuple if kind == "tuple" else list)(map(_decoded, value))


def _shape_text(shape: Sequence[int]) -> str:
    dims = ["batch" if d == -1 else f"{-d}*batch" if d < 0 else str(d) for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _tensor_cells(tensor: Tensor) -> tuple[str, ...]:
    grid = tensor.grid
    if grid is None:
        return tensor.name, _shape_text(tensor.shape), tensor.dtype, ""
    return tensor.name, _shape_text(tensor.shape), f"{grid.scale:.6g}", str(grid.zero_point)
