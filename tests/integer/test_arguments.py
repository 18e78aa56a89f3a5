"""What an integer model is called with, and what makes and takes one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TwoLayers, observed
from zoo import Model

import simqat_jax as sq

X = jnp.linspace(-1, 1, 24).reshape(4, 6)
NO_ARRAYS = ["text", object(), np.array(["a"])]


@pytest.fixture(scope="module")
def quantized():
    qmodel, variables, _ = observed(TwoLayers(), X)
    return qmodel, variables, sq.convert(qmodel, variables, X)


@pytest.mark.parametrize("value", NO_ARRAYS)
def test_what_is_no_array_is_named(quantized, value):
    *_, model = quantized
    for call, name in (
        (model, "input"),
        (model.quantize, "input"),
        (model.run_codes, "input"),
        (model.dequantize, "Dense_1/output"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be an array of .*, got "):
            call(value)


def test_codes_of_outputs_have_their_shapes_and_type(quantized):
    *_, model = quantized
    codes = model.run_codes(model.quantize(X))
    np.testing.assert_array_equal(model.dequantize(codes), model(X))
    with pytest.raises(ValueError, match=r"Dense_1/output must have shape \(batch, 3\)"):
        model.dequantize(codes[:, :2])
    with pytest.raises(ValueError, match=r"must be of type uint8, got int32\. Pass what run_codes"):
        model.dequantize(codes.astype(jnp.int32))
    with pytest.raises(ValueError, match="takes 1 arrays of codes, got 0"):
        model.dequantize(None)


@pytest.mark.parametrize("value", [None, "text", 3.5, sq.QuantSpec()])
def test_what_is_no_model_is_named(quantized, value, tmp_path):
    qmodel, variables, _ = quantized
    for call, name in (
        (lambda: sq.export_onnx(value, tmp_path / "m.onnx"), "model"),
        (lambda: sq.export_tflite(value, tmp_path / "m.tflite"), "model"),
        (lambda: sq.verify(value, tmp_path / "m.tflite", X), "model"),
        (lambda: sq.IntegerModel(value), "program"),
        (lambda: sq.convert(value, variables, X), "qmodule"),
        (lambda: sq.convert(qmodel, value, X), "variables"),
        (lambda: sq.convert(qmodel, variables | {"quant_stats": value}, X), "quant_stats"),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .* got "):
            call()


def test_other_arguments_of_convert(quantized):
    qmodel, variables, _ = quantized
    with pytest.raises(ValueError, match="args must hold a sample"):
        sq.convert(qmodel, variables)
    for method in ("no_such", "name"):
        with pytest.raises(ValueError, match="method must be one of TwoLayers"):
            sq.convert(qmodel, variables, X, method=method)
    with pytest.raises(TypeError, match="method must be one of TwoLayers"):
        sq.convert(qmodel, variables, X, method=3)
    with pytest.raises(ValueError, match="backend must be one of"):
        sq.convert(qmodel, variables, X, backend="cuda")
    sq.convert(qmodel, variables, jax.ShapeDtypeStruct(X.shape, X.dtype), method=None)


@pytest.mark.parametrize("export", [sq.export_onnx, sq.export_tflite])
def test_other_arguments_of_exports(quantized, export, tmp_path):
    *_, model = quantized
    for io in ("yes", 1, np.int8, None):
        with pytest.raises(TypeError, match='integer_io must be True, False, "int8" or "uint8"'):
            export(model, tmp_path / "m", integer_io=io)
    with pytest.raises(TypeError, match=r"metadata must be a FileMetadata, got \{"):
        export(model, tmp_path / "m", metadata={"input": "bytes"})
    with pytest.raises(TypeError, match="path must be the name of a file"):
        export(model, None)
    assert not list(tmp_path.iterdir())


def test_other_arguments_of_verify(quantized, tmp_path):
    *_, model = quantized
    path = tmp_path / "m.tflite"
    sq.export_tflite(model, path)
    for size in ("64", 1.5, None, True):
        with pytest.raises(TypeError, match="batch_size must be a whole number"):
            sq.verify(model, path, X, batch_size=size)
    for data in NO_ARRAYS:
        with pytest.raises(TypeError, match="data must hold real numbers"):
            sq.verify(model, path, data)


def test_what_lies_on_no_grid_keeps_its_kind():
    ids = jnp.array([[0, 1], [4, 2], [3, 3]])
    qmodel, variables, _ = observed(Model(lambda x: nn.Dense(2)(nn.Embed(5, 3)(x))), ids)
    model = sq.convert(qmodel, variables, ids)
    np.testing.assert_array_equal(model(ids.astype(jnp.int8)), model(ids))
    with pytest.raises(ValueError, match=r"must be of type int32, got float32"):
        model(ids.astype(jnp.float32))
