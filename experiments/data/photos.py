"""Labelled photos in a directory: what a network of ImageNet is measured on without its data set.

Files are named `NNN_name.jpg`, NNN the class among the 1,000 of ImageNet, from 000.
"""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.errors import ExperimentError

_NAME = re.compile(r"(\d{3})_.*\.jpe?g", re.IGNORECASE)
VARIABLE = "SIMQAT_PHOTOS"
"""The environment variable that names the directory."""


@dataclasses.dataclass(frozen=True)
class Photos:
    """Photos and their classes.

    Attributes:
      pixels: uint8, shape (N, size, size, 3).
      labels: int32, shape (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, count: int) -> tuple["Photos", "Photos"]:
        """Return `count` of them, evenly spread over the order of their names, and the others."""
        chosen = np.zeros(len(self), bool)
        chosen[np.arange(count) * len(self) // count] = True
        first, others = (Photos(self.pixels[m], self.labels[m]) for m in (chosen, ~chosen))
        return first, others


def load(folder: Path | None = None, size: int = 224, every: int = 1) -> Photos:
    """Return the centres of the photos in a directory, in the order of their names.

    Args:
      folder: the directory; None: the one that SIMQAT_PHOTOS names.
      size: side of the square that is cut from the centre, pixels.
      every: return each `every`-th photo.

    Raises:
      ExperimentError: there is no such directory, none is named, it holds no photos, or one that is
        no image or too small.
    """
    folder = folder or _named()
    found = [(p, m) for p in sorted(folder.glob("*")) if (m := _NAME.fullmatch(p.name))]
    if not found:
        raise ExperimentError(
            f"no photos named like 007_cock.jpg in {folder}: set {VARIABLE} to the directory that "
            "holds them."
        )
    found = found[::every]
    pixels = np.stack([_center(path, size) for path, _ in found])
    return Photos(pixels, np.array([int(match[1]) for _, match in found], np.int32))


def _named() -> Path:
    if not os.environ.get(VARIABLE):
        raise ExperimentError(
            f"{VARIABLE} is not set: it names the directory of labelled photos (NNN_name.jpg, NNN "
            "their class in ImageNet)."
        )
    return Path(os.environ[VARIABLE])


def _center(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ExperimentError(f"cannot read the photo {path}: {error}. Remove it.") from error
    height, width = pixels.shape[:2]
    if min(height, width) < size:
        raise ExperimentError(
            f"{path} has {width}x{height} pixels, less than {size}x{size}. Store its shorter side "
            "with 256 pixels, or remove it."
        )
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]
