"""Rules reach what they are about, in the plan, in training and in both files."""

import inspect
import re
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.rules import Kind
from simqat_jax.training.plan_table import Row

W4 = sq.QuantSpec(num_bits=4, symmetric=True, per_channel=True, narrow_range=True, observer="batch")
A4 = sq.QuantSpec(num_bits=4)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 3)), jnp.float32)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(not train)(nn.Conv(4, (3, 3))(x)))
        x = x + y
        return x + nn.Conv(4, (3, 3))(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = Block()(Block()(x, train), train)
        x = nn.Dense(4)(x.mean((1, 2)))
        return nn.Dense(3)(nn.softmax(x))


def planned(*rules, **config):
    qmodel = sq.SimQAT(sq.SimQATConfig(rules=rules, **config)).apply(Net())
    variables = qmodel.init(jax.random.key(0), X)
    return qmodel, variables, qmodel.plan(variables, X)


def bits(plan, role):
    return {q.name: q.spec.num_bits for q in plan.quantizers.values() if q.role == role}


DEFAULTS = planned()[2]


def test_widths_of_kernels_and_results():
    rules = (
        sq.Rule(path="Block_*", op="conv", weight=W4),
        sq.Rule(path="Block_1/add_1", activation=A4),
        sq.Rule(op="input", activation=sq.QuantSpec(observer="minmax")),
        sq.Rule(path="Dense_1", activation=sq.QuantSpec(num_bits=16)),
    )
    plan = planned(*rules)[2]
    assert plan.quantizers.keys() == DEFAULTS.quantizers.keys()
    for name, width in bits(plan, "weight").items():
        assert width == (4 if name.startswith("Block") else 8)
    changed = {n: b for n, b in bits(plan, "activation").items() if b != 8}
    assert changed == {"Block_1/add_1/output": 4, "Dense_1/output": 16}
    assert plan.quantizers["input"].spec.observer == "minmax"
    rows = {row.path: row.rule for row in plan.rows}
    assert rows["Block_0/Conv_0"] == "rules[0]" and rows["Conv_0"] == ""
    assert "decided by" in str(plan) and "decided by" not in str(DEFAULTS)


def test_a_fold_mode_for_some_layers():
    rows = {r.path: r.note for r in planned(sq.Rule(path="Block_1", bn_fold="none"))[2].rows}
    assert rows["Block_0/Conv_0"] == "BatchNorm folded: one_conv"
    assert rows["Block_1/Conv_0"] == "BatchNorm folded: none"


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (sq.Rule(path="Block_0/Conv_0", quantize=False), "Block_0/Conv_0/kernel"),
        (sq.Rule(path="Block_1", op="conv", quantize=False), "Block_1/Conv_1/kernel"),
        (sq.Rule(op="softmax", quantize=False), None),
        (sq.Rule(path="Block_0/add", quantize=False), None),
    ],
)
def test_float_islands(rule, gone):
    plan = planned(rule)[2]
    assert any("excluded" in note for _, note in plan.floats)
    assert gone is None or gone in DEFAULTS.quantizers.keys() - plan.quantizers.keys()
    # What is behind keeps its name, though it is the first quantized sum of the block now.
    assert "Block_0/add_1/output" in plan.quantizers


def test_an_earlier_rule_for_a_kind_keeps_it_out_of_a_float_module():
    rules = sq.Rule(path="Block_0", op="conv"), sq.Rule(path="Block_0", quantize=False)
    plan = planned(*rules)[2]
    assert {"Block_0/Conv_0/kernel", "Block_0/Conv_1/kernel"} <= plan.quantizers.keys()
    floats = {path for path, note in plan.floats if "excluded" in note}
    assert floats == {"Block_0/add", "Block_0/add_1"}


def test_exclude_is_a_rule_in_front():
    config = {"exclude": ["Block_1"]}
    plan = planned(sq.Rule(path="Block_*", weight=W4), **config)[2]
    assert "Block_1/Conv_0/kernel" not in plan.quantizers
    assert {row.rule for row in plan.rows if row.path.startswith("Block_1/")} == {"exclude[0]"}
    with pytest.raises(ValueError, match=r"takes Rule\(path='Block_1/add_1', quantize=False\)"):
        planned(exclude=["Block_1/add_1"])


def test_files_of_a_model_with_rules(tmp_path):
    rules = (
        sq.Rule(path="Block_0", op="conv", weight=W4, activation=A4),
        sq.Rule(path="Block_1", op="conv", bn_fold="two_conv"),
        sq.Rule(op="input", activation=sq.QuantSpec(observer="minmax")),
        sq.Rule(path="re:Block_1/add(_1)?", activation=sq.QuantSpec(num_bits=6)),
    )
    qmodel, variables, _ = planned(*rules)
    step = jax.jit(lambda v: qmodel.apply(v, X, True, mutable=["quant_stats", "batch_stats"])[1])
    for _ in range(3):
        variables = {**variables, **step(variables)}
    simulated = qmodel.apply(variables, X)
    for backend, export in (("onnx", sq.export_onnx), ("tflite", sq.export_tflite)):
        model = sq.convert(qmodel, variables, X, backend=backend)
        if backend == "tflite":
            np.testing.assert_array_equal(model(X), simulated)
        path = tmp_path / f"model.{backend}"
        export(model, path)
        assert sq.verify(model, path, X).differing == 0


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ([sq.Rule(path="Blok_0/*", weight=W4)], r"rules\[0\].*decides nothing.*'Block_0"),
        (
            [sq.Rule(path="Block_0"), sq.Rule(path="Block_0/Conv_0", weight=W4)],
            r"rules\[1\].*Block_0/Conv_0, an earlier rule",
        ),
        ([sq.Rule(path="Dense_0", op="conv")], "other kinds: dense"),
        ([sq.Rule(path="Block_0", op="add", weight=W4)], "weight has no effect.*Block_0/add"),
        ([sq.Rule(path="Dense_0", bn_fold="none")], "bn_fold has no effect.*Dense_0"),
        ([sq.Rule(op="input", weight=W4)], "weight has no effect.*input"),
    ],
)
def test_a_rule_without_effect_is_an_error(rules, match):
    with pytest.raises(ValueError, match=match):
        planned(*rules)


def test_per_channel_activations_by_a_rule_are_not_converted():
    qmodel, variables, _ = planned(
        sq.Rule(path="Conv_0", activation=sq.QuantSpec(per_channel=True))
    )
    _, updates = qmodel.apply(variables, X, True, mutable=["quant_stats", "batch_stats"])
    with pytest.raises(ValueError, match="Conv_0/output"):
        sq.convert(qmodel, {**variables, **updates}, X)


def test_rules_know_every_kind_of_operation():
    """But for what only moves values or stays float."""
    documented = re.findall(r'"(\w+)"', str(inspect.getdoc(Row)).split("kind:")[1].split("op:")[0])
    assert {*documented, "input"} - {"clamp", "pass", "float"} == set(get_args(Kind))
