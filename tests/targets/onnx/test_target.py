"""ONNX files: ONNX Runtime computes the integer model's codes, with integer operators."""

import dataclasses
import importlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from models import by_half, converted
from zoo import CASES, Case

import simqat_jax as sq
from simqat_jax.targets.onnx.runtime import onnxruntime_saturates

CONFIG = sq.SimQATConfig(backend="onnx")
FLOAT_PARTS = ("preprocessing",)
TRAINING = ("batch norm train", "dropout train")


def session(path, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if onnxruntime_saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(runtime, arrays):
    names = [i.name for i in runtime.get_inputs()]
    return runtime.run(None, dict(zip(names, map(np.asarray, arrays), strict=True)))


def differences(model, runtime, args):
    """Count the codes of ONNX Runtime that are not the model's."""
    codes = model.quantize(*args)
    codes = codes if isinstance(codes, list) else [codes]
    signed = [model.tensors[i].grid.qmin < 0 for i in model.inputs]
    got = run(
        runtime,
        [
            (np.asarray(c, np.int32) + 128).astype(np.uint8) if s else c
            for c, s in zip(codes, signed, strict=True)
        ],
    )
    count = 0
    for i, a, b in zip(model.outputs, jax.tree.leaves(model.run_codes(*codes)), got, strict=True):
        grid = model.tensors[i].grid
        shift = 128 if grid is not None and grid.qmin < 0 else 0
        count += int((np.asarray(a, np.int32) + shift != b).sum())
    return count


@pytest.mark.parametrize("name", by_half(n for n in CASES if n not in (*TRAINING, *FLOAT_PARTS)))
def test_every_construct(name, tmp_path):
    case = CASES[name]
    model = converted(case, CONFIG)
    sq.export_onnx(model, tmp_path / "m.onnx", integer_io=True)
    runtime = session(tmp_path / "m.onnx", tmp_path / "optimized.onnx")
    assert differences(model, runtime, case.args) == 0
    if any(d < 0 for d in model.tensors[model.inputs[0]].shape):
        args = [jnp.concatenate([a, 0.8 * a, 1.2 * a, a[:1]]) for a in case.args]
        assert differences(model, runtime, args) == 0
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    plain = {
        "sum": 1,
        "sum_pool": 1,
        "norm_onnx": 2,
        "log_softmax": 9,
        "spread_onnx": 1,
    }  # additions of floats
    written_out = sum(plain.get(op.kind, 0) for op in model.ops)
    assert not {"Conv", "Gemm", "MatMul"} & set(operators)
    assert operators.count("Add") <= written_out


@pytest.mark.parametrize("name", FLOAT_PARTS)
def test_float_parts_are_written(name, tmp_path):
    model, path = converted(CASES[name], CONFIG), tmp_path / "m.onnx"
    sq.export_onnx(model, path)
    found = sq.verify(model, path, *CASES[name].args)
    assert found.differing == 0 and found.largest_difference < 1e-6
    assert found.codes + found.values > 0 and found.float_parts


@pytest.mark.versions
def test_float_inputs_and_outputs_by_default(tmp_path):
    case = CASES["residual"]
    model = converted(case, CONFIG)
    sq.export_onnx(model, tmp_path / "m.onnx")
    runtime = session(tmp_path / "m.onnx")
    x = jax.random.normal(jax.random.key(5), (5, *case.args[0].shape[1:]))
    (got,) = run(runtime, [x])
    np.testing.assert_array_equal(got, model(x))
    assert runtime.get_inputs()[0].shape[0] == "batch"
    proto = onnx.load(tmp_path / "m.onnx")
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(metadata["config"])["backend"] == "onnx"
    assert proto.producer_version == sq.__version__
    kernels = [t for t in proto.graph.initializer if len(t.dims) == 4]
    assert len(kernels) == 3 and {t.data_type for t in kernels} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [3, 5, 8])
def test_narrow_widths(num_bits, symmetric, tmp_path):
    config = sq.SimQATConfig(
        backend="onnx", activation=sq.QuantSpec(num_bits=num_bits, symmetric=symmetric)
    )
    case = CASES["residual"]
    model = converted(case, config)
    sq.export_onnx(model, tmp_path / "m.onnx", integer_io=True)
    assert differences(model, session(tmp_path / "m.onnx"), [2 * case.args[0]]) == 0


# Bad input ---------------------------------------------------------------------------------------


def test_additions_of_another_runtime(tmp_path):
    model = converted(CASES["residual"], sq.SimQATConfig(backend="tflite"))
    with pytest.raises(ValueError, match=r'add: it rounds as in tflite.*backend="onnx"'):
        sq.export_onnx(model, tmp_path / "m.onnx")


def test_widths_that_onnx_files_are_not_written_with(tmp_path):
    wide = sq.SimQATConfig(activation=sq.QuantSpec(num_bits=12))
    with pytest.raises(ValueError, match=r"(?s)activations have more than 8 bits.*num_bits=8"):
        sq.export_onnx(converted(CASES["relu"], wide), tmp_path / "m.onnx")


def test_without_the_extra(tmp_path, monkeypatch):
    model = converted(CASES["relu"], CONFIG)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"simqat-jax\[export\]"):
        sq.export_onnx(model, tmp_path / "m.onnx")


@pytest.mark.versions
def test_outputs_have_the_names_of_the_model(tmp_path):
    sq.export_onnx(converted(CASES["two heads"], CONFIG), tmp_path / "m.onnx")
    names = [o.name for o in session(tmp_path / "m.onnx").get_outputs()]
    assert names == ["a", "b/0", "b/1"]


class ReadTwice(nn.Module):
    """One layer for two inputs, as a cell for all times."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(24)
        return layer(jnp.tanh(layer(x)))


@pytest.mark.parametrize(("num_bits", "shape"), [(8, (24, 24)), (4, (24 * 24 // 2,))])
def test_a_kernel_of_several_operations_is_held_once(num_bits, shape, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    weight = dataclasses.replace(CONFIG.weight, num_bits=num_bits)
    config = dataclasses.replace(CONFIG, weight=weight)
    model, path = converted(Case(ReadTwice(), (x,), 3, 1), config), tmp_path / "m.onnx"
    sq.export_onnx(model, path)
    graph = onnx.load(path).graph
    assert len([i for i in graph.initializer if tuple(i.dims) == shape]) == 1
    assert [node.op_type for node in graph.node].count("Gather") == (num_bits == 4)
    assert not sq.verify(model, path, x).differing
