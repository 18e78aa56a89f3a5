"""Data sets, their cache and their batches."""

import dataclasses
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import data
from experiments.errors import ExperimentError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIMQAT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _tiny(train: int = 10, test: int = 5) -> data.Dataset:
    """Image number i holds i everywhere and has label i."""

    def images(count: int) -> np.ndarray:
        return np.arange(count, dtype=np.float32).reshape(-1, 1, 1, 1) * np.ones((1, 2, 2, 1), "f")

    return data.Dataset(
        name="tiny",
        train_images=images(train),
        train_labels=np.arange(train, dtype=np.int32),
        test_images=images(test),
        test_labels=np.arange(test, dtype=np.int32),
        num_classes=train,
    )


def _check_digits(dataset: data.Dataset, train: int, test: int) -> None:
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, train),
        (dataset.test_images, dataset.test_labels, test),
    ):
        assert images.shape == (count, 32, 32, 1)
        assert images.dtype == np.float32
        assert labels.shape == (count,)
        assert labels.dtype == np.int32
        assert images.min() == 0.0
        assert images.max() == 1.0
        assert set(np.unique(labels)) == set(range(10))
        border = np.ones((32, 32), bool)
        border[2:-2, 2:-2] = False
        assert not images[:, border].any()
        assert images[:, 2:-2, 2:-2].any(axis=(1, 2, 3)).all()


def _loaded(name: str) -> data.Dataset:
    dataset = data.load(name)
    assert isinstance(dataset, data.Dataset)
    return dataset


def test_mnist5k_is_stratified_disjoint_and_padded(cache: Path) -> None:
    dataset = _loaded("mnist5k")
    _check_digits(dataset, 4000, 1000)
    assert (np.bincount(dataset.train_labels) == 400).all()
    assert (np.bincount(dataset.test_labels) == 100).all()
    train = {image.tobytes() for image in dataset.train_images}
    assert not any(image.tobytes() in train for image in dataset.test_images)
    assert [p.name for p in cache.iterdir()] == ["mnist5k-v1.npz"]


def test_mnist_has_its_70000_digits() -> None:
    cached = data.cache_dir() / "mnist-3.0.1.npz"
    if "TFDS_DATA_DIR" not in os.environ and not cached.exists():
        pytest.skip("TFDS_DATA_DIR is not set: no prepared mnist")
    dataset = _loaded("mnist")
    _check_digits(dataset, 60000, 10000)
    # Digits of each class in the original files.
    train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(dataset.train_labels).tolist() == train
    assert np.bincount(dataset.test_labels).tolist() == test


def test_cifar10_has_its_60000_images() -> None:
    cached = data.cache_dir() / "cifar10-3.0.2.npz"
    if "TFDS_DATA_DIR" not in os.environ and not cached.exists():
        pytest.skip("TFDS_DATA_DIR is not set: no prepared cifar10")
    dataset = data.load("cifar10")
    assert isinstance(dataset, data.Dataset)
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, 50000),
        (dataset.test_images, dataset.test_labels, 10000),
    ):
        assert (images.shape, images.dtype) == ((count, 32, 32, 3), np.uint8)
        assert labels.dtype == np.int32
        assert (np.bincount(labels) == count // 10).all()
    # Mean and deviation that the compiled step takes away; a copy as JPEG has a smaller deviation.
    normal = np.asarray(dataset.transform(jnp.asarray(dataset.train_images[:20000]), None))
    np.testing.assert_allclose(normal.mean((0, 1, 2)), 0, atol=0.02)
    np.testing.assert_allclose(normal.std((0, 1, 2)), 1, atol=0.05)


def test_split_stratified_is_a_partition_fixed_by_its_seed() -> None:
    labels = np.repeat(np.arange(3), 20)
    train, test = data.split_stratified(labels, test_per_class=5, seed=1)
    assert sorted([*train, *test]) == list(range(60))
    assert np.bincount(labels[test]).tolist() == [5, 5, 5]
    again = data.split_stratified(labels, test_per_class=5, seed=1)
    np.testing.assert_array_equal(test, again[1])
    assert not np.array_equal(test, data.split_stratified(labels, test_per_class=5, seed=2)[1])


def test_train_batches_shuffle_by_seed_and_epoch_and_drop_the_remainder() -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
        batches = list(_tiny().train_batches(3, seed, epoch, start))
        for images, labels in batches:
            np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
        return [labels.tolist() for _, labels in batches]

    first = order(0, 0)
    assert [len(batch) for batch in first] == [3, 3, 3]
    assert len({label for batch in first for label in batch}) == 9
    assert first == order(0, 0)
    assert first != order(0, 1)
    assert first != order(1, 0)
    assert order(0, 0, start=2) == first[2:]


def test_test_batches_cover_every_image_once() -> None:
    batches = list(_tiny(test=5).test_batches(3))
    assert [images.shape for images, _, _ in batches] == [(3, 2, 2, 1)] * 2
    seen = np.concatenate([labels[mask] for _, labels, mask in batches])
    np.testing.assert_array_equal(seen, np.arange(5))


def test_processes_read_parts_of_the_same_batches() -> None:
    tiny, rows = _tiny(test=5), np.array([0, 2])
    for whole, parts in (
        (tiny.train_batches(3, 0, 0, 1), tiny.train_batches(3, 0, 0, 1, rows)),
        (tiny.test_batches(3), tiny.test_batches(3, rows)),
    ):
        for batch, part in zip(whole, parts, strict=True):
            for array, read in zip(batch, part, strict=True):
                np.testing.assert_array_equal(array[rows], read)


def test_other_data_have_another_digest() -> None:
    assert _tiny().digest() == _tiny().digest()
    changed = dataclasses.replace(_tiny(), test_labels=_tiny().test_labels + 1)
    assert changed.digest() != _tiny().digest()


def test_damaged_cache_is_rebuilt(cache: Path, capsys: pytest.CaptureFixture) -> None:
    before = _loaded("mnist5k")
    path = cache / "mnist5k-v1.npz"
    intact = path.read_bytes()
    middle = len(intact) // 2
    flipped = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
    for damage in (b"", intact[:1000], flipped):
        path.write_bytes(damage)
        after = _loaded("mnist5k")
        assert "is damaged" in capsys.readouterr().out
        np.testing.assert_array_equal(after.train_images, before.train_images)
        assert path.read_bytes() == intact


def test_data_set_that_is_not_prepared_says_what_to_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    with pytest.raises(ExperimentError) as error:
        data.load("mnist")
    for part in ("tfds build mnist", "TFDS_DATA_DIR", str(tmp_path / "nothing"), "--data mnist5k"):
        assert part in str(error.value)
    assert not cache.exists()


def test_unknown_data_set(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"unknown data set 'mnits'; known: mnist, mnist5k"):
        data.load("mnits")


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "cache" / "mnist5k-v1.npz").mkdir(parents=True)
    for cache, reason in ((tmp_path / "file" / "cache", ""), (tmp_path / "cache", "is a dir")):
        monkeypatch.setenv("SIMQAT_CACHE_DIR", str(cache))
        assert data.load("mnist5k").train_size == 4000
        printed = capsys.readouterr().out
        assert f"cannot write the cache file {cache}" in printed and reason in printed
        assert "SIMQAT_CACHE_DIR" in printed
    assert [p.name for p in cache.iterdir()] == ["mnist5k-v1.npz"]
