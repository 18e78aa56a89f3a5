"""MLPerf Tiny's networks, quantized after training, beside the int8 files that are published.

Both int8 files are of the same float network, and run in LiteRT on one thread. Ours has ranges of
some inputs, or also roundings and biases (`--recipe`); no training, no labels.

- resnet8: CIFAR-10; ranges of training images, compared on test images.
- mobilenetv1: photos (SIMQAT_PHOTOS), the central 224x224 at 96x96; ranges of some of them.
- ds_cnn, autoencoder: without data. Inputs are drawn with seeds 0 and 1: normal, mean 0, standard
  deviation a fifteenth of the range that the published file takes, clipped to it. Its ranges are
  those of sounds, ours those of such inputs.

Example:
  MLPERF_TINY=mlperf_tiny python -m experiments.benchmarks.peers.tiny --network resnet8
"""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments import mlperf_tiny
from experiments.benchmarks.timing import Figure, timed
from experiments.data import Dataset, in_batches, load, photos
from experiments.errors import ExperimentError, run_or_exit
from experiments.mlperf_tiny import NETWORKS, Published
from experiments.tflite_archive import LiteRTFile

_BATCH = 50
"""Of inputs that run at a time."""
_CALLS = 5
"""In one timing."""
Recipe = Literal["ranges", "fast", "accurate"]
"""Of `sq.post_training_quantize`; `ranges`: `sq.calibrate` alone."""
Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of a network, float32: those that ranges are taken from, and others to compare on."""

    calibration: np.ndarray
    test: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How our file is made.

    Attributes:
      recipe: ranges alone, or one of the recipes of `post_training_quantize`.
      config: what each layer gets.
    """

    recipe: Recipe
    config: sq.SimQATConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run a network; None: not measured.

    Attributes:
      what: it is.
      agreement: share of inputs whose class is that of the float network.
      sqnr_db: power of the float network's outputs, in front of a softmax, by that of the
        differences from them.
      differing: output codes that are not those of quantized evaluation.
      bytes: of the file.
      microseconds: for one input, median.
      ratio: processor time to the published int8 file's, round by round.
    """

    what: str
    agreement: float | None
    sqnr_db: float
    differing: int | None = None
    bytes: int | None = None
    microseconds: float | None = None
    ratio: Figure | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    network: Literal["resnet8", "mobilenetv1", "ds_cnn", "autoencoder"]
    folder: Path | None = None
    """Directory of the published files; by default the one in MLPERF_TINY."""
    calibration: int | None = None
    """How many inputs ranges are taken from; by default 512, of photos 100."""
    examples: int | None = None
    """How many to compare on; by default all, of drawn ones 2,000."""
    recipe: Recipe = "accurate"
    """How our file is made: its ranges alone, or one of the recipes of `post_training_quantize`."""
    per_tensor: bool = False
    """One range for all of a kernel in our file, which drops the scales of the channels."""
    rounds: int = 100
    """Interleaved timings of each file."""


def inputs_of(arguments: Arguments, int8: LiteRTFile) -> Inputs:
    """Return the inputs of a network; the first ones, in the order of their set.

    Raises:
      ExperimentError: their data set is not there, or none are left for one of both.
    """
    count = arguments.calibration
    if 0 in (count, arguments.examples):
        raise ExperimentError("--calibration and --examples must be 1 or more, got 0.")
    if arguments.network == "resnet8":
        data = cast(Dataset, load("cifar10"))
        found = Inputs(data.train_images[: count or 512], data.test_images)
    elif arguments.network == "mobilenetv1":
        chosen, others = photos.load().split(count or 100)
        found = Inputs(*(_small(p.pixels) / np.float32(255) for p in (chosen, others)))
    else:
        lowest, highest = int8.input_range
        shape = NETWORKS[arguments.network].shape
        drawn = [
            np.random.default_rng(seed).normal(0, (highest - lowest) / 15, (number, *shape))
            for seed, number in ((0, count or 512), (1, arguments.examples or 2000))
        ]
        found = Inputs(*(np.clip(x, lowest, highest) for x in drawn))
    test = found.test[: arguments.examples]
    if not len(test):
        raise ExperimentError(f"--calibration {count} leaves none to compare on: give less.")
    return Inputs(found.calibration.astype(np.float32), test.astype(np.float32))


def compare(
    network: Published, folder: Path, inputs: Inputs, place: Path, way: Way, rounds: int
) -> list[Row]:
    """Quantize a network, write it, and compare it and the published files with float.

    Args:
      network: which.
      folder: of the published files.
      inputs: for ranges, and to compare on.
      place: where the files of this library go.
      way: how they are made.
      rounds: interleaved timings of each file.

    Raises:
      ExperimentError: a package is missing, or a file is not what it should be.
    """
    variables = network.variables(folder)
    want = _outputs(network.model, variables, inputs.test)

    def row(what: str, found: np.ndarray, reference: np.ndarray = want, **more: Any) -> Row:
        same = float((found.argmax(axis=-1) == reference.argmax(axis=-1)).mean())
        agreement = same if network.classifies else None
        return Row(what=what, agreement=agreement, sqnr_db=_sqnr_db(reference, found), **more)

    ours, differing, found = _ours(network.model, variables, inputs, place, way)
    real = LiteRTFile(folder / network.real, softmax=False)
    of_real = _outputs(network.model, network.real_variables(folder), inputs.test)
    theirs = LiteRTFile(folder / network.int8, softmax=False)
    files = {"real": real, "theirs": theirs, "ours": ours}
    one = {name: file.encoded(inputs.test[:1]) for name, file in files.items()}
    calls = {name: functools.partial(file.invoke, one[name]) for name, file in files.items()}
    times = timed(calls, rounds, _CALLS)

    def taken(name: str) -> dict[str, Any]:
        ratio = times[name].processor_ratio(times["theirs"])
        return {"microseconds": 1e6 * times[name].median, "ratio": ratio}

    return [
        row(
            "published float file, of its own weights",
            real.run(inputs.test),
            of_real,
            bytes=real.bytes,
            **taken("real"),
        ),
        row(
            "published int8 file",
            theirs.run(inputs.test),
            bytes=theirs.bytes,
            **taken("theirs"),
        ),
        row(
            "int8 file of this library",
            found,
            bytes=ours.bytes,
            **taken("ours"),
            differing=differing,
        ),
    ]


def _ours(
    model: nn.Module, variables: Variables, inputs: Inputs, place: Path, way: Way
) -> tuple[LiteRTFile, int, np.ndarray]:
    """Return the int8 file, how many of its codes differ from evaluation, and its outputs."""
    x = inputs.calibration
    batches = [x[start : start + _BATCH] for start in range(0, len(x), _BATCH)]
    if way.recipe == "ranges":
        qmodel = sq.SimQAT(way.config).apply(model)
        quantized = sq.calibrate(qmodel, variables, batches, train=False)
    else:
        qmodel, quantized = sq.post_training_quantize(
            model, variables, batches, config=way.config, recipe=way.recipe, train=False
        )
    integer = sq.convert(qmodel, quantized, inputs.test[:1], train=False)
    path = place / "int8.tflite"
    sq.export_tflite(integer, path, integer_io=True)
    file = LiteRTFile(path)
    found = file.run(inputs.test)
    evaluated = _outputs(qmodel, quantized, inputs.test)
    return file, int((found != evaluated).sum()), found


def _outputs(model: nn.Module, variables: Variables, x: np.ndarray) -> np.ndarray:
    run = jax.jit(functools.partial(model.apply, train=False))
    return in_batches(lambda batch: cast(jax.Array, run(variables, batch)), x, _BATCH)


def _small(pixels: np.ndarray) -> np.ndarray:
    """Return photos at 96x96, uint8."""
    size, how = (96, 96), Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(p).resize(size, how)) for p in pixels])


def _sqnr_db(floats: np.ndarray, found: np.ndarray) -> float:
    signal, noise = (np.square(a, dtype=np.float64).sum() for a in (floats, found - floats))
    return float(10 * np.log10(signal / noise))


def show(rows: list[Row], title: str) -> None:
    """Print the table of a comparison."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("as float", "SQNR, dB", "codes that differ", "kB", "µs", "processor / int8"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.what,
            "" if row.agreement is None else f"{row.agreement:.2%}",
            f"{row.sqnr_db:.2f}",
            "" if row.differing is None else f"{row.differing:,}",
            "" if row.bytes is None else f"{row.bytes / 1000:,.1f}",
            "" if row.microseconds is None else f"{row.microseconds:,.1f}",
            "" if row.ratio is None else _spread(row.ratio),
        )
    Console().print(table)


def _spread(figure: Figure) -> str:
    return f"{figure.median:.2f} ({figure.low:.2f} to {figure.high:.2f})"


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, description=__doc__)
    folder = mlperf_tiny.directory(arguments.folder)
    network = NETWORKS[arguments.network]
    inputs = inputs_of(arguments, LiteRTFile(folder / network.int8))
    weight = sq.QuantSpec.weight(per_channel=not arguments.per_tensor)
    way = Way(recipe=arguments.recipe, config=sq.SimQATConfig(weight=weight))
    with tempfile.TemporaryDirectory() as place:
        rows = compare(network, folder, inputs, Path(place), way, arguments.rounds)
    counts = f"{len(inputs.calibration):,} calibrate, {len(inputs.test):,} compared"
    show(rows, f"{arguments.network}: {counts}, one thread, jax {jax.__version__}")
    if any(row.differing for row in rows):
        raise ExperimentError("some codes differ: see the table.")


if __name__ == "__main__":
    run_or_exit(main)
