"""ImageNet 2012 as a stream: records by tensorflow-datasets, decoded by grain's workers.

The records of a batch and their augmentation depend on seed, epoch and place alone: not on the
number of workers, and not on where a run was stopped.
"""

import dataclasses
import hashlib
import io
import itertools
import math
from collections.abc import Iterator
from typing import Any

import grain.python as grain
import numpy as np
from absl import flags
from PIL import Image

from experiments.data import augmentation
from experiments.data.batches import (
    ALL,
    Batch,
    Examples,
    MaskedBatch,
    Rows,
    Transform,
    epoch_order,
    prepared_source,
)

NUM_CLASSES = 1000
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
"""Of the training images in [0, 1], per channel."""

CROP_AREA = (0.08, 1.0)
"""Share of the image that a training crop covers, drawn uniformly."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width by height of a training crop, drawn uniformly on a logarithmic scale."""
CENTER_CROP = 224 / 256
"""Test crop by shorter side of the image it is cut from."""

Example = dict[str, np.ndarray | np.int32]
"""`image`, float32, shape (H, W, 3), and `label`."""
Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in an image, pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageNet:
    """An ImageData that decodes as it goes; its images are normalised float32.

    Attributes:
      train: training examples: `image`, the encoded bytes, and `label`.
      test: test examples.
      image_size: side of the crops, pixels.
      workers: processes that decode; 0: this one.
    """

    train: Examples
    test: Examples
    image_size: int = 224
    workers: int = 0
    name: str = "imagenet2012"
    num_classes: int = NUM_CLASSES
    transform: Transform = augmentation.identity

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """Number of test images: those of the split `validation`."""
        return len(self.test)

    def sample(self) -> np.ndarray:
        """Return a batch of one black image."""
        return np.zeros((1, self.image_size, self.image_size, 3), np.float32)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, rows: Rows = ALL
    ) -> Iterator[Batch]:
        """Yield one epoch's batches, see ImageData."""
        sampler = BatchSampler(
            order=epoch_order(self.train_size, seed, epoch),
            seed=(seed, epoch),
            batch_size=batch_size,
            rows=np.arange(batch_size)[rows],
            start=start,
            stop=self.train_size // batch_size,
            workers=self.workers,
        )
        for batch in _load(self.train, sampler, RandomResizedCrop(self.image_size)):
            yield batch["image"], batch["label"]

    def test_batches(self, batch_size: int, rows: Rows = ALL) -> Iterator[MaskedBatch]:
        """Yield every test image once, see ImageData; the last batch is filled up with others."""
        total = self.test_size
        sampler = BatchSampler(
            order=np.arange(total),
            seed=(0, 0),
            batch_size=batch_size,
            rows=np.arange(batch_size)[rows],
            start=0,
            stop=math.ceil(total / batch_size),
            workers=self.workers,
        )
        batches = _load(self.test, sampler, CenterCrop(self.image_size))
        for index, batch in enumerate(batches):
            mask = np.arange(batch_size) < total - index * batch_size
            yield batch["image"], batch["label"], mask[rows]

    def digest(self) -> str:
        """Return a hash of the sizes and of 16 records of each split: reading all takes an hour."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(str(len(split)).encode())
            for index in np.linspace(0, len(split) - 1, 16).astype(int).tolist():
                example = split[index]
                digest.update(bytes(example["image"]) + str(int(example["label"])).encode())
        return digest.hexdigest()[:16]


def load(image_size: int = 224, workers: int = 0) -> ImageNet:
    """Return the prepared ImageNet 2012; its split `validation` is the test set.

    Args:
      image_size: side of the crops, pixels.
      workers: processes that decode; 0: this one.

    Raises:
      ExperimentError: it is not prepared.
    """
    import tensorflow_datasets as tfds

    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    train, test = (
        prepared_source("imagenet2012", split, decoders=decoders)
        for split in ("train", "validation")
    )
    return ImageNet(train=train, test=test, image_size=image_size, workers=workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSampler:
    """Say which record grain reads at each index, so that batches are the same for any `workers`.

    Worker `w` of `W` reads the indices `w, w + W, ...`, forms batches of them, and the loader
    takes a batch of each worker in turn. The sampler counts back from index to batch.

    Attributes:
      order: records of the epoch.
      seed: with the place in the epoch, seed of a record's augmentation.
      batch_size: records in a batch.
      rows: of each batch, those that are read here.
      start: first batch of the epoch to yield.
      stop: batch of the epoch to end before. So that all workers have the same number, up to
        `workers - 1` more follow, which the reader leaves out.
      workers: of the loader.
    """

    order: np.ndarray
    seed: tuple[int, int]
    batch_size: int
    rows: np.ndarray
    start: int
    stop: int
    workers: int

    def __len__(self) -> int:
        workers = max(self.workers, 1)
        return math.ceil((self.stop - self.start) / workers) * workers * len(self.rows)

    def __getitem__(self, index: int) -> grain.RecordMetadata:
        if index >= len(self):
            raise IndexError(index)
        turn, worker = divmod(index, max(self.workers, 1))
        batch = turn // len(self.rows) * max(self.workers, 1) + worker
        place = (self.start + batch) * self.batch_size + int(self.rows[turn % len(self.rows)])
        return grain.RecordMetadata(
            index=index,
            record_key=int(self.order[place % len(self.order)]),
            rng=np.random.default_rng((*self.seed, place)),
        )


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain.RandomMapTransform):
    """Decode, cut a random box, resize it to a square and flip half of the images."""

    size: int

    def random_map(self, element: dict, rng: np.random.Generator) -> Any:
        """Return the normalised image and its label."""
        image = decode(element["image"])
        pixels = _resize(image, crop_box(*image.size, rng), self.size)
        return _example(pixels[:, ::-1] if rng.random() < 0.5 else pixels, element["label"])


@dataclasses.dataclass(frozen=True)
class CenterCrop(grain.MapTransform):
    """Decode and resize the central square, 224/256 of the shorter side."""

    size: int

    def map(self, element: dict) -> Any:
        """Return the normalised image and its label."""
        image = decode(element["image"])
        short = round(self.size / CENTER_CROP)
        scale = short / min(image.size)
        width, height = (max(short, round(side * scale)) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        cropped = resized.crop((left, top, left + self.size, top + self.size))
        return _example(np.asarray(cropped), element["label"])


def decode(encoded: bytes) -> Image.Image:
    """Return the image in RGB, whatever its encoding."""
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def crop_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Return a random box in an image: area CROP_AREA of it, aspect ratio CROP_RATIO.

    After ten boxes that do not fit, the central box nearest to the wanted ratios.

    Source:
      Szegedy et al., arXiv:1409.4842, section 6.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(*np.log(CROP_RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    w = min(width, round(height * CROP_RATIO[1]))
    h = min(height, round(width / CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return float(left), float(top), float(left + w), float(top + h)


def _resize(image: Image.Image, box: Box, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _example(pixels: np.ndarray, label: int) -> Example:
    """Return float32 pixels of mean 0 and variance 1, and the label, int32."""
    image = (pixels.astype(np.float32) / np.float32(255) - MEAN) / STD
    return {"image": image, "label": np.int32(label)}


def _load(
    source: Examples,
    sampler: BatchSampler,
    transform: grain.MapTransform | grain.RandomMapTransform,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the sampler's batches, decoded by its workers."""
    if sampler.start >= sampler.stop:
        return
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its defaults; this command has no absl flags.
    loader = grain.DataLoader(
        data_source=source,
        sampler=sampler,
        operations=[transform, grain.Batch(len(sampler.rows), drop_remainder=True)],
        worker_count=sampler.workers,
        worker_buffer_size=2,
        shard_options=grain.NoSharding(),
    )
    yield from itertools.islice(loader, sampler.stop - sampler.start)
