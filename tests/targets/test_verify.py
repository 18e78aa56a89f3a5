"""`verify` and its command: differing codes are counted, and where they begin is named."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import converted, export
from zoo import CASES

import simqat_jax as sq
from simqat_jax.ops.products import Conv
from simqat_jax.targets import verify as verification
from simqat_jax.targets.onnx import ops as onnx_ops


def of(name, backend, key=0):
    rngs = {"params": jax.random.key(key)}
    return converted(CASES[name], sq.SimQATConfig(backend=backend), rngs)


@pytest.fixture(scope="module")
def data():
    return np.asarray(jax.random.normal(jax.random.key(3), (70, 8, 8, 4)))


@pytest.mark.versions
@pytest.mark.parametrize("integer_io", [False, True])
@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_no_code_differs(backend, integer_io, data, tmp_path):
    model = of("residual", backend)
    path = tmp_path / f"m.{backend}"
    export(model, path, integer_io=integer_io)
    found = sq.verify(model, path, data)
    assert (found.examples, found.codes, found.differing) == (70, 70 * 8 * 8 * 4, 0)
    assert found.first_layer is None
    assert f"0 of {found.codes:,} codes differ" in str(found)


def test_a_file_of_another_model_is_found_out(data, tmp_path):
    model, other = (of("residual", "onnx", key) for key in (0, 1))
    sq.export_onnx(other, tmp_path / "m.onnx")
    found = sq.verify(model, tmp_path / "m.onnx", data[:4])
    assert found.differing > 0
    assert "not written from this model" in str(found)


def test_the_first_layer_that_differs_is_named(data, tmp_path, monkeypatch):
    model = of("residual", "onnx")
    conv = onnx_ops._WRITERS[Conv]

    def wrong(writer, op):
        if op.path == "Conv_1":
            kernel = np.roll(op.arrays["kernel"], 1, axis=0)
            op = dataclasses.replace(op, arrays={**op.arrays, "kernel": kernel})
        conv(writer, op)

    monkeypatch.setitem(onnx_ops._WRITERS, Conv, wrong)
    sq.export_onnx(model, tmp_path / "m.onnx")
    found = sq.verify(model, tmp_path / "m.onnx", data[:4])
    assert found.first_layer == "Conv_1"


def test_the_command(data, tmp_path, capsys):
    model = of("residual", "onnx")
    model.save(tmp_path / "m")
    sq.export_onnx(model, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", data[:3])
    arguments = [str(tmp_path / "m"), str(tmp_path / "m.onnx"), "--data", str(tmp_path / "x.npy")]
    assert verification.main(arguments) == 0
    assert "0 of 768 codes differ (3 examples)" in capsys.readouterr().out
    sq.export_onnx(of("residual", "onnx", key=1), tmp_path / "m.onnx")
    assert verification.main(arguments) == 1


def test_bad_input(data, tmp_path):
    model = of("residual", "onnx")
    with pytest.raises(FileNotFoundError, match="no file at"):
        sq.verify(model, tmp_path / "m.onnx", data)
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="neither"):
        sq.verify(model, tmp_path / "m.bin", data)
    sq.export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="takes 1 arrays, got 2"):
        sq.verify(model, tmp_path / "m.onnx", data, data)
    sq.export_onnx(of("two inputs", "onnx"), tmp_path / "two.onnx")
    with pytest.raises(ValueError, match="takes 2 inputs and the model 1"):
        sq.verify(model, tmp_path / "two.onnx", data)
    with pytest.raises(ValueError, match="no examples"):
        sq.verify(model, tmp_path / "m.onnx", data[:0])
    with pytest.raises(ValueError, match="cannot be counted"):
        sq.verify(of("softmax", "onnx"), tmp_path / "m.onnx", jnp.ones((2, 6)))
