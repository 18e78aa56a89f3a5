"""Archives of torch are read by NumPy, and what is none is refused before anything is called."""

import collections
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import torch_archive
from experiments.errors import ExperimentError


def name(module: str, attribute: str) -> type:
    """A class that pickle writes by this name, whether or not there is such a module."""
    return type(attribute, (), {"__module__": module, "__qualname__": attribute})


FLOAT = name("torch", "FloatStorage")
LONG = name("torch", "LongStorage")
REBUILD = name("torch._utils", "_rebuild_tensor_v2")


class Called:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


class Storage:
    """What a tensor refers to: type, key, number of elements, view."""

    def __init__(self, *fields: Any) -> None:
        self.fields = fields


class Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes any name of a class: the one that is written in Python can be told to."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            kind, key, size, view = obj.fields
            return ("storage", kind, key, "cpu", size, view)
        return None

    def save_global(self, obj: Any, name: str | None = None) -> None:
        called = f"c{obj.__module__}\n{obj.__qualname__}\n"
        self.write(called.encode())  # type: ignore[attr-defined]


def tensor(storage: Storage, offset: Any, shape: tuple, strides: tuple) -> Called:
    return Called(REBUILD, storage, offset, shape, strides, False, collections.OrderedDict())


def write(path: Path, state: Any, storages: dict[str, np.ndarray], **changed: Any) -> Path:
    """Write an archive as torch did."""
    sizes = {"protocol_version": 1001, "little_endian": changed.get("little_endian", True)}
    magic = changed.get("magic", 0x1950A86A20F9469CFC6C)
    with path.open("wb") as file:
        for part in (magic, 1001, sizes, state, sorted(storages)):
            Pickler(file, protocol=2).dump(part)
        for key in sorted(storages):
            file.write(struct.pack("<q", storages[key].size) + storages[key].tobytes())
    return path


VALUES = np.arange(24, dtype=np.float32) / 8
WEIGHTS = Storage(FLOAT, "7", 24, None)


def archive(path: Path) -> Path:
    """A kernel held transposed, a part of the same storage, and a counter."""
    state = collections.OrderedDict(
        kernel=tensor(WEIGHTS, 0, (4, 3, 2), (1, 4, 12)),
        part=tensor(WEIGHTS, 5, (3,), (2,)),
        count=tensor(Storage(LONG, "8", 1, None), 0, (), ()),
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as modules of torch
    return write(path, state, {"7": VALUES, "8": np.array([2**40])})


def test_tensors_are_those_that_were_written(tmp_path: Path) -> None:
    found = torch_archive.load(archive(tmp_path / "weights.pth"))
    assert list(found) == ["kernel", "part", "count"]
    np.testing.assert_array_equal(found["kernel"], VALUES.reshape(2, 3, 4).transpose(2, 1, 0))
    np.testing.assert_array_equal(found["part"], VALUES[[5, 7, 9]])
    assert found["count"].shape == () and found["count"] == 2**40
    assert {k: v.dtype for k, v in found.items() if k != "part"} == {
        "kernel": np.float32,
        "count": np.int64,
    }


@pytest.mark.parametrize(
    "called",
    [
        Called(name(os.system.__module__, "system"), "touch called"),
        Called(name("builtins", "eval"), "open('called', 'w')"),
        Called(name("collections", "OrderedDict.fromkeys"), "ab"),
        Called(name("torch", "HalfStorage")),
    ],
    ids=lambda called: called.call[0].__qualname__,
)
def test_other_names_are_refused(
    called: Called, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "weights.pth", {"kernel": called}, {})
    function = called.call[0]
    asked = rf"asks for {function.__module__}\.{function.__qualname__}, which is refused"
    with pytest.raises(ExperimentError, match=asked):
        torch_archive.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    content = archive(tmp_path / "whole.pth").read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ExperimentError, match=r"cannot read .*cut\.pth as weights"):
            torch_archive.load(path)


@pytest.mark.parametrize(
    ("state", "changed", "message"),
    [
        ({}, {"magic": 1}, "magic number"),
        ({}, {"little_endian": False}, "big-endian"),
        ({"a": tensor(WEIGHTS, 1, (24,), (1,))}, {}, "buffer"),
        ({"a": tensor(WEIGHTS, 0, (2,), (-1,))}, {}, "strides"),
        ({"a": tensor(Storage(FLOAT, "7", 23, None), 0, (1,), (1,))}, {}, "24 elements, not 23"),
        ({"a": tensor(Storage(FLOAT, "7", 24, ("v", 0, 1)), 0, (1,), (1,))}, {}, "parts of others"),
        ({"a": 1}, {}, "other things than tensors"),
    ],
)
def test_what_is_no_archive_is_refused(
    state: Any, changed: dict, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "weights.pth", state, {"7": VALUES}, **changed)
    with pytest.raises(ExperimentError, match=message):
        torch_archive.load(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"No such file.*Install the package"):
        torch_archive.load(tmp_path / "weights.pth")
