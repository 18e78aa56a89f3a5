"""The file of an integer model: read as it was written, or refused."""

import zipfile

import numpy as np
import pytest
from models import converted
from zoo import CASES

import simqat_jax as sq


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    converted(CASES["relu"]).save(path)
    return path


def test_a_truncated_file(saved):
    data = saved.read_bytes()
    saved.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"no integer model|damaged"):
        sq.IntegerModel.load(saved)


@pytest.mark.versions
def test_an_altered_file(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 0x10
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        sq.IntegerModel.load(saved)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "foreign"
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match="no integer model"):
        sq.IntegerModel.load(tmp_path / "foreign.npz")
    path.write_text("text")
    with pytest.raises(ValueError, match="no integer model"):
        sq.IntegerModel.load(path)
    with pytest.raises(FileNotFoundError):
        sq.IntegerModel.load(tmp_path / "nothing")


def test_a_file_of_a_later_format(saved):
    with zipfile.ZipFile(saved) as archive:
        header, body = archive.read("header.json"), archive.read("model.npz")
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("header.json", header.replace(b'"format": 1', b'"format": 99'))
        archive.writestr("model.npz", body)
    with pytest.raises(ValueError, match="has format 99"):
        sq.IntegerModel.load(saved)


def test_an_interrupted_save_leaves_what_was_there(saved, monkeypatch):
    model, before = sq.IntegerModel.load(saved), saved.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]
