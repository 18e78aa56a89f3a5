"""The file of an integer model: read as it was written, or refused."""

import dataclasses
import hashlib
import io
import json
import os
import tracemalloc
import zipfile

import flax.linen as nn
import numpy as np
import pytest
from models import converted
from zoo import CASES, Case

import simqat_jax as sq
from simqat_jax.integer import file


@pytest.fixture(scope="module")
def model():
    return converted(CASES["relu"])


@pytest.fixture
def saved(model, tmp_path):
    path = tmp_path / "model"
    model.save(path)
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
        archive.writestr(
            "header.json", header.replace(b'"format": %d' % file.FORMAT, b'"format": 99')
        )
        archive.writestr("model.npz", body)
    with pytest.raises(ValueError, match="has format 99"):
        sq.IntegerModel.load(saved)


# Equal arrays ------------------------------------------------------------------------------------


class Unrolled(nn.Module):
    """A cell called at each of three times."""

    @nn.compact
    def __call__(self, x):
        cell, state = nn.Dense(40), nn.Dense(40)(x[:, 0])
        for k in range(1, 4):
            state = nn.relu(cell(state) + x[:, k])
        return state


def test_equal_arrays_are_held_once(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 4, 40)).astype(np.float32)
    model = converted(Case(Unrolled(), (x,), 8, 2))
    kernels = [op.arrays["kernel"] for op in model.ops if "kernel" in op.arrays]
    model.save(tmp_path / "model")
    loaded = sq.IntegerModel.load(tmp_path / "model")
    assert len(kernels) == 4 and loaded == model
    _, arrays = parts(tmp_path / "model")
    held = [np.load(io.BytesIO(data)) for data in arrays.values()]
    assert sum(a.shape == (40, 40) for a in held) == 2
    assert loaded.nbytes == model.nbytes == stored_bytes(arrays)
    np.testing.assert_array_equal(loaded(x), model(x))


# Packed kernels ----------------------------------------------------------------------------------


class FewBits(nn.Module):
    """Kernels of 2 and 4 bits, with numbers of codes that fill no byte."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(7, (3, 3))(x))
        x = nn.relu(nn.Conv(7, (3, 3), feature_group_count=7, name="two_bits")(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def narrow():
    weight = sq.QuantSpec(
        num_bits=4, symmetric=True, per_channel=True, narrow_range=False, observer="batch"
    )
    rules = (sq.Rule(path="two_bits", weight=dataclasses.replace(weight, num_bits=2)),)
    config = sq.SimQATConfig(weight=weight, rules=rules)
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    return converted(Case(FewBits(), (x,), 5, 3), config)


def test_kernels_of_few_bits_are_packed(narrow, tmp_path):
    narrow.save(tmp_path / "model")
    loaded, (_, arrays) = sq.IntegerModel.load(tmp_path / "model"), parts(tmp_path / "model")
    bits = iter((4, 2, 4))
    for number, (a, b) in enumerate(zip(narrow.ops, loaded.ops, strict=True)):
        assert a.arrays.keys() == b.arrays.keys()
        for name, array in a.arrays.items():
            assert array.dtype == b.arrays[name].dtype
            np.testing.assert_array_equal(array, b.arrays[name])
        if "kernel" in a.arrays:
            held = np.load(io.BytesIO(arrays[f"{number}/kernel.npy"]))
            assert held.nbytes == -(-a.arrays["kernel"].size * next(bits) // 8)
    assert not list(bits)
    assert loaded.nbytes == narrow.nbytes == stored_bytes(arrays)


def stored_bytes(arrays):
    """Bytes of the arrays in a file, without its program."""
    loaded = [np.load(io.BytesIO(data)) for name, data in arrays.items() if name != "program.npy"]
    return sum(array.nbytes for array in loaded)


def test_a_file_of_the_format_without_packed_kernels(saved):
    header, arrays = parts(saved)
    program = json.loads(np.load(io.BytesIO(arrays["program.npy"])).tobytes())
    assert not any(op.pop("packed") for op in program["ops"])
    older = saved.with_name("older")
    write(older, header | {"format": 3}, (arrays | {"program.npy": text(program)}).items())
    a, b = sq.IntegerModel.load(saved), sq.IntegerModel.load(older)
    for old, new in zip(b.ops, a.ops, strict=True):
        for name, array in new.arrays.items():
            np.testing.assert_array_equal(old.arrays[name], array)


FORMS = {
    "a shape of more codes": {"shape": [1 << 40]},
    "a negative shape": {"shape": [-3, -9]},
    "lengths of text": {"shape": "3"},
    "an unknown width": {"width": 1},
    "a width of text": {"width": "4"},
}


@pytest.mark.parametrize("name", FORMS)
def test_packed_kernels_that_are_not_what_the_program_says(narrow, tmp_path, name):
    path = tmp_path / "model"
    narrow.save(path)
    header, arrays = parts(path)
    program = json.loads(np.load(io.BytesIO(arrays["program.npy"])).tobytes())
    form = next(op["packed"]["kernel"] for op in program["ops"] if op["packed"])
    form.update(FORMS[name])
    write(path, header, (arrays | {"program.npy": text(program)}).items())
    refused(path, r"codes of .* bits|no whole numbers")


def test_an_interrupted_save_leaves_what_was_there(saved, monkeypatch):
    model, before = sq.IntegerModel.load(saved), saved.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# Files that nobody saved -------------------------------------------------------------------------


def parts(path):
    """Header and arrays, as bytes, by the names that they have in the file."""
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read("header.json"))
        body = io.BytesIO(archive.read("model.npz"))
    with zipfile.ZipFile(body) as archive:
        return header, {name: archive.read(name) for name in archive.namelist()}


def write(path, header, arrays):
    """A file whose checksum is right: of (name, bytes) pairs."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for name, data in arrays:
            archive.writestr(name, data)
    digest = {"sha256": hashlib.sha256(body.getvalue()).hexdigest()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", json.dumps(header | digest))
        archive.writestr("model.npz", body.getvalue())


def npy(shape, dtype="|i1", data=b""):
    """An array whose header says what it likes."""
    stream = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + data


def text(program):
    """The program as the file holds it."""
    data = program if isinstance(program, bytes) else json.dumps(program).encode()
    return npy((len(data),), "|u1", data)


def refused(path, match):
    """Loading is a ValueError of one line that names the file, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            sq.IntegerModel.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert peak < 64 * 2**20


KERNELS = {
    "8 GB": (npy((1 << 33,)), "not as large as its shape"),
    "64 GB in two axes": (npy((1 << 18, 1 << 18)), "not as large as its shape"),
    "more than there are addresses": (npy((1 << 40, 1 << 40)), "not as large as its shape"),
    "elements of no size": (npy((1 << 50,), "|V0"), "not as large as its shape"),
    "a negative length": (npy((-4,)), "not as large as its shape"),
    "cut off": (npy((4,), data=b"abc"), "not as large as its shape"),
    "more than it says": (npy((4,), data=b"abcde"), "not as large as its shape"),
    "objects": (npy((1,), "|O", b"12345678"), "no numbers"),
    "text": (npy((1,), "<U1", b"abcd"), "no numbers"),
    "no array": (b"", "damaged"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_arrays_that_are_not_what_their_headers_say(saved, name):
    header, arrays = parts(saved)
    data, match = KERNELS[name]
    write(saved, header, (arrays | {"0/kernel.npy": data}).items())
    refused(saved, match)


def with_grid(tensor, **changes):
    return {**tensor, "grid": {**tensor["grid"], **changes}}


PROGRAMS = {
    "deep JSON": lambda p: b"[" * 200_000 + b"]" * 200_000,
    "a number without end": lambda p: b"9" * 100_000,
    "a deep structure": lambda p: json.dumps(p).replace('"structure": 0', NESTED).encode(),
    "no program": lambda p: [],
    "tensors with names of numbers": lambda p: p | {"tensors": [{**p["tensors"][0], "name": 1}]},
    "lengths of text": lambda p: p | {"tensors": [{**p["tensors"][0], "shape": ["1"]}]},
    "an unknown type": lambda p: p | {"tensors": [{**p["tensors"][0], "dtype": "float9"}]},
    "inputs of text": lambda p: p | {"inputs": "0"},
    "outputs between": lambda p: p | {"outputs": [1.5]},
    "an unknown backend": lambda p: p | {"backend": "cuda"},
    "an output that is not there": lambda p: p | {"structure": 7},
    "a scale of zero": lambda p: p | {"tensors": [with_grid(p["tensors"][0], scale=0.0)]},
    "a scale that is no number": lambda p: p | {"tensors": [with_grid(p["tensors"][0], scale="a")]},
    "codes without end": lambda p: p | {"tensors": [with_grid(p["tensors"][0], qmax=10**30)]},
    "metadata of no kind": lambda p: p | {"metadata": 3},
    "an output that is not what is made": lambda p: (
        p | {"tensors": [*p["tensors"][:-1], {**p["tensors"][-1], "shape": [-1, 99]}]}
    ),
}
NESTED = '"structure": ' + '{"list": [' * 5000 + "0" + "]}" * 5000


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_another_kind(saved, name):
    header, arrays = parts(saved)
    program = json.loads(np.load(io.BytesIO(arrays["program.npy"])).tobytes())
    changed = text(PROGRAMS[name](program))
    write(saved, header, (arrays | {"program.npy": changed}).items())
    refused(saved, "no integer model")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_parts_of_one_name(saved):
    header, arrays = parts(saved)
    write(saved, header, [*arrays.items(), ("0/kernel.npy", arrays["0/kernel.npy"])])
    refused(saved, "two of its parts have one name")
    write(saved, header, arrays.items())
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("model.npz", b"another")
    refused(saved, "two of its parts have one name")


def test_other_parts_than_two(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("more", b"")
    refused(saved, "other parts")


def test_a_large_file_that_is_no_model_is_not_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as sparse:
        sparse.truncate(4 << 30)
    refused(path, "no integer model")


def test_what_is_no_file_is_not_read(tmp_path):
    refused(tmp_path, "cannot be read")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "cannot be read")
    refused("with\0zero", "no integer model")


@pytest.mark.parametrize("path", [None, 3, b"model", ["model"]])
def test_what_is_no_path(path, saved):
    for use in (sq.IntegerModel.load, sq.IntegerModel.load(saved).save):
        with pytest.raises(TypeError, match="path must be the name of a file"):
            use(path)
