"""Augmentation and normalisation of images as pure functions inside the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
"""Of the training images in [0, 1], per channel."""


def random_crop_and_flip(images: jax.Array, key: jax.Array, padding: int = 4) -> jax.Array:
    """Shift every image by up to `padding` pixels and mirror half of them.

    Each image is padded with zeros on all sides, cropped to its old size at a random place, and
    flipped left to right with probability 1/2.

    Args:
      images: shape (N, H, W, C), any dtype.
      key: decides everything; the same key gives the same images.
      padding: pixels on each side.

    Returns:
      shape and dtype of `images`.

    Examples:
      >>> random_crop_and_flip(jnp.ones((2, 8, 8, 3), jnp.uint8), jax.random.key(0)).shape
      (2, 8, 8, 3)
    """
    count, height, width, _ = images.shape
    top_key, left_key, flip_key = jax.random.split(key, 3)
    top = jax.random.randint(top_key, (count, 1), 0, 2 * padding + 1)
    left = jax.random.randint(left_key, (count, 1), 0, 2 * padding + 1)
    flip = jax.random.bernoulli(flip_key, 0.5, (count, 1))
    forward = jnp.arange(width)[None]
    rows = top + jnp.arange(height)[None]
    columns = left + jnp.where(flip, forward[:, ::-1], forward)
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    # One gather for crop and flip: a dynamic slice of each image is slower on CPU.
    image = jnp.arange(count)[:, None, None]
    return padded.at[image, rows[:, :, None], columns[:, None]].get(mode="promise_in_bounds")


def normalize(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """Return `(images / 255 - mean) / std`, float32, per channel.

    Args:
      images: uint8, shape (N, H, W, C).
      mean: of the channels, in units of [0, 1].
      std: of the channels, in units of [0, 1].
    """
    scale = np.reciprocal(255.0 * np.asarray(std)).astype(np.float32)
    offset = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
    channels = (1, 1, 1, len(mean))
    return images.astype(jnp.float32) * scale.reshape(channels) + offset.reshape(channels)


def cifar10(images: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return normalised images; with a key (in training) cropped and flipped at random."""
    if key is not None:
        images = random_crop_and_flip(images, key)
    return normalize(images, CIFAR10_MEAN, CIFAR10_STD)


def identity(images: jax.Array, key: jax.Array | None) -> jax.Array:
    """Return the images: they need nothing."""
    del key
    return images
