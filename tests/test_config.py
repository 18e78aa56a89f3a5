"""Every wrong value of every field is refused at construction, and named."""

import copy
import dataclasses
import inspect
import pickle
import re

import pytest

import simqat_jax as sq


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("num_bits", 1, ValueError),
        ("num_bits", 17, ValueError),
        ("num_bits", True, TypeError),
        ("num_bits", 8.0, TypeError),
        ("num_bits", "8", TypeError),
        ("symmetric", 1, TypeError),
        ("symmetric", None, TypeError),
        ("per_channel", 0, TypeError),
        ("narrow_range", "yes", TypeError),
        ("observer", "mean", ValueError),
        ("observer", None, TypeError),
        ("ema_decay", 1.0, ValueError),
        ("ema_decay", -0.1, ValueError),
        ("ema_decay", float("nan"), ValueError),
        ("ema_decay", 1, TypeError),
        ("ema_decay", True, TypeError),
        ("percentile", 50.0, ValueError),
        ("percentile", 100.5, ValueError),
        ("percentile", float("nan"), ValueError),
        ("percentile", 99, TypeError),
        ("quant_delay", -1, ValueError),
        ("quant_delay", True, TypeError),
        ("quant_delay", 2.5, TypeError),
    ],
)
def test_spec_refuses(field, value, error):
    with pytest.raises(error, match=rf"QuantSpec\.{field}.*{value}"):
        sq.QuantSpec(**{field: value})


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("weight", None, TypeError),
        ("weight", {"num_bits": 8}, TypeError),
        ("weight", sq.QuantSpec(symmetric=False), ValueError),
        ("weight_bits", 1, ValueError),
        ("weight_bits", True, TypeError),
        ("activation_bits", 17, ValueError),
        ("activation_bits", 8.0, TypeError),
        ("activation", 8, TypeError),
        ("bn_fold", "three_conv", ValueError),
        ("bn_fold", True, TypeError),
        ("freeze_bn", -1, ValueError),
        ("freeze_bn", True, TypeError),
        ("freeze_bn", 1.5, TypeError),
        ("exclude", {"Dense_0"}, TypeError),
        ("exclude", "Dense_0", TypeError),
        ("exclude", ("",), ValueError),
        ("exclude", (3,), TypeError),
        ("rules", sq.Rule(), TypeError),
        ("rules", ({"path": "head"},), TypeError),
        ("strict", 1, TypeError),
    ],
)
def test_config_refuses(field, value, error):
    with pytest.raises(error, match=rf"SimQATConfig\.{field}"):
        sq.SimQATConfig(**{field: value})


@pytest.mark.parametrize("cls", [sq.QuantSpec, sq.SimQATConfig])
def test_unknown_keys_and_positions_are_refused(cls):
    with pytest.raises(TypeError, match="bits"):
        cls(bits=8)
    with pytest.raises(TypeError, match="positional"):
        cls(8)


@pytest.mark.parametrize("config", [sq.QuantSpec(), sq.SimQATConfig()])
def test_frozen_hashable_replaceable(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, getattr(config, field))
    assert hash(config) == hash(dataclasses.replace(config))
    assert config == dataclasses.replace(config)


@pytest.mark.parametrize("bits", range(2, 17))
def test_limits_of_the_grid(bits):
    def limits(**kwargs):
        spec = sq.QuantSpec(num_bits=bits, **kwargs)
        return spec.qmin, spec.qmax

    assert limits() == (0, 2**bits - 1)
    assert limits(narrow_range=True) == (1, 2**bits - 1)
    assert limits(symmetric=True) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert limits(symmetric=True, narrow_range=True) == (
        -(2 ** (bits - 1)) + 1,
        2 ** (bits - 1) - 1,
    )


def test_defaults():
    config = sq.SimQATConfig()
    weight, activation = config.weight, config.activation
    assert (weight.symmetric, weight.per_channel, weight.narrow_range) == (True, True, True)
    assert (activation.symmetric, activation.per_channel) == (False, False)
    assert (weight.num_bits, activation.num_bits, activation.ema_decay) == (8, 8, 0.99)
    assert config.strict and config.bn_fold == "one_conv" and config.freeze_bn is None


RULES = (
    sq.Rule(path="head", weight=sq.QuantSpec(num_bits=4, symmetric=True), bn_fold="none"),
    sq.Rule(op="add", quantize=False),
)


def test_lists_are_taken_as_tuples():
    config = sq.SimQATConfig(exclude=["head"], rules=list(RULES))
    assert config == sq.SimQATConfig(exclude=("head",), rules=RULES)
    assert hash(config) is not None


@pytest.mark.parametrize(
    "config",
    [
        sq.SimQATConfig(),
        sq.SimQATConfig(exclude=("a", "b/*"), rules=RULES, freeze_bn=3, backend="onnx"),
        sq.SimQATConfig(activation=sq.QuantSpec(ema_decay=0.5, quant_delay=7), strict=False),
    ],
)
def test_a_recipe_is_read_as_it_was_written(config):
    assert sq.SimQATConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("no", ValueError, "no JSON"),
        ("[]", ValueError, '"version": 1'),
        ("{}", ValueError, '"version": 1'),
        ('{"version": 2}', ValueError, '"version": 1'),
        (
            '{"version": 1, "weights": {}}',
            ValueError,
            "field 'weights', which no SimQATConfig has: 'weight' may",
        ),
        (
            '{"version": 1, "weight": {"bits": 4}}',
            ValueError,
            "the recipe's weight has a field 'bits', which no Q",
        ),
        (
            '{"version": 1, "rules": [{"paths": "a"}]}',
            ValueError,
            r"rules\[0\] has a field 'paths', which no Rule has: 'path'",
        ),
        ('{"version": 1, "rules": [3]}', ValueError, r"rules\[0\] must be a JSON object .*, got 3"),
        ('{"version": 1, "rules": {"path": "a"}}', ValueError, "rules must be a JSON list, got {"),
        (
            '{"version": 1, "rules": [{}, {"weight": {"num_bit": 4}}]}',
            ValueError,
            r"rules\[1\]\.weight has a field 'num_bit', which no QuantSpec has: 'num_bits' may",
        ),
        ('{"version": 1, "freeze_bn": "no"}', TypeError, "freeze_bn"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text, error, match):
    with pytest.raises(error, match=match):
        sq.SimQATConfig.from_json(text)


def test_a_dictionary_is_read_as_json_is():
    config = sq.SimQATConfig(rules=RULES, weight_bits=4)
    assert sq.SimQATConfig.from_dict(config.to_dict()) == config
    assert sq.SimQATConfig.from_dict({"weight_bits": 4, "bn_fold": "none"}) == sq.SimQATConfig(
        weight_bits=4, bn_fold="none"
    )
    with pytest.raises(ValueError, match="has version 2, and this version of the library reads 1"):
        sq.SimQATConfig.from_dict({"version": 2})
    with pytest.raises(TypeError, match=r"must be a dictionary, got '\{\}'"):
        sq.SimQATConfig.from_dict("{}")


def test_results_of_a_run_hold_a_recipe():
    config = sq.SimQATConfig(weight_bits=4)
    given = {"seed": 0, "history": {"qat": []}, "settings": {"quant": config.to_dict()}}
    assert sq.SimQATConfig.from_dict(given) == config
    given["other"] = sq.SimQATConfig().to_dict()
    with pytest.raises(ValueError, match=r"no recipe, but holds 2\. Pass one of them") as caught:
        sq.SimQATConfig.from_dict(given)
    (remedy,) = re.findall(r"SimQATConfig.*\)", str(caught.value))
    assert eval(f"sq.{remedy}") == config


def test_what_a_recipe_leaves_out_has_its_default():
    text = '{"version": 1, "rules": [{"path": "head", "quantize": false}]}'
    rules = (sq.Rule(path="head", quantize=False),)
    assert sq.SimQATConfig.from_json(text) == sq.SimQATConfig(rules=rules)


def test_what_a_spec_leaves_out_has_the_default_of_its_role():
    given = sq.QuantSpec(num_bits=2, symmetric=True)
    weight = sq.QuantSpec.weight(num_bits=2)
    assert (weight.per_channel, weight.narrow_range, weight.observer) == (True, True, "batch")
    assert sq.SimQATConfig(weight=given).weight == weight
    assert sq.Rule(weight=sq.QuantSpec(num_bits=2)).weight == weight
    assert sq.SimQATConfig(activation=given).activation == given
    assert sq.QuantSpec.activation(num_bits=2) == sq.QuantSpec(num_bits=2)
    for copied in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert sq.SimQATConfig(weight=copied).weight == weight
    text = '{"version": 1, "weight": {"num_bits": 2}, "rules": [{"weight": {"num_bits": 2}}]}'
    read = sq.SimQATConfig.from_json(text)
    assert read.weight == read.rules[0].weight == weight


@pytest.mark.parametrize("owner", [sq.SimQATConfig, sq.Rule])
def test_a_replaced_spec_that_lost_the_defaults_of_weights_is_told(owner):
    replaced = dataclasses.replace(sq.QuantSpec(symmetric=True), num_bits=2)
    with pytest.warns(UserWarning, match=r"QuantSpec\.weight\(num_bits=2\)") as caught:
        owner(weight=replaced)
    assert caught[0].filename == __file__
    remedy = dataclasses.replace(sq.QuantSpec.weight(num_bits=2), ema_decay=0.5)
    assert owner(weight=remedy).weight == remedy


@pytest.mark.parametrize("field", ["symmetric", "per_channel", "narrow_range", "observer"])
def test_what_a_spec_gives_stays(field):
    given = {"symmetric": True, "per_channel": False, "narrow_range": False, "observer": "ema"}
    spec = sq.SimQATConfig(weight=sq.QuantSpec(**{field: given[field]})).weight
    assert dataclasses.replace(sq.QuantSpec.weight(), **{field: given[field]}) == spec
    assert sq.SimQATConfig.from_json(sq.SimQATConfig(weight=spec).to_json()).weight == spec
    assert dataclasses.replace(sq.SimQATConfig(weight=spec), strict=False).weight == spec


def test_widths_in_short():
    config = sq.SimQATConfig(weight_bits=4, activation_bits=6)
    assert config.weight == sq.QuantSpec.weight(num_bits=4)
    assert config.activation == sq.QuantSpec.activation(num_bits=6)
    assert config == sq.SimQATConfig.from_json(config.to_json())
    learned = sq.SimQATConfig(weight=sq.QuantSpec(observer="learned"), weight_bits=4).weight
    assert learned == sq.QuantSpec.weight(observer="learned", num_bits=4)
    assert dataclasses.replace(config, weight_bits=2).weight.num_bits == 2
    assert dataclasses.replace(config, strict=False).weight.num_bits == 4


@pytest.mark.parametrize("owner", [sq.SimQATConfig, sq.Rule])
def test_the_error_of_an_asymmetric_weight_proposes_one_that_works(owner):
    wrong = sq.QuantSpec(num_bits=4, symmetric=False, ema_decay=0.5)
    with pytest.raises(ValueError, match="symmetric") as caught:
        owner(weight=wrong)
    (proposed,) = re.findall(r"Write (QuantSpec\.weight\(.*?\)),", str(caught.value))
    assert proposed == "QuantSpec.weight(num_bits=4, ema_decay=0.5)"
    assert owner(weight=eval(f"sq.{proposed}")).weight.num_bits == 4


def test_what_was_meant_by_a_single_path():
    with pytest.raises(TypeError, match=r"Write exclude=\['Dense_0'\]"):
        sq.SimQATConfig(exclude="Dense_0")
    with pytest.raises(TypeError, match=r"Write rules=\[Rule\(\.\.\.\)\]"):
        sq.SimQATConfig(rules=sq.Rule())


@pytest.mark.parametrize("owner", [sq.QuantSpec, sq.Rule, sq.SimQATConfig])
def test_help_documents_every_field(owner):
    section = str(inspect.getdoc(owner)).split("Attributes:")[1].split("Raises:")[0]
    documented = re.findall(r"^  (\w+): ", section, re.M)
    assert documented == list(inspect.signature(owner).parameters)
