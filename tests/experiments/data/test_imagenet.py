"""The ImageNet stream on a few images of the same schema, written here."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import tiny_imagenet
from PIL import Image

from experiments import data
from experiments.data import imagenet
from experiments.errors import ExperimentError

TRAIN, TEST, SIZE = 21, 7, 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS data directory."""
    path = tmp_path_factory.mktemp("tfds")
    tiny_imagenet.write(path, TRAIN, TEST)
    return path


@pytest.fixture
def dataset(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> data.ImageData:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    return data.load("imagenet2012", SIZE)


def _assert_same(one: list[tuple], other: list[tuple]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def test_training_batches(dataset: data.ImageData) -> None:
    assert (dataset.train_size, dataset.test_size, dataset.num_classes) == (TRAIN, TEST, 1000)
    assert dataset.sample().shape == (1, SIZE, SIZE, 3)
    batches = list(dataset.train_batches(4, seed=0, epoch=0))
    assert len(batches) == 5
    for images, labels in batches:
        assert images.shape == (4, SIZE, SIZE, 3)
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)
        lowest, highest = -imagenet.MEAN / imagenet.STD, (1 - imagenet.MEAN) / imagenet.STD
        assert (images >= lowest.reshape(1, 1, 1, 3) - 1e-6).all()
        assert (images <= highest.reshape(1, 1, 1, 3) + 1e-6).all()
        # Each image is with its own label: brightness 40 + 20 * (i % 8), label 37 * i % 1000.
        brightness = (images * imagenet.STD.reshape(1, 1, 1, 3)).mean((1, 2, 3))
        brightness = 255 * (brightness + imagenet.MEAN.mean())
        index = np.array([next(i for i in range(TRAIN) if 37 * i % 1000 == x) for x in labels])
        np.testing.assert_allclose(brightness, 40 + 20 * (index % 8), atol=10)
    seen = np.concatenate([labels for _, labels in batches])
    assert len(set(seen.tolist())) == 20


def test_order_and_augmentation_follow_seed_epoch_and_place(dataset: data.ImageData) -> None:
    first = list(dataset.train_batches(4, seed=0, epoch=0))
    _assert_same(first, list(dataset.train_batches(4, seed=0, epoch=0)))
    for start in (3, 5):
        _assert_same(first[start:], list(dataset.train_batches(4, 0, 0, start=start)))
    labels = [labels.tolist() for _, labels in first]
    for seed, epoch in ((0, 1), (1, 0)):
        assert labels != [y.tolist() for _, y in dataset.train_batches(4, seed, epoch)]


def test_worker_processes_yield_the_same(dataset: data.ImageData) -> None:
    parallel = data.load("imagenet2012", SIZE, workers=2)
    _assert_same(list(dataset.train_batches(4, 0, 0, 2)), list(parallel.train_batches(4, 0, 0, 2)))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_processes_read_parts_of_the_same_batches(dataset: data.ImageData, workers: int) -> None:
    """Each example once in an epoch, augmented the same, for any number of processes."""
    part = data.load("imagenet2012", SIZE, workers)
    for read, whole in (
        (lambda rows: part.train_batches(4, 0, 0, 1, rows), dataset.train_batches(4, 0, 0, 1)),
        (lambda rows: part.test_batches(4, rows), dataset.test_batches(4)),
    ):
        batches = list(whole)
        for rows in (np.array([0, 1]), np.array([1, 3])):
            expected = [tuple(array[rows] for array in batch) for batch in batches]
            _assert_same(expected, list(read(rows)))


def test_other_data_have_another_digest(dataset: data.ImageData) -> None:
    assert isinstance(dataset, imagenet.ImageNet)
    assert dataset.digest() == dataclasses.replace(dataset).digest()
    assert dataset.digest() != dataclasses.replace(dataset, train=dataset.test).digest()


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_sampler_gives_each_worker_whole_batches(workers: int) -> None:
    """A model of grain's reading: worker w reads every W-th index and batches what it reads."""
    order = np.random.default_rng(0).permutation(53)
    sampler = imagenet.BatchSampler(
        order=order,
        seed=(0, 0),
        batch_size=5,
        rows=np.arange(5),
        start=3,
        stop=10,
        workers=workers,
    )
    count = max(workers, 1)
    read = [
        [sampler[i].record_key for i in range(worker, len(sampler), count)]
        for worker in range(count)
    ]
    batches = []
    for batch in range(len(sampler) // 5):
        turn, worker = divmod(batch, count)
        batches.append(read[worker][5 * turn : 5 * turn + 5])
    assert batches[:7] == [order[5 * i : 5 * i + 5].tolist() for i in range(3, 10)]
    with pytest.raises(IndexError):
        sampler[len(sampler)]


def test_test_batches_are_centre_crops_of_every_image_once(dataset: data.ImageData) -> None:
    batches = list(dataset.test_batches(4))
    assert [mask.tolist() for _, _, mask in batches] == [[True] * 4, [True] * 3 + [False]]
    labels = np.concatenate([labels[mask] for _, labels, mask in batches])
    assert labels.tolist() == [37 * i % 1000 for i in range(TEST)]
    images = np.concatenate([images[mask] for images, _, mask in batches])
    assert isinstance(dataset, imagenet.ImageNet)
    source = dataset.test
    for index in range(TEST):
        image = Image.open(io.BytesIO(source[index]["image"])).convert("RGB")
        scale = round(SIZE * 256 / 224) / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
        top, left = (height - SIZE) // 2, (width - SIZE) // 2
        expected = pixels[top : top + SIZE, left : left + SIZE] / 255
        expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(images[index], expected, atol=1e-5)


def test_crop_boxes_have_the_wanted_area_and_ratio() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([imagenet.crop_box(300, 200, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all() and (top >= 0).all()
    assert (right <= 300).all() and (bottom <= 200).all()
    area = (right - left) * (bottom - top) / 60000
    ratio = (right - left) / (bottom - top)
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert area.max() > 0.8
    assert ratio.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.02)
    # Nothing of the wanted shape fits a thin image: the central part of it.
    assert imagenet.crop_box(1000, 10, rng) == (493.0, 0.0, 506.0, 10.0)
    assert imagenet.crop_box(10, 1000, rng) == (0.0, 493.0, 10.0, 506.0)


def test_half_of_the_crops_are_flipped() -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    encoded = io.BytesIO()
    Image.fromarray(ramp).save(encoded, "PNG")
    crop = imagenet.RandomResizedCrop(16)
    rng = np.random.default_rng(0)
    example = {"image": encoded.getvalue(), "label": 1}
    images = [crop.random_map(example, rng)["image"] for _ in range(200)]
    flipped = [image[:, 0].mean() > image[:, -1].mean() for image in images]
    assert 70 < sum(flipped) < 130


def test_not_prepared_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(ExperimentError) as error:
        data.load("imagenet2012")
    for part in ("tfds build imagenet2012", "https://image-net.org", str(tmp_path)):
        assert part in str(error.value)
