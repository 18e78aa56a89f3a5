"""A file runs in a process of its own: whatever it does there, the caller goes on."""

import dataclasses
import gc
import runpy
import subprocess
import sys
import threading

import numpy as np
import pytest
from models import converted, export
from zoo import CASES

import simqat_jax as sq
from simqat_jax.targets import TARGETS, open_file, serve
from simqat_jax.targets import verify as command

X = np.linspace(-1, 1, 3 * 8 * 8 * 4, dtype=np.float32).reshape(3, 8, 8, 4)

RUNTIMES = """
import ctypes, os, sys, time

def aborts(path, threads):
    os.abort()

def crashes(path, threads):
    def run(arrays):
        ctypes.string_at(0)
    return "crashes", ["float32"], run

def exits(path, threads):
    os._exit(3)

def refuses(path, threads):
    raise RuntimeError("no header\\n  in this file.")

def fails(path, threads):
    def run(arrays):
        raise KeyError("a node")
    return "fails", ["float32"], run

def never_opens(path, threads):
    time.sleep(1000)

def never_answers(path, threads):
    return "hangs", ["float32"], lambda arrays: time.sleep(1000)

def babbles(path, threads):
    print("loading", path, flush=True)
    os.write(1, b"from C as well")
    return "babbles", ["float32"], lambda arrays: arrays

def returns_other_shapes(path, threads):
    return "other", ["float32"], lambda arrays: [a[..., :1] for a in arrays]
"""
"""Runtimes as LiteRT is, or worse, for a damaged file."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its two files and a module of runtimes."""
    folder = tmp_path_factory.mktemp("files")
    model = converted(CASES["residual"], sq.SimQATConfig(backend="tflite"))
    export(model, folder / "m.tflite")
    export(converted(CASES["residual"], sq.SimQATConfig(backend="onnx")), folder / "m.onnx")
    (folder / "runtimes.py").write_text(RUNTIMES)
    return model, folder


@pytest.fixture
def in_runtime(files, monkeypatch):
    """Have TFLite files run by one of the runtimes above."""
    functions = runpy.run_path(str(files[1] / "runtimes.py"))

    def choose(name):
        target = dataclasses.replace(TARGETS[".tflite"], open=functions[name])
        monkeypatch.setitem(TARGETS, ".tflite", target)

    return choose


CRASHES = {
    "aborts": "its runtime ended with SIGABRT",
    "crashes": "its runtime ended with SIGSEGV",
    "exits": "its runtime ended with status 3",
    "refuses": "no header in this file",
    "fails": "a node",
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_file_that_ends_its_process_is_a_value_error(files, in_runtime, name):
    model, folder = files
    in_runtime(name)
    with pytest.raises(ValueError) as caught:
        sq.verify(model, folder / "m.tflite", X)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'm.tflite'} is damaged")
    assert CRASHES[name] in message
    assert message.endswith("Export the model again.") and "\n" not in message


@pytest.mark.parametrize("name", ["aborts", "crashes"])
def test_the_command_outlives_a_file(files, in_runtime, name, capsys):
    model, folder = files
    in_runtime(name)
    model.save(folder / "model")
    np.save(folder / "x.npy", X)
    arguments = [str(folder / name) for name in ("model", "m.tflite")]
    assert command.main([*arguments, "--data", str(folder / "x.npy")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not check" in line and "m.tflite is damaged" in line


@pytest.mark.parametrize("name", ["never_opens", "never_answers"])
def test_a_file_that_hangs_is_stopped(files, in_runtime, name):
    model, folder = files
    in_runtime(name)
    path = folder / "m.tflite"
    with pytest.raises(ValueError, match=f"{path} was stopped: .* within 1 seconds.*timeout="):
        sq.verify(model, path, X, timeout=1)


def test_a_hanging_file_takes_no_more_calls(files, in_runtime, monkeypatch):
    in_runtime("never_answers")
    file, timer = sq.open_file(files[1] / "m.tflite"), threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda _, end: timer(0.5, end))
    with pytest.raises(ValueError, match="was stopped"):
        file.run([np.zeros((3, 300_000), np.float32)])  # more than a pipe holds
    with pytest.raises(ValueError, match="its runtime ended with SIGKILL"):
        file.run([X])


def test_what_a_runtime_prints_is_no_answer(files, in_runtime, capfd):
    in_runtime("babbles")
    file = sq.open_file(files[1] / "m.tflite")
    assert file.name == "babbles"
    (same,) = file.run([X])
    np.testing.assert_array_equal(same, X)
    assert "loading" not in capfd.readouterr().out


def test_outputs_of_other_shapes_are_those_of_another_model(files, in_runtime):
    model, folder = files
    in_runtime("returns_other_shapes")
    with pytest.raises(ValueError, match=r"m\.tflite returns .*\(3, 8, 8, 1\).* another model"):
        sq.verify(model, folder / "m.tflite", X)


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_both_processes_compute_the_same(files, suffix):
    _, folder = files
    own, this = (sq.open_file(folder / f"m.{suffix}", isolated=i) for i in (True, False))
    assert (own.name, own.input_types) == (this.name, this.input_types)
    for batch in (X, X[:1], X):
        for a, b in zip(own.run([batch]), this.run([batch]), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            np.testing.assert_array_equal(a, b)
            a[...] = 0  # as writable as an array of this process


def test_the_process_ends_with_the_file(files, monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    file = sq.open_file(files[1] / "m.tflite")
    (process,) = started
    assert process.poll() is None
    del file
    gc.collect()
    assert process.poll() is not None


def test_an_interrupted_call_leaves_no_answer_for_the_next(files, monkeypatch):
    file = sq.open_file(files[1] / "m.tflite")
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(serve, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            file.run([X])
    with pytest.raises(ValueError, match="its runtime ended"):
        file.run([X])


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize("isolated", [True, False])
def test_a_damaged_file_is_a_value_error(files, suffix, isolated, tmp_path):
    data = (files[1] / f"m.{suffix}").read_bytes()
    path = tmp_path / f"m.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{path} is damaged.* Export the model again"):
        sq.open_file(path, isolated=isolated)


def test_flipped_bits_are_equal_codes_other_codes_or_a_value_error(files, tmp_path):
    model, folder = files
    data, rng = (folder / "m.tflite").read_bytes(), np.random.default_rng(0)
    path = tmp_path / "m.tflite"
    for place in rng.integers(len(data), size=12):
        path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        try:
            assert sq.verify(model, path, X).codes == 3 * 8 * 8 * 4
        except ValueError as error:
            assert str(path) in str(error)


def test_wrong_arguments(files, tmp_path):
    path = files[1] / "m.tflite"
    with pytest.raises(FileNotFoundError, match="no file at"):
        sq.open_file(tmp_path / "m.tflite")
    with pytest.raises(ValueError, match=r"neither \*\.onnx nor \*\.tflite"):
        sq.open_file(files[1] / "runtimes.py")
    with pytest.raises(ValueError, match=r"threads must be .* 1 or more, or None, got 0"):
        sq.open_file(path, threads=0)
    for timeout in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="timeout must be a number of seconds above 0"):
            sq.open_file(path, timeout=timeout)
    with pytest.raises(TypeError, match="timeout must be a number of seconds above 0"):
        sq.open_file(path, timeout="1")
    for threads in ("2", 1.5, True):
        with pytest.raises(TypeError, match="threads must be a whole number"):
            sq.open_file(path, threads=threads)


def test_a_file_of_its_own_needs_no_jax():
    """It would take longer to import than most files take to run."""
    modules = [serve.__file__, *(sys.modules[t.open.__module__].__file__ for t in TARGETS.values())]
    for module in modules:
        code = (
            f"import runpy, sys; runpy.run_path({module!r}); "
            "assert not {'jax', 'simqat_jax'} & {*sys.modules}"
        )
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert open_file.__name__ == "simqat_jax.targets.open_file"
