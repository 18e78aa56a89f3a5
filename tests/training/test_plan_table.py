"""The plan as a user reads it."""

import copy
import json
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import TwoLayers, initialized, step

import simqat_jax as sq
from experiments.models import LeNet5


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (16, 5))


def test_plan_of_lenet5():
    x = jnp.ones((2, 32, 32, 1))
    qmodel, variables = initialized(LeNet5(), x)
    plan = qmodel.plan(variables, x, train=False)
    outputs = [row.output.name for row in plan.rows if row.output]
    weights = [row.weight.name for row in plan.rows if row.weight]
    layers = ["Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2"]
    assert outputs == [f"{name}/output" for name in layers]
    assert weights == [f"{name}/kernel" for name in layers]
    assert set(plan.quantizers) == {"input", *outputs, *weights}
    assert not plan.floats
    notes = [(row.op, row.note) for row in plan.rows if row.note]
    assert notes == [
        ("max_pool", "on the grid of Conv_0/output"),
        ("max_pool", "on the grid of Conv_1/output"),
        ("reshape", "on the grid of Conv_1/output"),
    ]
    kernel = plan.quantizers["Conv_1/kernel"]
    assert (kernel.channel_axis, kernel.num_channels) == (-1, 16)
    assert plan.quantizers["input"].num_channels is None
    details = plan.details()
    for part in (
        "Conv(features=6, kernel_size=(5, 5), padding=VALID, use_bias=False) + relu",
        "8 bits, symmetric, narrow, per channel (axis -1, 16), batch",
        "8 bits, asymmetric, per tensor, ema 0.99",
    ):
        assert part in details
    assert "training steps so far: 0" in str(plan)


def test_plan_shows_ranges_delays_and_what_stays_float(x):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            x = jax.lax.cumsum(x, 1)
            return nn.softmax(nn.Dense(3)(x))

    spec = sq.QuantSpec(quant_delay=7)
    qmodel, variables = initialized(Mixed(), x, activation=spec, exclude=("Dense_1",))
    _, variables = step(qmodel, variables, x)
    plan = qmodel.plan(variables, x)
    assert plan.quantizers["input"].lo == float(x.min())
    reasons = dict(plan.floats)
    assert reasons["cumsum"].startswith("float: no integer form")
    assert "excluded" in reasons["Dense_1/dot_general"]
    assert "activations quantizes from step 7" in str(plan)
    assert "training steps so far: 1" in str(plan)


def test_plan_computes_nothing_and_takes_shapes(x):
    qmodel, variables = initialized(TwoLayers(), x)
    shapes = jax.eval_shape(lambda v: v, variables)
    plan = qmodel.plan(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert plan.details().count("Dense(") == 2


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="a_layer_with_a_name_that_is_as_long_as_some_of_them_are")(x)
        x = TwoLayers(name="block")(x)
        return jax.lax.cumsum(nn.relu(x), 1)


@pytest.fixture
def plan(x):
    rules = [sq.Rule(path="block", weight=sq.QuantSpec(num_bits=4, per_channel=False))]
    qmodel, variables = initialized(Mixed(), x, rules=rules)
    _, variables = step(qmodel, variables, x)
    return qmodel.plan(variables, x)


def test_a_row_an_operation_of_80_columns(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(plan).splitlines()
    assert max(map(len, lines)) <= 80
    titles = next(i for i, line in enumerate(lines) if line.startswith("layer"))
    table = lines[titles + 1 : titles + 2 + len(plan.rows)]
    assert table[0].startswith("input") and table[-1].startswith("cumsum")
    assert table[1].startswith("a_lay") and "_are  Dense 4" in table[1]
    for q in plan.quantizers.values():
        assert q.role == "weight" or q.limits in str(plan)  # no range is cut
    assert " 8 bits* " in table[1]  # the one kernel of three that has ranges by channel
    assert " 4 bits " in table[2] and table[2].endswith("rules[0]")
    assert "* not as most are" in str(plan)
    monkeypatch.setenv("COLUMNS", "200")
    assert "a_layer_with_a_name_that_is_as_long_as_some_of_them_are" in str(plan)


def test_details_of_some_operations(plan):
    text = plan.details("block")
    assert text.startswith("block/Dense_0") and "cumsum" not in text
    assert "4 bits, symmetric, narrow, per tensor, batch" in text and "decided by rules[0]" in text
    with pytest.raises(ValueError, match="no operation has a path like 'blok'"):
        plan.details("blok")


class Sums(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(5)(x)
        return nn.Dense(5)(x + y) + (x + y) * 0.5


def test_rows_have_the_names_that_rules_take(x):
    qmodel, variables = initialized(Sums(), x)
    names = [row.path for row in qmodel.plan(variables, x).rows if row.output]
    assert {"add", "add_1"} < set(names) and len(set(names)) == len(names)
    for name in names:
        rules = (sq.Rule(path=name, activation_bits=6),)
        changed = initialized(Sums(), x, rules=rules)[0].plan(variables, x)
        assert [r.path for r in changed.rows if r.output and r.output.spec.num_bits == 6] == [name]
        assert changed.details(name).splitlines()[0] == name


def test_notebooks(plan):
    text = plan._repr_html_()
    assert "<b>block</b> (2 operations)" in text and text.count("rgba(") == len(plan.floats) == 1


def test_copies_are_equal_and_one_line_says_what_it_is(plan, x):
    assert copy.deepcopy(plan) == plan == pickle.loads(pickle.dumps(plan))
    qmodel, variables = initialized(Mixed(), x)
    assert plan != qmodel.plan(variables, x)
    assert repr(plan) == f"Plan({len(plan.rows)} operations, 1 of them float; 7 quantizers)"


def test_dictionaries_are_json(plan):
    read = json.loads(json.dumps(plan.to_dict()))
    assert [row["path"] for row in read["rows"]] == [row.path for row in plan.rows]
    weight = read["quantizers"][read["rows"][1]["weight"]]
    assert weight["spec"]["num_bits"] == 4 and read["steps"] == 1
