"""Two epochs of the same images in the same order, for all who are compared. Of NumPy alone."""

from collections.abc import Iterator, Mapping

import numpy as np

EPOCHS = 2
Arrays = Mapping[str, np.ndarray]
"""`images` and `labels` to learn, `test_images` and `test_labels`."""


def batches(data: Arrays, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the batches of all epochs, each in an order of its own, always the same."""
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(data["labels"]))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield data["images"][chosen], data["labels"][chosen]


def test_batches(data: Arrays, batch_size: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Return whole batches of test images, and their labels."""
    count = len(data["test_labels"]) // batch_size * batch_size
    images = np.split(data["test_images"][:count], count // batch_size)
    return images, data["test_labels"][:count]
