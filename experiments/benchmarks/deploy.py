"""Size, latency and codes of int8 files against float files in the same runtimes.

Ratios are of processor time, round by round: what counts where others use the machine. p50 and p99
are on the clock. Of several threads, a runtime's waiting for work counts as processor time too.

Example:
  python -m experiments.benchmarks.deploy --model lenet5
  python -m experiments.benchmarks.deploy --model resnet50 --threads 1 --rounds 9
  make peers; python -m experiments.benchmarks.deploy --model vit_s --peers .venv-peers/bin/python
"""

import dataclasses
import functools
import importlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import serialization
from jax.typing import ArrayLike

import simqat_jax as sq
from experiments.benchmarks import float_files
from experiments.benchmarks.memory import taken
from experiments.benchmarks.records import HISTORY, Row, report
from experiments.benchmarks.timing import Figure, latencies
from experiments.benchmarks.workloads import WORKLOADS, Workload
from experiments.data import in_batches
from simqat_jax.numerics.rounding import Backend

Run = Callable[[np.ndarray], np.ndarray]
"""Runs a file on a batch of images."""
_BACKENDS: tuple[Backend, ...] = ("tflite", "onnx")

_BATCH = 8
"""Images in a batch where codes are compared."""


def _images(key: jax.Array, count: int, image: tuple[int, int, int]) -> jax.Array:
    """Return random images with some structure: noise at a quarter of the resolution."""
    height, width, channels = image
    coarse = jax.random.normal(key, (count, height // 4, width // 4, channels))
    return jax.image.resize(coarse, (count, *image), "linear")


def trained(workload: Workload, backend: Backend) -> tuple[sq.QuantizedModule, Any, jax.Array]:
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


def _openvino(path: Path, threads: int) -> Run:
    openvino = importlib.import_module("openvino")  # Of no extra: used where it is installed.
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda x: model([x])[0]


def _in_own_runtime(path: Path, threads: int) -> Run:
    file = sq.open_file(path, threads=threads, isolated=False)
    return lambda x: file.run([x])[0]


def _written_by_peers(python: Path, name: str, variables: Any, folder: Path) -> None:
    """Have the converters of another environment write the float network's files."""
    values = folder / "variables.msgpack"
    values.write_bytes(serialization.to_bytes(variables))
    command = [python, "-m", "experiments.benchmarks.peers.float_files", name, values, folder]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a network for one runtime, and what they should compute.

    Attributes:
      int8: of this library.
      real: of the float network.
      images: some, (N, H, W, C).
      codes: what evaluation makes of them, real units.
      note: what making the int8 file took.
    """

    int8: Path
    real: Path
    images: np.ndarray
    codes: np.ndarray
    note: str

    def differing(self, run: Callable[[np.ndarray], ArrayLike]) -> int:
        """Return how many codes differ from evaluation."""
        return int((in_batches(run, self.images, _BATCH) != self.codes).sum())


def _written(
    model: str, backend: Backend, folder: Path, count: int, peers: Path | None
) -> tuple[Files, int]:
    """Write both files; return them, and how many codes of the integer model differ."""
    workload = WORKLOADS[model]
    qmodel, variables, images = trained(workload, backend)
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    convert = functools.partial(sq.convert, qmodel, variables, images[:1], train=False)
    converted = taken(convert)
    suffix, export, write_float = {
        "onnx": ("onnx", sq.export_onnx, float_files.write_onnx),
        "tflite": ("tflite", sq.export_tflite, float_files.write_tflite),
    }[backend]
    int8, real = folder / f"int8.{suffix}", folder / f"float.{suffix}"
    exported = taken(lambda: export(converted.result, int8))
    if peers is None:
        write_float(converted.result, real)
    elif not real.exists():
        _written_by_peers(peers, model, floats, folder)
    _check_float(_in_own_runtime(real, 1), workload, floats, np.asarray(images[:1]))
    evaluate = jax.jit(functools.partial(qmodel.apply, train=False))
    some = np.asarray(images[:count])
    codes = in_batches(functools.partial(evaluate, variables), some, _BATCH)
    note = f"{suffix}: convert {converted.processor:.1f} s, export {exported.processor:.1f} s"
    files = Files(int8, real, some, codes, f"{note} of the processor")
    return files, files.differing(converted.result)


def _rows(files: Files, model: str, threads: int, rounds: int) -> list[Row]:
    """Return the table's rows for the runtimes that open the files, on some threads."""
    openers: dict[str, Callable[[Path, int], Run]]
    openers = {sq.open_file(files.int8, threads=1, isolated=False).name: _in_own_runtime}
    if files.int8.suffix == ".onnx" and importlib.util.find_spec("openvino"):
        openers[f"OpenVINO {metadata.version('openvino')}"] = _openvino
    rows, workload = [], WORKLOADS[model]
    for runtime, opened in openers.items():
        paths = {"float": files.real, "int8": files.int8}
        runs = {name: opened(path, threads) for name, path in paths.items()}
        differing = files.differing(runs["int8"])
        for batch, calls in zip(workload.batches, workload.calls, strict=True):
            x = np.tile(files.images, (-(-batch // len(files.images)), 1, 1, 1))[:batch]
            found = latencies({n: functools.partial(r, x) for n, r in runs.items()}, rounds, calls)
            for name, latency in found.items():
                of_float = latency.rounds.processor_ratio(found["float"].rounds)
                figures = {
                    "p50, µs": Figure.exactly(1e6 * latency.quantile(0.5)),
                    "p99, µs": Figure.exactly(1e6 * latency.quantile(0.99)),
                    "processor, µs": Figure.of(latency.rounds.processor).times(1e6),
                    "processor / float": of_float,
                    "kB": Figure.exactly(paths[name].stat().st_size / 1000),
                }
                if name == "int8":
                    figures[f"differing of {files.codes.size:,}"] = Figure.exactly(differing)
                case = {"file": name, "runtime": runtime, "batch": str(batch)}
                case |= {"model": model, "threads": str(threads)}
                rows.append(Row(case=case, figures=figures))
    return rows


def _check_float(run: Run, workload: Workload, floats: Any, x: np.ndarray) -> None:
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
    threads: tuple[int, ...] = (1, 2),
    rounds: int = 40,
    images: int = 64,
    folder: Path | None = None,
    peers: Path | None = None,
    history: Path | None = HISTORY,
) -> None:
    """Print size, latency, ratio to float, and codes that differ from evaluation.

    Args:
      model: lenet5, resnet20, resnet50 (224x224) or vit_s (224x224, with `peers` alone).
      threads: that runtimes get, one table for each.
      rounds: interleaved turns of each file.
      images: how many images codes are compared on, up to 64.
      folder: where to leave the files, empty; by default nowhere.
      peers: Python of `make peers`, whose converters write the float files; by default this package
        does, which knows LeNet-5 and ResNets.
      history: JSON lines to add to; "None": nowhere.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        made = [_written(model, backend, place, images, peers) for backend in _BACKENDS]
        rows = [row for count in threads for f, _ in made for row in _rows(f, model, count, rounds)]
    title = f"{model}, jax {jax.__version__}; random weights"
    report("deploy", title, rows, history)
    for files, differing in made:
        of = f"{differing:,} of {files.codes.size:,} codes"
        print(f"{files.note}; of the integer model {of} differ")


if __name__ == "__main__":
    tyro.cli(main)
