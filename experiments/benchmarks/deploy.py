"""Size, latency and codes of int8 files against float files in the same runtimes.

Example:
  python -m experiments.benchmarks.deploy --model lenet5
  python -m experiments.benchmarks.deploy --model resnet50
  make peers; python -m experiments.benchmarks.deploy --model vit_s --peers .venv-peers/bin/python
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import tyro
from flax import serialization
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.benchmarks import float_files
from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.workloads import WORKLOADS, Workload
from experiments.data import in_batches

T = TypeVar("T")

_BATCH = 8
"""Images in a batch where codes are compared."""


def _images(key: jax.Array, count: int, image: tuple[int, int, int]) -> jax.Array:
    """Return random images with some structure: noise at a quarter of the resolution."""
    height, width, channels = image
    coarse = jax.random.normal(key, (count, height // 4, width // 4, channels))
    return jax.image.resize(coarse, (count, *image), "linear")


def trained(
    workload: Workload, backend: Literal["tflite", "onnx"]
) -> tuple[sq.QuantizedModule, Any, jax.Array]:
    """Return a quantized model, random variables with ranges of some steps, and 64 images."""
    qmodel = sq.SimQAT(sq.SimQATConfig(backend=backend)).apply(workload.model())
    images = _images(jax.random.key(0), 64, workload.image)
    variables = jax.jit(qmodel.init)(jax.random.key(1), images[:2])
    # As after training: no scale of a BatchNorm, which may start at zero, is a special value.
    keys = iter(jax.random.split(jax.random.key(2), 1000))
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            jax.random.uniform(next(keys), p.shape, minval=0.5, maxval=1.5)
            if path[-1].key == "scale"
            else p
        ),
        variables["params"],
    )
    variables = {**variables, "params": params}
    collections = [name for name in variables if name != "params"]
    step = jax.jit(
        lambda variables, x: qmodel.apply(variables, x, train=True, mutable=collections)[1]
    )
    for start in range(0, 64, 8):
        variables = {**variables, **step(variables, images[start : start + 8])}
    return qmodel, jax.block_until_ready(variables), images


def _peak(function: Callable[[], T]) -> tuple[T, float, int | None]:
    """Return a call's result, its seconds and the bytes by which memory grew (Linux: else None)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    if reset.exists():
        reset.write_text("5")  # the peak is counted from here
    before = kilobytes("VmRSS") if reset.exists() else 0
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    return result, seconds, 1024 * (kilobytes("VmHWM") - before) if reset.exists() else None


def _openvino(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    openvino = importlib.import_module("openvino")  # Of no extra: used where it is installed.
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: model([x])[0]


def _written_by_peers(python: Path, name: str, variables: Any, folder: Path) -> None:
    """Have the converters of another environment write the float network's files."""
    values = folder / "variables.msgpack"
    values.write_bytes(serialization.to_bytes(variables))
    command = [python, "-m", "experiments.benchmarks.peers.float_files", name, values, folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def _rows(
    model: str,
    backend: Literal["tflite", "onnx"],
    folder: Path,
    rounds: int,
    count: int,
    peers: Path | None,
) -> tuple[list[list[str]], str]:
    """Return the table's rows for one runtime, and what writing its file took."""
    workload = WORKLOADS[model]
    qmodel, variables, images = trained(workload, backend)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    float_bytes = sum(a.nbytes for a in jax.tree.leaves(floats))
    sample = images[:1]
    convert = functools.partial(sq.convert, qmodel, variables, sample, train=False)
    integer, convert_seconds, convert_peak = _peak(convert)
    suffix, export, write_float = {
        "onnx": ("onnx", sq.export_onnx, float_files.write_onnx),
        "tflite": ("tflite", sq.export_tflite, float_files.write_tflite),
    }[backend]
    int8, real = folder / f"int8.{suffix}", folder / f"float.{suffix}"
    _, seconds, peak = _peak(lambda: export(integer, int8))
    if peers is None:
        write_float(integer, real)
    elif not real.exists():
        _written_by_peers(peers, model, floats, folder)

    images = np.asarray(images[:count])
    evaluate = jax.jit(functools.partial(qmodel.apply, train=False))
    want = in_batches(functools.partial(evaluate, variables), images, _BATCH)

    def differing(function: Callable[[np.ndarray], ArrayLike]) -> str:
        return f"{int((in_batches(function, images, _BATCH) != want).sum()):,} of {want.size:,}"

    def runner(path: Path) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
        file = sq.open_file(path, threads=1, isolated=False)
        return file.name, lambda x: file.run([x])[0]

    runtime, run_int8 = runner(int8)
    _check_float(runner(real)[1], workload, floats, images[:1])
    ways = {"float": (real, runner(real)[1]), "int8": (int8, run_int8)}
    if backend == "onnx" and importlib.util.find_spec("openvino"):
        ways |= {
            "float, OpenVINO": (real, _openvino(real)),
            "int8, OpenVINO": (int8, _openvino(int8)),
        }
    rows = []
    for batch, calls in zip(workload.batches, workload.calls, strict=True):
        x = np.tile(images, (-(-batch // len(images)), 1, 1, 1))[:batch]
        functions = {name: functools.partial(run, x) for name, (_, run) in ways.items()}
        times = interleaved(functions, rounds, calls)
        for name, (path, run) in ways.items():
            first = "float" if "OpenVINO" not in name else "float, OpenVINO"
            int8_row = name.startswith("int8")
            rows.append(
                [
                    name if "OpenVINO" in name else f"{name}, {runtime}",
                    str(batch),
                    f"{1e6 * times[name]:,.0f}",
                    f"{times[name] / times[first]:.2f}",
                    f"{path.stat().st_size / 1000:,.1f}",
                    differing(run) if int8_row and batch == workload.batches[0] else "",
                ]
            )
    rows[1][5] += f"; JAX {differing(integer)}"
    note = f"{suffix}: convert {convert_seconds:.1f} s, export {seconds:.1f} s"
    if peak is not None and convert_peak is not None:
        grown = (f"{number / 1e6:.0f} MB" for number in (convert_peak, peak))
        note += "; memory + {} and + {}".format(*grown)
        note += f" (float parameters: {float_bytes / 1e6:.1f} MB)"
    return rows, note


def _check_float(
    run: Callable[[np.ndarray], np.ndarray], workload: Workload, floats: Any, x: np.ndarray
) -> None:
    """Check that the float file is the float network, up to the rounding of its weights.

    Raises:
      AssertionError: it is another.
    """
    want = np.asarray(jax.jit(functools.partial(workload.model().apply, train=False))(floats, x))
    error = np.linalg.norm(run(x) - want) / np.linalg.norm(want)
    if error > 0.2:
        raise AssertionError(f"the float file is another network: {error:.0%} off.")


def main(
    model: str = "lenet5",
    rounds: int = 40,
    images: int = 64,
    folder: Path | None = None,
    peers: Path | None = None,
) -> None:
    """Print size, latency of one thread, ratio to float, and codes that differ from evaluation.

    Args:
      model: lenet5, resnet20, resnet50 (224x224) or vit_s (224x224, with `peers` alone).
      rounds: interleaved timings of each file.
      images: how many images codes are compared on, up to 64.
      folder: where to leave the files, empty; by default nowhere.
      peers: Python of `make peers`, whose converters write the float files; by default this package
        does, which knows LeNet-5 and ResNets.
    """
    title = f"{model}, one thread, jax {jax.__version__}; random weights"
    table = Table("", "batch", "µs", "ratio", "kB", "codes that differ", title=title)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        notes = []
        for backend in ("tflite", "onnx"):
            rows, note = _rows(model, backend, place, rounds, images, peers)
            notes.append(note)
            for row in rows:
                table.add_row(*row)
    table.caption = "\n".join(notes)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
