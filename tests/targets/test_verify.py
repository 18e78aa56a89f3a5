"""`verify` and its command: differing codes are counted, and where they begin is named."""

import copy
import dataclasses
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import converted, export, observed
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
    assert copy.deepcopy(found) == found == pickle.loads(pickle.dumps(found))
    assert found != dataclasses.replace(found, differing=0)


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


# Float parts -------------------------------------------------------------------------------------


class FloatEnds(nn.Module):
    """An image of bytes and ids in front, a table between, logarithms and a choice behind."""

    @nn.compact
    def __call__(self, image, ids, mask):
        x = (image.astype(jnp.float32) / 255.0 - 0.45) / 0.225
        x = nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2))
        y = nn.Dense(6)(jnp.where(mask[..., None], nn.Embed(11, 5)(ids), 0.25)).max(1)
        logits = nn.Dense(4)(x + y)
        energy = logits - 2 * jax.nn.logsumexp(logits, -1, keepdims=True)  # it has no exact form
        return {"logits": logits, "energy": energy, "class": jnp.argmax(logits, -1)}


@pytest.fixture(scope="module")
def ends():
    """Arguments of FloatEnds: bytes, integers, truth values."""
    rng = np.random.default_rng(0)
    image, ids = rng.integers(0, 256, (9, 8, 8, 3)), rng.integers(0, 11, (9, 5))
    return image.astype(np.uint8), ids.astype(np.int32), rng.random((9, 5)) < 0.7


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def with_float_ends(request, ends):
    config = sq.SimQATConfig(backend=request.param)
    qmodel, variables, _ = observed(FloatEnds(), *ends, config=config)
    return sq.convert(qmodel, variables, *ends)


@pytest.mark.versions
def test_float_parts_in_front_and_behind(with_float_ends, ends, tmp_path):
    path = tmp_path / f"m.{with_float_ends.backend}"
    export(with_float_ends, path)
    found = sq.verify(with_float_ends, path, *ends, batch_size=4)
    assert (found.examples, found.codes, found.differing) == (9, 36, 0)
    assert (found.values, found.first_layer) == (9 + 36, None)
    assert 0 < found.largest_difference < 1e-6 and 0 < found.differing_values < 36
    text = str(found)
    assert f"values that are no codes {found.differing_values} differ, by" in text
    assert "In float: " in text and "exp (lax.exp)" in text


def test_saved_float_parts_are_data(with_float_ends, ends, tmp_path):
    """What was loaded runs, and is written to the same file."""
    with_float_ends.save(tmp_path / "model")
    loaded = sq.IntegerModel.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded(*ends), with_float_ends(*ends))
    files = []
    for number, model in enumerate((with_float_ends, loaded)):
        export(model, tmp_path / f"{number}.{model.backend}")
        files.append((tmp_path / f"{number}.{model.backend}").read_bytes())
    assert files[0] == files[1]


def test_a_value_that_differs_is_counted(with_float_ends, ends, tmp_path):
    """Another divisor in the file moves codes and values."""
    program = with_float_ends.program
    tensors = list(program.tensors)
    (divisor,) = [i for i, t in enumerate(tensors) if np.array_equal(t.value, 255)]
    tensors[divisor] = dataclasses.replace(tensors[divisor], value=np.array(200, np.float32))
    path = tmp_path / f"m.{with_float_ends.backend}"
    export(sq.IntegerModel(dataclasses.replace(program, tensors=tuple(tensors))), path)
    found = sq.verify(with_float_ends, path, *ends)
    assert found.differing and found.differing_values and found.largest_difference > 1e-4
