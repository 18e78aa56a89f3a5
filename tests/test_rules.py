"""Which operations a rule is about."""

import dataclasses

import pytest

import simqat_jax as sq
from simqat_jax.rules import deciding, left_out

WEIGHT = sq.QuantSpec(num_bits=4, symmetric=True)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*", "", True),
        ("*", "Dense_0", True),
        ("Dense_0", "Dense_0", True),
        ("Dense_0", "Dense_01", False),
        ("encoder", "encoder/Block_0/Dense_0", True),
        ("encoder/*/Dense_0", "encoder/Block_0/Dense_0", True),
        ("encoder/*/Dense_0", "encoder/Dense_0", False),
        ("Block_0/add_1", "Block_0/add_1", True),
        ("Block_0/add_1", "Block_0/add", False),
        ("dense_0", "Dense_0", False),
        ("re:Block_[01]", "Block_1/Conv_0", True),
        ("re:Block_[01]", "Block_10/Conv_0", False),
        ("re:.*/Conv_0", "Block_10/Conv_0", True),
        ("re:Conv_0", "Block_10/Conv_0", False),
        ("layers/0", "layers/0/Dense_0", True),
        ("layers/1", "layers/0/Dense_0", False),
        ("layers/Dense_0", "layers/0/Dense_0", True),
    ],
)
def test_paths(pattern, path, matches):
    assert sq.Rule(path=pattern).matches(path.split("/") if path else []) == matches


def test_the_first_that_matches_decides():
    rules = (sq.Rule(path="a/b"), sq.Rule(path="a", quantize=False), sq.Rule())
    assert [deciding(rules, p.split("/"), "conv") for p in ("a/b", "a/c", "c")] == [0, 1, 2]
    assert [left_out(rules, p.split("/"), "conv") for p in ("a/b", "a/c", "c")] == [None, 1, None]
    assert deciding((), ("a",), "conv") is None


def test_a_rule_for_a_kind_leaves_a_module_undecided():
    rules = (sq.Rule(op="conv"), sq.Rule(quantize=False))
    assert [deciding(rules, ("a",), kind) for kind in ("conv", "add", None)] == [0, 1, None]


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"path": ""}, ValueError, "'head/\\*'"),
        ({"path": "re:"}, ValueError, "'head/\\*'"),
        ({"path": "re:("}, ValueError, "no regular expression"),
        ({"path": None}, TypeError, "path"),
        ({"op": "convolution"}, ValueError, "'conv'"),
        ({"op": 3}, TypeError, "op"),
        ({"bn_fold": "two"}, ValueError, "two_conv"),
        ({"weight": 4}, TypeError, "weight"),
        ({"weight": sq.QuantSpec(symmetric=False)}, ValueError, "symmetric"),
        ({"activation": 8}, TypeError, "activation"),
        ({"quantize": 0}, TypeError, "quantize"),
        ({"quantize": False, "weight": WEIGHT}, ValueError, "weight"),
        ({"quantize": False, "bn_fold": "none"}, ValueError, "bn_fold"),
        ({"quantize": False, "weight_bits": 4}, ValueError, "weight"),
        ({"weight": WEIGHT, "weight_bits": 4}, ValueError, "both weight and weight_bits"),
        ({"activation": sq.QuantSpec(), "activation_bits": 4}, ValueError, "Give one of them"),
        ({"weight_bits": 17}, ValueError, "Rule.weight_bits must be a number of bits, 2 to 16"),
        ({"activation_bits": 4.0}, TypeError, "Rule.activation_bits must be a number of bits"),
    ],
)
def test_a_rule_refuses(fields, error, match):
    with pytest.raises(error, match=match):
        sq.Rule(**fields)


def test_widths_in_short():
    rule = sq.Rule(path="head", weight_bits=4, activation_bits=6)
    specs = sq.QuantSpec.weight(num_bits=4), sq.QuantSpec.activation(num_bits=6)
    assert rule == sq.Rule(path="head", weight=specs[0], activation=specs[1])
    config = sq.SimQATConfig(rules=[rule, sq.Rule(weight_bits=2)])
    assert sq.SimQATConfig.from_json(config.to_json()) == config
    assert config.rules[1].parts == ("weight",)
    assert dataclasses.replace(rule, path="tail").weight == specs[0]
