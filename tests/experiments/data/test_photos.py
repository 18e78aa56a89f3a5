"""Photos are cut from their centre, labelled by their names, and divided evenly."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.data import photos
from experiments.errors import ExperimentError


def save(path: Path, width: int = 12, height: int = 8) -> None:
    """A photo whose centre of 4x4 is white, losslessly enough for JPEG."""
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - 4) // 2, (width - 4) // 2
    pixels[top : top + 4, left : left + 4] = 255
    Image.fromarray(pixels).save(path, quality=100, subsampling=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("012_b.jpg", "007_a.jpeg", "999_c.JPG"):
        save(tmp_path / name)
    (tmp_path / "README.md").write_text("about photos")
    return tmp_path


def test_centres_and_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(photos.VARIABLE, str(folder))
    found = photos.load(size=4)
    assert found.pixels.shape == (3, 4, 4, 3) and found.pixels.dtype == np.uint8
    assert found.pixels.min() > 200
    np.testing.assert_array_equal(found.labels, [7, 12, 999])
    np.testing.assert_array_equal(photos.load(size=4, every=2).labels, [7, 999])
    assert photos.load(size=6).pixels[:, 0].max() < 60


def test_split_takes_evenly_and_leaves_the_others() -> None:
    labels = np.arange(10)
    chosen, others = photos.Photos(labels[:, None], labels).split(3)
    np.testing.assert_array_equal(chosen.labels, [0, 3, 6])
    np.testing.assert_array_equal(others.labels, [1, 2, 4, 5, 7, 8, 9])
    np.testing.assert_array_equal(others.pixels[:, 0], others.labels)


def test_what_is_missing_or_no_photo_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(photos.VARIABLE, raising=False)
    with pytest.raises(ExperimentError, match="SIMQAT_PHOTOS is not set"):
        photos.load()
    with pytest.raises(ExperimentError, match="no photos named like"):
        photos.load(folder / "nowhere")
    with pytest.raises(ExperimentError, match=r"007_a\.jpeg has 12x8 pixels, less than 9x9"):
        photos.load(folder, size=9)
    (folder / "008_broken.jpg").write_bytes(b"no image")
    with pytest.raises(ExperimentError, match=r"cannot read the photo .*008_broken\.jpg"):
        photos.load(folder, size=4)
