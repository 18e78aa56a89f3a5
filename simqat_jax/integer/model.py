"""An integer-only model: a program on codes, as one jitted function."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.integer import arguments, file
from simqat_jax.integer.table import Shown
from simqat_jax.ir.program import (
    Op,
    Program,
    PyTree,
    Structure,
    Tensor,
    equal,
    grid_of,
    repeated,
)
from simqat_jax.numerics.arguments import check_kind

KEYWORDS = "keywords"
"""In metadata: the keyword arguments that hold arrays, and how many each of them holds."""


class IntegerModel(Shown):
    """A model on integer codes: int8 kernels, int32 biases, fixed scales.

    Made by `convert` or `IntegerModel.load`. `print` shows a line for each operation, `details()`
    all of it. Two are equal that hold the same operations on the same numbers.

    Attributes:
      program: what it computes, as data.

    Raises:
      TypeError: `program` is no Program.
    """

    def __init__(self, program: Program):
        check_kind("program", program, Program, "convert and IntegerModel.load return models.")
        self.program = program
        self._run = jax.jit(self._run_stored)
        self._quantize = jax.jit(self._quantize_all)
        self._dequantize = jax.jit(self._dequantize_all)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor, by number."""
        return self.program.tensors

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations, in order."""
        return self.program.ops

    @property
    def inputs(self) -> tuple[int, ...]:
        """Numbers of the input tensors, one for each array of the call."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[int, ...]:
        """Numbers of the output tensors."""
        return self.program.outputs

    @property
    def structure(self) -> Structure:
        """The outputs as they are returned, with an index of `outputs` for each."""
        return self.program.structure

    @property
    def backend(self) -> str:
        """Whose rounding it mirrors: "tflite" or "onnx"."""
        return self.program.backend

    @property
    def metadata(self) -> Mapping[str, object]:
        """Library version and configuration."""
        return self.program.metadata

    @property
    def params(self) -> list[Mapping[str, np.ndarray]]:
        """The weights: for each operation its arrays, by name."""
        return [op.arrays for op in self.ops]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and constants as they are saved: of equal ones once."""
        return self.program.nbytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntegerModel) and equal(self.program, other.program)

    def __hash__(self) -> int:
        return hash((self.backend, tuple((op.path, op.kind) for op in self.ops)))

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntegerModel":
        return IntegerModel(copy.deepcopy(self.program, memo))

    def __reduce__(self) -> tuple[Callable[[bytes], "IntegerModel"], tuple[bytes]]:
        return _unpickled, (file.to_bytes(self.program),)

    # Running ---------------------------------------------------------------------------------

    def __call__(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Run on real values.

        Args:
          args: what the float model takes: arrays of the converted sample's shapes, with any
            batch size.
          kwargs: those that the sample had by keyword.

        Returns:
          What the float model returns.

        Raises:
          TypeError: what is no array.
          ValueError: an array of another shape or kind; other keywords than the sample's.
        """
        leaves = _leaves(self.metadata, args, kwargs)
        results = self._dequantize(self._codes(self._quantized(leaves)))
        raw = dict(zip(self.inputs, leaves, strict=True))
        values = [raw.get(i, r) for i, r in zip(self.outputs, results, strict=True)]
        return _structured(self.structure, values)

    def quantize(self, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """Map inputs to their codes; what has none stays as it is. One array: itself, else a list.

        Takes and raises what a call does; codes by keyword are the last, sorted.
        """
        codes = self._quantized(_leaves(self.metadata, args, kwargs))
        return codes[0] if len(codes) == 1 else codes

    def run_codes(self, *codes: PyTree) -> PyTree:
        """Run on codes, as `quantize` returns them.

        Returns:
          What the float model returns, as codes (real values of what is on no grid).

        Raises:
          TypeError: what is no array.
          ValueError: an array of another shape or type.
        """
        return _structured(self.structure, self._codes(jax.tree.leaves(codes)))

    def dequantize(self, codes: PyTree) -> PyTree:
        """Map what `run_codes` returned to real values.

        Raises:
          TypeError: what is no array.
          ValueError: an array of another shape or type.
        """
        leaves, tree = jax.tree.flatten(codes)
        checked = arguments.codes(self._results, leaves, "Pass what run_codes returned.")
        return jax.tree.unflatten(tree, self._dequantize(checked))

    def _quantized(self, leaves: Sequence[ArrayLike]) -> list[jax.Array]:
        return self._quantize(arguments.real_values(self._arguments, leaves))

    def _codes(self, leaves: Sequence[ArrayLike]) -> list[jax.Array]:
        checked = arguments.codes(self._arguments, leaves, "Make them with quantize(x).")
        return self._run(self.program.prepared, checked)

    @property
    def _arguments(self) -> list[Tensor]:
        return [self.tensors[i] for i in self.inputs]

    @property
    def _results(self) -> list[Tensor]:
        return [self.tensors[i] for i in self.outputs]

    def _quantize_all(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        pairs = zip(self._arguments, leaves, strict=True)
        return [x if t.grid is None else t.grid.quantize(x) for t, x in pairs]

    def _dequantize_all(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        return [
            x if t.grid is None else t.grid.dequantize(x).astype(t.dtype)
            for t, x in zip(self._results, leaves, strict=True)
        ]

    def _run_stored(
        self, params: Sequence[Mapping[str, jax.Array]], leaves: Sequence[jax.Array]
    ) -> list[jax.Array]:
        batch = arguments.batch_size(self._arguments, leaves)
        env: dict[int, jax.Array] = {}

        constants = ((i, t.value) for i, t in enumerate(self.tensors) if t.value is not None)
        for i, x in (*constants, *zip(self.inputs, leaves, strict=True)):
            grid = self.tensors[i].grid
            stored = jnp.asarray(x) if grid is None else grid.stored(x)
            env[i] = jnp.asarray(repeated(stored, self.tensors[i].shape, batch))
        for op, arrays in zip(self.ops, params, strict=True):
            context = self.program.context(op, arrays, batch)
            results = op.run(context, *(env[i] for i in op.inputs))
            env.update(zip(op.outputs, results, strict=True))
        ends = [(self.tensors[i], env[i]) for i in self.outputs]
        return [x if t.grid is None else grid_of(t).codes(x) for t, x in ends]

    # Files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to one file; no file appears under this name unless it is whole.

        Raises:
          TypeError: `path` is none.
          ValueError: an operation in float that holds a loop.
          OSError: an unwritable path.
        """
        file.save(self.program, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "IntegerModel":
        """Read a model that `save` wrote.

        The file may hold code, which computes float operations that are no primitives: load files
        from those whom you trust.

        Raises:
          TypeError: `path` is none.
          FileNotFoundError: no such file.
          ValueError: a file that cannot be read, is no model, of another format, truncated or
            altered; arrays or operations that do not fit their tensors.
        """
        return cls(file.load(path))


def _unpickled(body: bytes) -> IntegerModel:
    return IntegerModel(file.of_bytes(body))


def _leaves(metadata: Mapping[str, object], args: tuple, kwargs: Mapping[str, PyTree]) -> list[Any]:
    """Return the arrays of a call in the order of the inputs: keywords last, sorted."""
    known = metadata.get(KEYWORDS, {})
    assert isinstance(known, Mapping)
    given = {k: len(jax.tree.leaves(v)) for k, v in kwargs.items() if v is not None}
    if given != dict(known):
        takes = f"arrays by keyword for {', '.join(known)}" if known else "no keyword arguments"
        raise ValueError(
            f"the model was converted from a call with {takes}, got {sorted(kwargs)}. Pass the "
            "arrays as in that call, and nothing else."
        )
    return jax.tree.leaves((args, dict(kwargs)))


def _structured(structure: Structure, values: Sequence[ArrayLike]) -> PyTree:
    """Put outputs into the structure that the float model returns them in."""
    if isinstance(structure, dict):
        return {k: _structured(v, values) for k, v in structure.items()}
    if isinstance(structure, (list, tuple)):
        return type(structure)(_structured(v, values) for v in structure)
    return values[structure] if isinstance(structure, int) else structure
