"""TFLite files: LiteRT with XNNPACK computes the integer model's codes."""

import dataclasses
import importlib

import flax.linen as nn
import jax
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from models import by_half, converted, observed
from single_operations import random_codes, single
from zoo import CASES, Case, Model

import simqat_jax as sq
from simqat_jax.ir.program import grid_of
from simqat_jax.targets.tflite import target as tflite

CONFIG = sq.SimQATConfig(backend="tflite")
REFUSED = {
    "conv 3d": "Conv_0: TFLite convolves over one or two axes",
}
FLOAT_PARTS = ("preprocessing",)
TRAINING = ("batch norm train", "dropout train")


def interpreter(path):
    return Interpreter(str(path), num_threads=1)


def run(runtime, arrays):
    """Run on arrays of any batch size."""
    inputs = runtime.get_input_details()
    for detail, x in zip(inputs, arrays, strict=True):
        runtime.resize_tensor_input(detail["index"], x.shape, strict=True)
    runtime.allocate_tensors()
    for detail, x in zip(inputs, arrays, strict=True):
        runtime.set_tensor(detail["index"], x)
    runtime.invoke()
    return [runtime.get_tensor(detail["index"]) for detail in runtime.get_output_details()]


def signed(codes, grid):
    if grid is None:
        return np.asarray(codes)
    return (np.asarray(codes, np.int32) - (0 if grid.qmin < 0 else 128)).astype(np.int8)


def differences(model, runtime, codes):
    """Count the codes of LiteRT that are not the model's."""
    grids = [model.tensors[i].grid for i in model.inputs]
    got = run(runtime, [signed(c, g) for c, g in zip(codes, grids, strict=True)])
    want = jax.tree.leaves(model.run_codes(*codes))
    grids = [model.tensors[i].grid for i in model.outputs]
    assert [a.shape for a in want] == [b.shape for b in got]
    return sum(int((signed(a, g) != b).sum()) for a, b, g in zip(want, got, grids, strict=True))


IN_FILES = by_half((n for n in CASES if n not in (*TRAINING, *FLOAT_PARTS)), 1)
"""By day those that ONNX Runtime's tests leave to the night."""


@pytest.mark.parametrize("name", [p for p in IN_FILES if p.values[0] not in REFUSED])
def test_every_construct(name, tmp_path):
    model = converted(CASES[name], CONFIG)
    sq.export_tflite(model, tmp_path / "m.tflite", integer_io=True)
    runtime = interpreter(tmp_path / "m.tflite")
    for batch in (1, 5):
        assert differences(model, runtime, random_codes(model, batch)) == 0


@pytest.mark.parametrize("name", FLOAT_PARTS)
def test_float_parts_are_written(name, tmp_path):
    model, path = converted(CASES[name], CONFIG), tmp_path / "m.tflite"
    sq.export_tflite(model, path)
    found = sq.verify(model, path, *CASES[name].args)
    assert found.differing == 0 and found.largest_difference < 1e-6
    assert found.codes + found.values > 0 and found.float_parts


class Residual(nn.Module):
    """What residual networks are made of, the stem with a padded max pooling."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (7, 7), 2)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        x = nn.relu(x + nn.Conv(8, (3, 3))(x))
        x = nn.relu6(nn.Conv(8, (3, 3), 2, ((1, 1), (1, 1)), feature_group_count=8)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@pytest.mark.versions
@pytest.mark.parametrize("integer_io", [False, True])
def test_xnnpack_takes_the_whole_graph_as_one(integer_io, tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    model = converted(Case(Residual(), (x,), 0, 0), CONFIG)
    sq.export_tflite(model, tmp_path / "m.tflite", integer_io=integer_io)
    runtime = interpreter(tmp_path / "m.tflite")
    runtime.allocate_tensors()
    ops = runtime._get_ops_details()
    (whole,) = [op for op in ops if op["op_name"] == "DELEGATE"]
    between = {i for op in ops if op is not whole for i in op["outputs"]}
    assert not between & set(whole["inputs"])
    assert list(whole["outputs"]) == [d["index"] for d in runtime.get_output_details()]
    if integer_io:
        assert differences(model, runtime, random_codes(model, 2)) == 0
    else:
        np.testing.assert_array_equal(run(runtime, [np.asarray(x)])[0], model(x))


def test_a_kernel_of_one_range_has_one_scale(tmp_path):
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    config = dataclasses.replace(CONFIG, weight=sq.QuantSpec.weight(per_channel=False))
    path = tmp_path / "m.tflite"
    model = converted(Case(Residual(), (x,), 0, 0), config)
    sq.export_tflite(model, path, integer_io=True)
    runtime = interpreter(path)
    runtime.allocate_tensors()
    assert [op["op_name"] for op in runtime._get_ops_details()][-1] == "DELEGATE"
    assert differences(model, runtime, random_codes(model, 20)) == 0
    graphs = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0).subgraphs or []
    quantized = [t.quantization for t in graphs[0].tensors or () if t.quantization]
    assert {len(q.scale) for q in quantized if q.scale is not None} == {1}
    without = converted(Case(Residual(), (x,), 0, 0), CONFIG)
    sq.export_tflite(without, tmp_path / "channels.tflite", integer_io=True)
    assert path.stat().st_size < (tmp_path / "channels.tflite").stat().st_size


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[name]):
        sq.export_tflite(converted(CASES[name], CONFIG), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


@pytest.mark.versions
def test_float_inputs_and_outputs_by_default(tmp_path):
    model = converted(CASES["residual"], CONFIG)
    sq.export_tflite(model, tmp_path / "m.tflite")
    runtime = interpreter(tmp_path / "m.tflite")
    (detail,) = runtime.get_input_details()
    assert list(detail["shape_signature"]) == [-1, 8, 8, 4]
    assert list(detail["shape"]) == [1, 8, 8, 4]
    grid = grid_of(model.tensors[model.inputs[0]])
    codes = np.arange(grid.qmin, grid.qmax) + 0.5 - grid.zero_point  # in the middle of two codes
    middle = np.resize((codes * np.float32(grid.scale)).astype(np.float32), (3, 8, 8, 4))
    beside = [np.nextafter(middle, np.float32(end)) for end in (-9, 9)]
    x = np.concatenate([middle, *beside, 100 * middle])
    (got,) = run(runtime, [x])
    np.testing.assert_array_equal(got, model(x))


@pytest.mark.versions
def test_signature(tmp_path):
    model = converted(CASES["two heads"], CONFIG)
    sq.export_tflite(model, tmp_path / "m.tflite")
    signature = interpreter(tmp_path / "m.tflite").get_signature_runner("serving_default")
    x = np.asarray(CASES["two heads"].args[0])
    got, want = signature(input=x), jax.tree.leaves(model(x))
    for name, a in zip(("a", "b/0", "b/1"), want, strict=True):
        np.testing.assert_array_equal(got[name], a)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [3, 8])
def test_narrow_widths(num_bits, symmetric, tmp_path):
    spec = sq.QuantSpec(num_bits=num_bits, symmetric=symmetric)
    model = converted(CASES["residual"], sq.SimQATConfig(backend="tflite", activation=spec))
    sq.export_tflite(model, tmp_path / "i.tflite", integer_io=True)
    codes = random_codes(model, 3)
    assert differences(model, interpreter(tmp_path / "i.tflite"), codes) == 0
    sq.export_tflite(model, tmp_path / "f.tflite")
    x = 3 * np.asarray(CASES["residual"].args[0])
    np.testing.assert_array_equal(run(interpreter(tmp_path / "f.tflite"), [x])[0], model(x))


# The ends of a file -------------------------------------------------------------------------------


def test_every_tensor_as_an_output(tmp_path):
    """Inputs, constants and repeated tensors too."""
    model = converted(CASES["constant per channel"], CONFIG)
    outputs = (*range(len(model.tensors)), len(model.tensors) - 1)
    structure = list(range(len(outputs)))
    program = dataclasses.replace(model.program, outputs=outputs, structure=structure)
    model = sq.IntegerModel(program)
    sq.export_tflite(model, tmp_path / "m.tflite", integer_io=True)
    assert differences(model, interpreter(tmp_path / "m.tflite"), random_codes(model, 3)) == 0


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "grids"),
    [
        ("add", ((0.1, 0), (2e5, 0), (0.1, 0))),
        ("mul", ((0.1, 0), (1e4, 0), (0.1, 0))),
        ("mul", ((0.1, 0), (1e-5, 0), (0.1, 0))),
    ],
)
def test_scales_that_differ_too_much(kind, grids, tmp_path):
    fields = {"multipliers": [1, 1, 1]} if kind == "add" else {}
    arrays = {} if kind == "add" else {"multiplier": np.float32(0.1) * grids[1][0] / grids[2][0]}
    model = single("tflite", kind, grids, fields, arrays)
    with pytest.raises(ValueError, match=r"layer: .* times its output's"):
        sq.export_tflite(model, tmp_path / "m.tflite")


def test_additions_of_another_runtime(tmp_path):
    model = converted(CASES["residual"], sq.SimQATConfig(backend="onnx"))
    with pytest.raises(ValueError, match=r'add: .*ONNX Runtime.*backend="tflite"'):
        sq.export_tflite(model, tmp_path / "m.tflite")


@pytest.mark.parametrize("role", ["activation", "weight"])
def test_more_than_8_bits(role, tmp_path):
    wide = sq.SimQATConfig(backend="tflite", **{role: sq.QuantSpec(num_bits=12, symmetric=True)})
    with pytest.raises(ValueError, match=rf"(?s)more than 8 bits: Dense_1.*{role}=.*num_bits=8"):
        sq.export_tflite(converted(CASES["relu"], wide), tmp_path / "m.tflite")


def test_without_the_extra(tmp_path, monkeypatch):
    model = converted(CASES["relu"], CONFIG)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"simqat-jax\[export\]"):
        sq.export_tflite(model, tmp_path / "m.tflite")


def test_an_interrupted_export_leaves_no_file(tmp_path, monkeypatch):
    grid = (0.1, 0)
    model = single("tflite", "clip", (grid, grid), {})

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    imported = tflite.import_extra
    monkeypatch.setattr(
        tflite,
        "import_extra",
        lambda name: Interrupted() if name == "flatbuffers" else imported(name),
    )
    with pytest.raises(KeyboardInterrupt):
        sq.export_tflite(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        monkeypatch.undo()
        sq.export_tflite(model, tmp_path / "missing" / "m.tflite")


def test_a_kernel_that_is_read_again_is_held_once(tmp_path):
    def call(x):
        dense = nn.Dense(256, use_bias=False)
        return dense(dense(x))

    x = jax.random.normal(jax.random.key(0), (2, 256))
    qmodel, variables, _ = observed(Model(call), x, config=CONFIG)
    model = sq.convert(qmodel, variables, x)
    sq.export_tflite(model, tmp_path / "m.tflite")
    assert 256**2 < (tmp_path / "m.tflite").stat().st_size < 1.5 * 256**2
    assert sq.verify(model, tmp_path / "m.tflite", x).differing == 0
