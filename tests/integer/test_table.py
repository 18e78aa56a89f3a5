"""The integer model as a user reads it, copies it and compares it."""

import copy
import dataclasses
import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import KEY, observed

import simqat_jax as sq

X = jax.random.normal(KEY, (4, 8, 8, 3))


class Net(nn.Module):
    """Layers, a float part, and a path that is long."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="a_layer_whose_name_is_long_as_some_are")(x))
        return jnp.cumsum(nn.Dense(6)(x.mean((1, 2))), 1)


@pytest.fixture(scope="module")
def qmodel_and_variables():
    qmodel, variables, _ = observed(Net(), X, config=sq.SimQATConfig(weight_bits=4))
    return qmodel, variables


@pytest.fixture(scope="module")
def model(qmodel_and_variables):
    return sq.convert(*qmodel_and_variables, X)


def test_a_row_an_operation_of_80_columns(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(model).splitlines()
    assert max(map(len, lines)) <= 80
    starts = [line for line in lines if not line.startswith(" ")]  # a row may take several lines
    assert len(starts) == 1 + 1 + len(model.ops) + 2
    (conv,) = (line for line in lines if " conv " in line)
    assert conv.startswith("a_lay") and "4 bits" in conv
    assert "(float)" in str(model)
    for tensor in (model.tensors[op.outputs[0]] for op in model.ops):
        grid = tensor.grid
        if grid is not None:
            ends = [(q - int(grid.zero_point)) * grid.scale for q in (grid.qmin, grid.qmax)]
            assert f"[{ends[0]:.3g}, {ends[1]:.3g}]" in str(model)  # no range is cut
    assert lines[-1] == "float: cumsum."
    monkeypatch.setenv("COLUMNS", "160")
    assert "a_layer_whose_name_is_long_as_some_are" in str(model)


def test_details_have_it_all(model):
    text = model.details()
    grid = model.tensors[model.inputs[0]].grid
    assert f"scale {grid.scale:.9g}" in " ".join(text.split())
    assert "kernel: (3, 3, 3, 4), int8, 4 bits an element" in text


def test_one_line_that_says_what_it_is(model):
    assert repr(model).startswith(f"IntegerModel({len(model.ops)} operations, 1 of them in float;")
    assert "\n" not in repr(model)


def test_notebooks(model):
    text = model._repr_html_()
    assert text.count("rgba(") == 1 and text.count("<tr>") == len(model.ops) + 1


def test_dictionaries_are_json(model):
    read = json.loads(json.dumps(model.to_dict()))
    assert [op["kind"] for op in read["ops"]] == [op.kind for op in model.ops]
    assert [op["float"] for op in read["ops"]] == [
        op in model.program.float_ops for op in model.ops
    ]
    kernel = read["ops"][0]["arrays"]["kernel"]
    assert kernel == {"shape": [3, 3, 3, 4], "dtype": "int8", "num_bits": 4}
    grid = model.tensors[model.inputs[0]].grid
    assert read["tensors"][model.inputs[0]]["grid"]["scale"] == grid.scale


def test_copies_are_equal_and_compute_the_same(model):
    want = np.asarray(model(X))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied == model and hash(copied) == hash(model)
        np.testing.assert_array_equal(copied(X), want)


def test_another_model_is_not_equal(model, qmodel_and_variables):
    qmodel, variables = qmodel_and_variables
    assert model == sq.convert(qmodel, variables, X)
    assert model != sq.convert(qmodel, variables, X, backend="onnx")
    assert model != "model"
    op = model.ops[0]
    kernel = op.arrays["kernel"].copy()
    kernel[0, 0, 0, 0] ^= 1
    changed = dataclasses.replace(op, arrays={**op.arrays, "kernel": kernel})
    program = dataclasses.replace(model.program, ops=(changed, *model.ops[1:]))
    assert model != sq.IntegerModel(program)
