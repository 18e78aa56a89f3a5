"""An integer-only model: tensors on fixed grids, operations on their codes, one jitted function."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax import integer_arithmetic as integer
from simqat_jax.numerics import QuantParams, along_channel, rounded_product, true_divide

FORMAT = 1
_MAGIC = "simqat_jax integer model"


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where the codes of a tensor lie: `real = (code - zero_point) * scale`.

    Attributes:
      scale: real units per code, exactly a float32.
      zero_point: the code of real zero.
      qmin: lowest code.
      qmax: highest code.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type that holds every code: uint8 for 8 asymmetric bits."""
        sign = "i" if self.qmin < 0 else "u"
        return np.dtype(f"{sign}{1 if self.qmax < 256 and self.qmin >= -128 else 2}")

    @property
    def params(self) -> QuantParams:
        return QuantParams(jnp.float32(self.scale), jnp.int32(self.zero_point))

    # Inside the model codes are int8 (uint8 less 128), or int32 where they are wider.

    @property
    def offset(self) -> int:
        return 128 if self.dtype == np.uint8 else 0

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype(np.int8 if self.dtype.itemsize == 1 else np.int32)

    @property
    def stored_zero(self) -> int:
        return self.zero_point - self.offset

    def stored(self, codes: Any) -> jax.Array:
        return (jnp.asarray(codes).astype(jnp.int32) - self.offset).astype(self.stored_dtype)

    def codes(self, stored: jax.Array) -> jax.Array:
        return (stored.astype(jnp.int32) + self.offset).astype(self.dtype)

    def centered(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.int32) - self.stored_zero

    def from_float(self, centered: jax.Array, bounds: Sequence[int] | None = None) -> jax.Array:
        """Clip whole float32 numbers, `code - zero_point`, and store them."""
        lo, hi = (self.qmin, self.qmax) if bounds is None else bounds
        clipped = jnp.clip(centered + np.float32(self.zero_point), lo, hi)
        return (clipped - np.float32(self.offset)).astype(self.stored_dtype)

    def quantize(self, x: jax.Array) -> jax.Array:
        """Map real values to codes."""
        rounded = jnp.round(true_divide(x.astype(jnp.float32), np.float32(self.scale)))
        rounded = jnp.where(jnp.isnan(rounded), 0.0, rounded)
        return self.codes(self.from_float(rounded))

    def dequantize(self, codes: jax.Array) -> jax.Array:
        """Map codes to real values, float32."""
        centered = (codes.astype(jnp.int32) - self.zero_point).astype(jnp.float32)
        return rounded_product(centered, np.float32(self.scale))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an integer model.

    Attributes:
      name: its quantizer's name where it is the first on a grid: "Conv_0/output".
      shape: its lengths; -k stands for k times the batch size.
      dtype: the float type of its real values (of another tensor: its type).
      grid: where its codes lie; None: it is no tensor on a grid.
      value: codes or values of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    grid: Grid | None
    value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of an integer model.

    Attributes:
      kind: what it computes, a key of `OPERATIONS`.
      path: where it stands in the Flax model: "Block_0/Conv_1".
      inputs: numbers of the tensors that it reads.
      outputs: numbers of the tensors that it makes.
      attributes: what it needs to know: strides, axes, clamp codes.
      arrays: its weights: int8, int32 and multipliers in float32.
      function: of kind "float" and "move": what computes it, on values and the batch size.
    """

    kind: str
    path: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    function: Callable[..., Sequence[jax.Array]] | None = None


# Operations --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Context:
    """What an operation sees: its tensors' grids, its arrays as traced, the batch size."""

    op: Op
    inputs: Sequence[Tensor]
    output: Tensor
    arrays: Mapping[str, jax.Array]
    batch: Any

    @property
    def grid(self) -> Grid:
        assert self.output.grid is not None
        return self.output.grid

    def in_grid(self, position: int = 0) -> Grid:
        grid = self.inputs[position].grid
        assert grid is not None
        return grid

    def shape(self, dims: Sequence[int]) -> tuple[int, ...]:
        return tuple(-d * self.batch if d < 0 else d for d in dims)

    def __getitem__(self, name: str) -> Any:
        return self.op.attributes[name]


def _requantize(c: Context, acc: jax.Array) -> jax.Array:
    scaled = jnp.round(acc.astype(jnp.float32) * _last(c.arrays["multiplier"], acc))
    return c.grid.from_float(scaled, c["clamp"])


def _last(v: jax.Array, x: jax.Array) -> jax.Array:
    return along_channel(v, x.ndim, -1)


def _padded(c: Context, x: jax.Array) -> jax.Array:
    zero = np.asarray(c.in_grid().stored_zero, x.dtype)
    if c["pad_mode"] != "constant":
        pads = [(0, 0), *map(tuple, c["padding"]), (0, 0)]
        return jnp.pad(x, pads, mode=c["pad_mode"])
    steps = [d - 1 for d in c["input_dilation"]]
    inner = [(lo, hi, s) for (lo, hi), s in zip(c["padding"], steps, strict=True)]
    return lax.pad(x, zero, [(0, 0, 0), *inner, (0, 0, 0)])


def _conv(c: Context, x: jax.Array) -> jax.Array:
    spatial = "DHW"[-len(c["strides"]) :]
    kernel = c.arrays["kernel"]
    acc = lax.conv_general_dilated(
        _padded(c, x),
        kernel.astype(x.dtype),
        c["strides"],
        "VALID",
        rhs_dilation=c["kernel_dilation"],
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=c["groups"],
        preferred_element_type=jnp.int32,
    )
    axes = tuple(range(kernel.ndim - 1))
    return _requantize(c, acc + _last(_offset_bias(c, axes), acc))


def _offset_bias(c: Context, axes: tuple[int, ...]) -> jax.Array:
    """The bias for codes as they are stored: less zero point times the kernel's sums."""
    sums = jnp.sum(c.arrays["kernel"].astype(jnp.int32), axis=axes)
    return c.arrays["bias"] - c.in_grid().stored_zero * sums


def _dense(c: Context, x: jax.Array) -> jax.Array:
    kernel = c.arrays["kernel"].astype(x.dtype)
    dims = (((x.ndim - 1,), (0,)), ((), ()))
    acc = lax.dot_general(x, kernel, dims, preferred_element_type=jnp.int32)
    return _requantize(c, acc + _last(_offset_bias(c, (0,)), acc))


def _affine(c: Context, x: jax.Array) -> jax.Array:
    kernel, bias = (_last(c.arrays[name].astype(jnp.int32), x) for name in ("kernel", "bias"))
    return _requantize(c, c.in_grid().centered(x) * kernel + bias)


def _add(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    ma, mb, shift = c["multipliers"]
    total = c.in_grid(0).centered(a) * ma + c.in_grid(1).centered(b) * mb + (1 << (shift - 1))
    return c.grid.from_float((total >> shift).astype(jnp.float32), c["clamp"])


def _add_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    codes = integer.add_onnxruntime(
        *(grid.centered(v) + grid.zero_point for grid, v in ((c.in_grid(0), a), (c.in_grid(1), b))),
        *(np.float32(v) for v in c["multipliers"]),
    )
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _sub_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    x, y = c.in_grid(0), c.in_grid(1)
    codes = integer.subtract_onnxruntime(
        x.centered(a), y.centered(b), x.params, y.params, c.grid.params
    )
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _mul(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    return _requantize(c, c.in_grid(0).centered(a) * c.in_grid(1).centered(b))


def _mul_onnx(c: Context, a: jax.Array, b: jax.Array) -> jax.Array:
    product = c.in_grid(0).centered(a) * c.in_grid(1).centered(b)
    codes = integer.multiply_onnxruntime(product, c.arrays["multiplier"], c.grid.zero_point)
    return c.grid.from_float(codes - np.float32(c.grid.zero_point), c["clamp"])


def _sum(c: Context, x: jax.Array) -> jax.Array:
    return _requantize(c, jnp.sum(c.in_grid().centered(x), axis=tuple(c["axes"])))


def _sum_pool(c: Context, x: jax.Array) -> jax.Array:
    return _requantize(c, _windows(c, c.in_grid().centered(x), 0, lax.add))


def _windows(c: Context, x: jax.Array, start: int, combine: Any) -> jax.Array:
    pads = [tuple(p) for p in c["padding"]]
    first = np.asarray(start, x.dtype)
    return lax.reduce_window(x, first, combine, c["window"], c["strides"], pads)


def _max_pool(c: Context, x: jax.Array) -> jax.Array:
    return _windows(c, x, jnp.iinfo(x.dtype).min, lax.max)


def _table(c: Context, x: jax.Array) -> jax.Array:
    index = c.in_grid().codes(x).astype(jnp.int32) - c.in_grid().qmin
    return c.grid.stored(jnp.take(c.arrays["table"], index))


def _clip(c: Context, x: jax.Array) -> jax.Array:
    lo, hi = (v - c.grid.offset for v in c["clamp"])
    return jnp.clip(x, np.asarray(lo, x.dtype), np.asarray(hi, x.dtype))


def _concat(c: Context, *xs: jax.Array) -> jax.Array:
    return lax.concatenate(xs, c["axis"])


def _slice(c: Context, x: jax.Array) -> jax.Array:
    return lax.slice(x, c["start"], c.shape(c["limit"]), c["strides"])


def _pad(c: Context, x: jax.Array) -> jax.Array:
    zero = np.asarray(c.in_grid().stored_zero, x.dtype)
    return lax.pad(x, zero, [tuple(p) for p in c["padding"]])


def _move(c: Context, *xs: jax.Array) -> jax.Array:
    assert c.op.function is not None
    first = c.in_grid().centered(xs[0])
    (moved,) = c.op.function((first, *xs[1:]), c.batch)
    return (moved + c.grid.stored_zero).astype(c.grid.stored_dtype)


OPERATIONS: dict[str, Callable[..., jax.Array]] = {
    "conv": _conv,
    "dense": _dense,
    "affine": _affine,  # a BatchNorm of its own: one weight for each channel
    "add": _add,
    "add_onnx": _add_onnx,
    "sub_onnx": _sub_onnx,
    "mul": _mul,
    "mul_onnx": _mul_onnx,
    "sum": _sum,  # a mean, once its multiplier divides
    "sum_pool": _sum_pool,  # an average pooling
    "max_pool": _max_pool,
    "max": lambda c, x: jnp.max(x, axis=tuple(c["axes"])),
    "min": lambda c, x: jnp.min(x, axis=tuple(c["axes"])),
    "table": _table,
    "clip": _clip,
    "concat": _concat,
    "reshape": lambda c, x: jnp.reshape(x, c.shape(c.output.shape)),
    "transpose": lambda c, x: jnp.transpose(x, c["permutation"]),
    "broadcast": lambda c, x: lax.broadcast_in_dim(x, c.shape(c.output.shape), c["dimensions"]),
    "slice": _slice,
    "reverse": lambda c, x: lax.rev(x, c["axes"]),
    "pad": _pad,
    "move": _move,
    # "quantize" and "float" read real values and are run by the model itself.
}


# The model ---------------------------------------------------------------------------------------


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
        arrays = [a for op in self.ops for a in op.arrays.values()]
        arrays += [t.value for t in self.tensors if t.value is not None]
        return sum(a.nbytes for a in arrays)

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
        batch = self._batch(leaves, "codes")
        for i, x in zip(self.inputs, leaves, strict=True):
            grid = self.tensors[i].grid
            if grid is not None and x.dtype != grid.dtype:
                raise ValueError(
                    f"{self.tensors[i].name}: codes must be of type {grid.dtype}, got {x.dtype}. "
                    "Make them with quantize(x)."
                )
        del batch
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
            size = sum(a.nbytes for a in op.arrays.values())
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
        try:
            with zipfile.ZipFile(path) as archive:
                header = json.loads(archive.read("header.json"))
                body = archive.read("model.npz")
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
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


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only once it is whole."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _shape_text(shape: Sequence[int]) -> str:
    dims = ["batch" if d == -1 else f"{-d}*batch" if d < 0 else str(d) for d in shape]
    return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


def _tensor_cells(tensor: Tensor) -> tuple[str, ...]:
    grid = tensor.grid
    if grid is None:
        return tensor.name, _shape_text(tensor.shape), tensor.dtype, ""
    return tensor.name, _shape_text(tensor.shape), f"{grid.scale:.6g}", str(grid.zero_point)
