"""Augmentation against a loop over every shift, and normalisation against NumPy."""

import jax
import numpy as np
import pytest

from experiments.data import augmentation

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 8, 6, 3), np.uint8)


def _shifts(image: np.ndarray, padding: int) -> dict[tuple, bytes]:
    """Every image that a crop and a flip may give."""
    height, width, _ = image.shape
    padded = np.pad(image, [(padding, padding), (padding, padding), (0, 0)])
    found = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[top : top + height, left : left + width]
            found[top, left, False] = crop.tobytes()
            found[top, left, True] = crop[:, ::-1].tobytes()
    return found


@pytest.mark.parametrize("padding", [1, 4])
def test_only_shifts_and_flips_and_all_of_them(padding: int) -> None:
    augment = jax.jit(augmentation.random_crop_and_flip, static_argnums=2)
    seen = []
    for seed in range(8):
        augmented = np.asarray(augment(IMAGES, jax.random.key(seed), padding))
        assert augmented.shape == IMAGES.shape
        assert augmented.dtype == IMAGES.dtype
        for image, got in zip(IMAGES, augmented, strict=True):
            places = [at for at, crop in _shifts(image, padding).items() if crop == got.tobytes()]
            assert len(places) == 1
            seen += places
    tops, lefts, flips = (np.array(column) for column in zip(*seen, strict=True))
    for offsets in (tops, lefts):
        counts = np.bincount(offsets, minlength=2 * padding + 1)
        assert (counts > 512 / (2 * padding + 1) / 2).all()
    assert 200 < flips.sum() < 312


def test_the_key_decides_and_jit_equals_eager() -> None:
    one = augmentation.random_crop_and_flip(IMAGES, jax.random.key(1))
    jitted = jax.jit(augmentation.random_crop_and_flip)(IMAGES, jax.random.key(1))
    np.testing.assert_array_equal(one, jitted)
    other = augmentation.random_crop_and_flip(IMAGES, jax.random.key(2))
    assert not np.array_equal(one, other)


def test_no_padding_leaves_or_mirrors() -> None:
    augmented = np.asarray(augmentation.random_crop_and_flip(IMAGES, jax.random.key(0), 0))
    for image, got in zip(IMAGES, augmented, strict=True):
        assert np.array_equal(got, image) or np.array_equal(got, image[:, ::-1])


def test_cifar10_is_normalised_and_augmented_with_a_key_alone() -> None:
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    expected = (images / 255 - mean) / std
    got = augmentation.cifar10(images, None)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    key = jax.random.key(5)
    cropped = augmentation.random_crop_and_flip(images, key)
    np.testing.assert_array_equal(
        augmentation.cifar10(images, key), augmentation.cifar10(cropped, None)
    )


def test_identity() -> None:
    assert augmentation.identity(IMAGES, jax.random.key(0)) is IMAGES
