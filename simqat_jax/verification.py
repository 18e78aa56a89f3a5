"""Count the codes of an exported file that are not those of its integer model."""

import argparse
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.export.onnx import export_onnx
from simqat_jax.export.tflite import export_tflite
from simqat_jax.files import import_extra
from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; print it.

    Attributes:
      path: the file.
      runtime: what ran it, with its version.
      examples: how many examples it ran.
      codes: how many output codes were compared.
      differing: how many of them are not the model's.
      first_layer: path of the first operation whose codes differ, None where none does.
    """

    path: str
    runtime: str
    examples: int
    codes: int
    differing: int
    first_layer: str | None

    def __str__(self) -> str:
        where = f"; the first in {self.first_layer}" if self.first_layer else ""
        return (
            f"{self.path} in {self.runtime}: {self.differing:,} of {self.codes:,} codes differ "
            f"({self.examples:,} examples){where}."
        )


def verify(
    model: IntegerModel, path: str | os.PathLike, *data: Any, batch_size: int = 64
) -> Verification:
    """Run an exported file and count the output codes that are not the integer model's.

    Args:
      model: what the file was written from.
      path: a file of `export_onnx` (*.onnx) or `export_tflite` (*.tflite).
      data: arrays in real units, one for each input of the model, as many examples as wanted.
      batch_size: examples a call; the model's own where that is fixed.
    Returns: a Verification.
    Raises: FileNotFoundError: no such file. ValueError: a file of another kind, a model with
      outputs that are no codes, no examples. ImportError: the extra `export` is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    floats = [model.tensors[i].name for i in model.outputs if model.tensors[i].grid is None]
    if floats:
        raise ValueError(f"{', '.join(floats)}: an output that is no code cannot be counted.")
    runtime = open_file(path)
    if len(runtime.float_inputs) != len(model.inputs):
        raise ValueError(
            f"the file takes {len(runtime.float_inputs)} inputs and the model {len(model.inputs)}: "
            "it was written from another model."
        )
    arrays = [np.asarray(a) for a in data]
    codes = differing = 0
    first = None
    for batch in _batches(model, arrays, batch_size):
        wrong = _differences(model, runtime, batch)
        codes, differing = codes + sum(w.size for w in wrong), differing + sum(map(np.sum, wrong))
        if differing and first is None:
            first = _first_layer(model, path, batch)
    return Verification(str(path), runtime.name, len(arrays[0]), codes, int(differing), first)


def _batches(
    model: IntegerModel, arrays: Sequence[np.ndarray], size: int
) -> list[list[np.ndarray]]:
    if len(arrays) != len(model.inputs):
        raise ValueError(f"the model takes {len(model.inputs)} arrays, got {len(arrays)}.")
    if any(not a.shape or not len(a) for a in arrays):
        raise ValueError("the data hold no examples.")
    if all(d >= 0 for i in model.inputs for d in model.tensors[i].shape):
        return [list(arrays)]
    starts = range(0, len(arrays[0]), size)
    return [[a[start : start + size] for a in arrays] for start in starts]


# Runtimes ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """An exported file, open in its runtime.

    Attributes:
      name: the runtime with its version.
      run: from input arrays to output arrays.
      float_inputs: whether each input takes real values; otherwise codes.
      offset: what codes of a grid have added in the file.
    """

    name: str
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    float_inputs: list[bool]
    offset: Callable[[Grid], int]


def open_file(path: str | os.PathLike, threads: int | None = None) -> OpenFile:
    """Open an exported file in its runtime, on the CPU.

    Args:
      path: *.onnx or *.tflite.
      threads: how many threads to run on; None: as many as the runtime takes by itself.
    Raises: ValueError: neither *.onnx nor *.tflite. ImportError: the extra `export` is missing.
    """
    path = Path(path)
    opened = {".onnx": _open_onnx, ".tflite": _open_tflite}.get(path.suffix)
    if opened is None:
        raise ValueError(f"{path} is neither *.onnx nor *.tflite.")
    return opened(path, threads)


def _open_onnx(path: Path, threads: int | None) -> OpenFile:
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if onnxruntime_saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return session.run(None, {i.name: a for i, a in zip(inputs, arrays, strict=True)})

    floats = [i.type == "tensor(float)" for i in inputs]
    name = f"ONNX Runtime {runtime.__version__}"
    return OpenFile(name, run, floats, lambda grid: 128 if grid.qmin < 0 else 0)


@functools.cache
def onnxruntime_saturates() -> bool:
    """Tell whether ONNX Runtime's sums of uint8 * int8 saturate on this processor.

    On x86 without VNNI instructions it adds pairs of products in 16 bits. The session option
    `session.x64quantprecision` makes it exact there; with VNNI it would be less than half as fast.

    Raises: ImportError: the extra `export` is missing.
    """
    onnx, runtime = import_extra("onnx"), import_extra("onnxruntime")
    make, kinds, length = onnx.helper, onnx.TensorProto, 64
    weights = onnx.numpy_helper.from_array(np.full((length, length), 127, np.int8), "w")
    ends = [
        make.make_tensor_value_info(name, kind, [1, length])
        for name, kind in (("x", kinds.UINT8), ("y", kinds.INT32))
    ]
    node = make.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = make.make_graph([node], "sums", ends[:1], ends[1:], [weights])
    opsets = [make.make_opsetid("", 19)]
    file = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((1, length), 255, np.uint8)})
    return bool(np.any(sums != length * 255 * 127))


def _open_tflite(path: Path, threads: int | None) -> OpenFile:
    package = import_extra("ai_edge_litert")
    make = import_extra("ai_edge_litert.interpreter").Interpreter
    interpreter = make(str(path), num_threads=threads)
    # Numbered as the model's are: the interpreter's own order is that of the file.
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    allocated: list[tuple[int, ...]] = []

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        shapes = [a.shape for a in arrays]
        if shapes != allocated:
            for detail, shape in zip(inputs, shapes, strict=True):
                interpreter.resize_tensor_input(detail["index"], shape)
            interpreter.allocate_tensors()
            allocated[:] = shapes
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    floats = [detail["dtype"] == np.float32 for detail in inputs]
    name = f"LiteRT {getattr(package, '__version__', '')}".rstrip()
    return OpenFile(name, run, floats, lambda grid: 0 if grid.qmin < 0 else -128)


def _grid(model: IntegerModel, i: int) -> Grid:
    grid = model.tensors[i].grid
    assert grid is not None
    return grid


def _differences(
    model: IntegerModel, runtime: OpenFile, batch: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return for each output which of its codes differ."""
    codes = jax.tree.leaves(model.quantize(*batch))
    arrays = []
    for i, x, code, real in zip(model.inputs, batch, codes, runtime.float_inputs, strict=True):
        kind = np.int8 if runtime.offset(Grid(1.0, 0, 0, 255)) else np.uint8
        shifted = np.asarray(code, np.int32) + runtime.offset(_grid(model, i))
        arrays.append(np.asarray(x, np.float32) if real else shifted.astype(kind))
    wrong = []
    want = jax.tree.leaves(model.run_codes(*codes))
    for i, a, b in zip(model.outputs, want, runtime.run(arrays), strict=True):
        grid = _grid(model, i)
        if np.issubdtype(b.dtype, np.floating):
            got = np.asarray(grid.quantize(jnp.asarray(b)), np.int32)  # exact: on the grid
        else:
            got = b.astype(np.int32) - runtime.offset(grid)
        wrong.append(np.asarray(a, np.int32) != got)
    return wrong


def _first_layer(model: IntegerModel, path: Path, batch: Sequence[np.ndarray]) -> str:
    """Write the model again with every tensor an output, and return where codes first differ."""
    ops = [op for op in model.ops if model.tensors[op.outputs[0]].grid is not None]
    outputs = [op.outputs[0] for op in ops]
    opened = IntegerModel(
        model.tensors,
        model.ops,
        model.inputs,
        outputs,
        list(range(len(outputs))),
        model.backend,
        model.metadata,
    )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"whole{path.suffix}"
        export = export_onnx if path.suffix == ".onnx" else export_tflite
        export(opened, whole, integer_io=True)
        wrong = _differences(opened, open_file(whole), batch)
    for op, differ in zip(ops, wrong, strict=True):
        if differ.any():
            return op.path
    return "none of the model's own: the file is not written from this model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `simqat-verify MODEL FILE DATA`; return 1 where codes differ."""
    parser = argparse.ArgumentParser(prog="simqat-verify", description=__doc__)
    parser.add_argument("model", help="an integer model, as IntegerModel.save wrote it")
    parser.add_argument("file", nargs="+", help="*.onnx or *.tflite files written from it")
    parser.add_argument("--data", required=True, help="*.npy with inputs in real units")
    options = parser.parse_args(arguments)
    model, data = IntegerModel.load(options.model), np.load(options.data)
    found = [verify(model, file, data) for file in options.file]
    print(*found, sep="\n")
    return int(any(v.differing for v in found))


if __name__ == "__main__":
    raise SystemExit(main())
