"""Quantize a published network without training: EfficientNet-Lite0 on labelled photos.

Ranges are those of some of the photos; weights and BatchNorm stay as they are published. Float
network, quantized evaluation, integer models and both files are compared on the other photos.

Example: SIMQAT_PHOTOS=photos python -m experiments.lite0
"""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
import tyro

import simqat_jax as sq
from experiments import comparison, pretrained, runs
from experiments.data import photos
from experiments.errors import ExperimentError, run_or_exit
from experiments.models import EfficientNetLite0

_CALIBRATION_BATCH = 32
_BATCH = 1
"""Of the comparison: JAX then compiles once for codes and for latency."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    folder: Path = Path("runs", "efficientnet_lite0")
    """Where the files go, and `lite0.json`, the table."""
    photos: Path | None = None
    """Directory of photos NNN_name.jpg, NNN their class; by default the one in SIMQAT_PHOTOS."""
    calibration: int = 96
    """How many photos ranges are taken from: evenly spread over the classes."""
    examples: int | None = None
    """How many of the others to compare on; by default all."""


def preprocess(pixels: np.ndarray) -> np.ndarray:
    """Return the network's input: bytes from about -1 to 1, as its authors trained it."""
    return (pixels.astype(np.float32) - 127) / 128


def calibrate(
    module: nn.Module, config: sq.SimQATConfig, variables: dict[str, Any], x: np.ndarray
) -> comparison.Network:
    """Return the network with ranges of the photos `x`; nothing else moves.

    Args:
      module: the float network.
      config: how it is quantized.
      variables: of the float network.
      x: preprocessed photos, shape (N, 224, 224, 3).
    """
    qmodel = sq.SimQAT(config).apply(module)
    batches = [x[i : i + _CALIBRATION_BATCH] for i in range(0, len(x), _CALIBRATION_BATCH)]
    quantized = sq.calibrate(qmodel, variables, batches, train=False)
    return comparison.Network(module=module, config=config, variables=quantized)


def quantize(
    module: nn.Module, variables: dict[str, Any], arguments: Arguments
) -> list[comparison.Row]:
    """Calibrate, write the files and `lite0.json`, and compare.

    Args:
      module: the float network.
      variables: its variables.
      arguments: of the command.

    Raises:
      ExperimentError: photos are missing, none are left to compare on, or the files cannot be
        written.
    """
    found = photos.load(arguments.photos)
    if not 0 < arguments.calibration < len(found) or arguments.examples == 0:
        raise ExperimentError(
            f"--calibration {arguments.calibration} and --examples {arguments.examples} of "
            f"{len(found)} photos: some are needed for ranges, and others to compare on. Give a "
            f"--calibration of 1 to {len(found) - 1}, and no --examples 0."
        )
    chosen, others = found.split(arguments.calibration)
    network = calibrate(module, sq.SimQATConfig(), variables, preprocess(chosen.pixels))
    pixels, labels = others.pixels[: arguments.examples], others.labels[: arguments.examples]
    images = comparison.Labelled(x=preprocess(pixels), labels=labels, batch=_BATCH)
    folder = arguments.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = comparison.compare(network, images, folder)
        report = [dataclasses.asdict(row) for row in rows]
        content = {"calibration": len(chosen), "images": len(labels), "rows": report}
        runs.write_json(folder / "lite0.json", content)
    except OSError as error:
        raise ExperimentError(
            f"cannot write {folder}: {error.strerror or error}. Make room, or choose another "
            "--folder."
        ) from error
    return rows


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.lite0", description=__doc__)
    rows = quantize(EfficientNetLite0(), pretrained.efficientnet_lite0(), arguments)
    comparison.show(rows, f"EfficientNet-Lite0, calibrated: {arguments.folder}")
    if any(row.differing for row in rows):
        raise ExperimentError("some codes differ: see the table.")


if __name__ == "__main__":
    run_or_exit(main)
