"""`verify` and its command: differing codes are counted, and where they begin is named."""

import dataclasses
import platform
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from zoo import CASES

import simqat_jax as sq
from simqat_jax.ops.products import Conv
from simqat_jax.targets import verify as verification
from simqat_jax.targets.onnx import ops as onnx_ops
from simqat_jax.targets.onnx import runtime

RNGS = {"params": jax.random.key(0)}


def converted(name, backend, key=0):
    case = CASES[name]
    qmodel = sq.SimQAT(sq.SimQATConfig(backend=backend)).apply(case.model)
    variables = qmodel.init({"params": jax.random.key(key)}, *case.args, **case.kwargs)
    _, updates = qmodel.apply(variables, *case.args, **case.kwargs, mutable=["quant_stats"])
    return sq.convert(qmodel, {**variables, **updates}, *case.args, **case.kwargs)


@pytest.fixture(scope="module")
def data():
    return np.asarray(jax.random.normal(jax.random.key(3), (70, 8, 8, 4)))


@pytest.mark.parametrize("integer_io", [False, True])
@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_no_code_differs(backend, integer_io, data, tmp_path):
    model = converted("residual", backend)
    path = tmp_path / f"m.{backend}"
    export = sq.export_onnx if backend == "onnx" else sq.export_tflite
    export(model, path, integer_io=integer_io)
    found = sq.verify(model, path, data)
    assert (found.examples, found.codes, found.differing) == (70, 70 * 8 * 8 * 4, 0)
    assert found.first_layer is None
    assert f"0 of {found.codes:,} codes differ" in str(found)


def test_a_file_of_another_model_is_found_out(data, tmp_path):
    model, other = (converted("residual", "onnx", key) for key in (0, 1))
    sq.export_onnx(other, tmp_path / "m.onnx")
    found = sq.verify(model, tmp_path / "m.onnx", data[:4])
    assert found.differing > 0
    assert "not written from this model" in str(found)


def test_the_first_layer_that_differs_is_named(data, tmp_path, monkeypatch):
    model = converted("residual", "onnx")
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


def test_saturating_sums_are_found_where_the_processor_has_no_vnni():
    if platform.machine() != "x86_64":
        assert not runtime.onnxruntime_saturates()
        return
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("the processor's instructions are read from /proc/cpuinfo, which is not here")
    vnni = {"avx512_vnni", "avx_vnni"} & set(Path("/proc/cpuinfo").read_text().split())
    assert runtime.onnxruntime_saturates() == (not vnni)


@pytest.mark.parametrize("saturates", [False, True])
def test_the_exact_option_is_set_where_sums_saturate(saturates, data, tmp_path, monkeypatch):
    sq.export_onnx(converted("residual", "onnx"), tmp_path / "m.onnx")
    entries = []

    class Options(onnxruntime.SessionOptions):
        def add_session_config_entry(self, *entry):
            entries.append(entry)
            super().add_session_config_entry(*entry)

    monkeypatch.setattr(runtime, "onnxruntime_saturates", lambda: saturates)
    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    sq.open_file(tmp_path / "m.onnx")
    assert (("session.x64quantprecision", "1") in entries) == saturates


def test_the_command(data, tmp_path, capsys):
    model = converted("residual", "onnx")
    model.save(tmp_path / "m")
    sq.export_onnx(model, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", data[:3])
    arguments = [str(tmp_path / "m"), str(tmp_path / "m.onnx"), "--data", str(tmp_path / "x.npy")]
    assert verification.main(arguments) == 0
    assert "0 of 768 codes differ (3 examples)" in capsys.readouterr().out
    sq.export_onnx(converted("residual", "onnx", key=1), tmp_path / "m.onnx")
    assert verification.main(arguments) == 1


def test_bad_input(data, tmp_path):
    model = converted("residual", "onnx")
    with pytest.raises(FileNotFoundError, match="no file at"):
        sq.verify(model, tmp_path / "m.onnx", data)
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="neither"):
        sq.verify(model, tmp_path / "m.bin", data)
    sq.export_onnx(model, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="takes 1 arrays, got 2"):
        sq.verify(model, tmp_path / "m.onnx", data, data)
    sq.export_onnx(converted("two inputs", "onnx"), tmp_path / "two.onnx")
    with pytest.raises(ValueError, match="takes 2 inputs and the model 1"):
        sq.verify(model, tmp_path / "two.onnx", data)
    with pytest.raises(ValueError, match="no examples"):
        sq.verify(model, tmp_path / "m.onnx", data[:0])
    with pytest.raises(ValueError, match="cannot be counted"):
        sq.verify(converted("softmax", "onnx"), tmp_path / "m.onnx", jnp.ones((2, 6)))
