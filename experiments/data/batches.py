"""What every data set is made of: batches, their order, and the splits that TFDS has prepared."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from experiments.errors import ExperimentError

Arrays = dict[str, np.ndarray]
"""A whole set: `train_images`, `train_labels`, `test_images` and `test_labels`."""
Batch = tuple[np.ndarray, np.ndarray]
"""Images, shape (batch, H, W, C), and labels, int32, shape (batch,)."""
MaskedBatch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Images, labels, and mask, bool, shape (batch,): False where a batch is only filled up."""
Rows = np.ndarray | slice
"""Which rows of each batch to read: indices, ascending."""
ALL = slice(None)
"""Every row."""
Transform = Callable[[jax.Array, jax.Array | None], jax.Array]
"""`(images, key)` to the model's input, inside the compiled step; key None in evaluation."""


class Examples(Protocol):
    """A split: examples by their number, each with `image` and `label`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ImageData(Protocol):
    """What training and evaluation need of a data set."""

    @property
    def name(self) -> str:
        """Name for the command line."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes: labels are 0 to num_classes - 1."""
        ...

    @property
    def train_size(self) -> int:
        """Number of training images."""
        ...

    @property
    def test_size(self) -> int:
        """Number of test images."""
        ...

    @property
    def transform(self) -> Transform:
        """Augmentation and normalisation that run inside the compiled step."""
        ...

    def sample(self) -> np.ndarray:
        """Return a batch of one image, as `train_batches` yields it."""
        ...

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, rows: Rows = ALL
    ) -> Iterator[Batch]:
        """Yield one epoch's training batches, shuffled.

        They depend on `seed` and `epoch` alone, so that a run can continue anywhere. The
        remainder, fewer than `batch_size` images, is left out; another one every epoch.

        Args:
          batch_size: images in a batch.
          seed: of the run.
          epoch: number of the epoch, from 0.
          start: number of batches to leave out at the beginning (those trained on already).
          rows: of each batch, those to read and to yield: what a process of several has.
        """
        ...

    def test_batches(self, batch_size: int, rows: Rows = ALL) -> Iterator[MaskedBatch]:
        """Yield every test image once, in order; the last batch is filled up."""
        ...

    def digest(self) -> str:
        """Return a hash that other data do not have."""
        ...


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of `size` images in an epoch, a permutation."""
    return np.random.default_rng((seed, epoch)).permutation(size)


def in_batches(function: Callable[[np.ndarray], ArrayLike], x: np.ndarray, size: int) -> np.ndarray:
    """Return `function(x)`, computed on `size` images at a time.

    Args:
      function: from images to what has as many rows.
      x: images, shape (N, ...), N at least 1.
      size: images in a batch; the last one may be smaller.

    Examples:
      >>> in_batches(lambda batch: batch.sum(axis=1), np.ones((5, 3)), size=2)
      array([3., 3., 3., 3., 3.])
    """
    return np.concatenate([np.asarray(function(x[i : i + size])) for i in range(0, len(x), size)])


def prepared_source(name: str, split: str, **options: Any) -> Examples:
    """Return a split prepared by tensorflow-datasets, as examples by their number.

    Args:
      name: of a set in tensorflow-datasets.
      split: its name there.
      options: further options of `tfds.data_source`.

    Raises:
      ExperimentError: it is not prepared; says how to prepare it.
    """
    import tensorflow_datasets as tfds

    data_dir = os.environ.get("TFDS_DATA_DIR")
    version = _VERSIONS[name]
    try:
        source = tfds.data_source(
            f"{name}:{version}", split=split, data_dir=data_dir, download=False, **options
        )
    except Exception as error:  # TFDS has no error of its own for "not prepared".
        raise ExperimentError(_how_to_prepare(name, error)) from error
    return cast(Examples, source)


def _how_to_prepare(name: str, error: Exception) -> str:
    where = os.environ.get("TFDS_DATA_DIR", "not set: ~/tensorflow_datasets is searched")
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    needs = "a network and TensorFlow"
    if name == "imagenet2012":
        needs = "the two .tar files of https://image-net.org in its --manual_dir, and TensorFlow"
    message = (
        f"data set {name!r} is not prepared in array_record format (TFDS_DATA_DIR: {where}; "
        f"TFDS says {type(error).__name__}: {reason}).\n"
        "  - If you have it: export TFDS_DATA_DIR=<directory that holds it>\n"
        f"  - To prepare it (needs {needs}, only for this step):\n"
        f"      pip install tensorflow && tfds build {name} --file_format=array_record"
    )
    if name == "mnist":
        message += "\n  - With neither: --data mnist5k, 5,000 digits that are installed already."
    return message


_VERSIONS = {"mnist": "3.0.1", "cifar10": "3.0.2", "imagenet2012": "5.*.*"}
