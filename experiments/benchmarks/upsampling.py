"""Latency of int8 files of single layers that upsample, and codes that differ.

Example:
  python -m experiments.benchmarks.upsampling
"""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import tyro
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.benchmarks.timing import interleaved


class _Resize(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        return jax.image.resize(x, (n, 2 * height, 2 * width, channels), "bilinear")


def _layers(channels: int) -> dict[str, nn.Module]:
    return {
        "transposed convolution, 2 x 2": nn.ConvTranspose(channels, (2, 2), (2, 2)),
        "transposed convolution, 4 x 4": nn.ConvTranspose(channels, (4, 4), (2, 2)),
        "bilinear resize": _Resize(),
    }


def _written(layer: nn.Module, x: jax.Array, path: Path) -> tuple[Callable[[], object], int]:
    """Write the int8 file of a layer; return what runs it once, and how many codes differ."""
    onnx = path.suffix == ".onnx"
    export = sq.export_onnx if onnx else sq.export_tflite
    qmodel = sq.SimQAT(sq.SimQATConfig(backend="onnx" if onnx else "tflite")).apply(layer)
    variables = qmodel.init(jax.random.key(0), x)
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    model = sq.convert(qmodel, {**variables, **updates}, x)
    export(model, path, integer_io=True)
    file = sq.open_file(path, threads=1, isolated=False)
    grid = model.tensors[model.inputs[0]].grid
    assert grid is not None
    codes = grid.in_file(model.quantize(x), file.input_types[0])
    return functools.partial(file.run, [codes]), sq.verify(model, path, x).differing


def main(channels: int = 64, size: int = 32, rounds: int = 40, calls: int = 5) -> None:
    """Print microseconds of one thread, and codes that are not the integer model's.

    Args:
      channels: of input and output.
      size: rows and columns of the input.
      rounds: interleaved timings of each file.
      calls: calls in one timing.
    """
    title = f"{channels} channels, {size} x {size} to {2 * size} x {2 * size}, one thread"
    table = Table("", "ONNX Runtime, µs", "LiteRT, µs", "codes that differ", title=title)
    x = jax.random.normal(jax.random.key(1), (1, size, size, channels))
    with tempfile.TemporaryDirectory() as folder:
        for name, layer in _layers(channels).items():
            files = {s: _written(layer, x, Path(folder) / f"m{s}") for s in (".onnx", ".tflite")}
            times = interleaved({s: run for s, (run, _) in files.items()}, rounds, calls)
            differ = sum(count for _, count in files.values())
            table.add_row(name, *(f"{1e6 * t:,.0f}" for t in times.values()), str(differ))
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
