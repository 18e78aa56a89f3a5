"""Recipes, rules and settings as the command line gives them."""

import json
from pathlib import Path

import pytest
import tyro

import simqat_jax as sq
from experiments import configs, job, quantization, runs, train
from experiments.errors import ExperimentError

CONFIG = sq.SimQATConfig(weight_bits=4, rules=[sq.Rule(path="stem", quantize=False)])
HEAD = {"path": "head", "weight": {"num_bits": 8}}


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    with pytest.raises(ExperimentError, match=r"--recipe .*recipe.json cannot be read: No such"):
        quantization.read_recipe(path)
    for text, message in (
        ("{", "no JSON|Expecting property"),
        ("[3]", '"version": 1'),
        ('{"settings": 3}', '"version": 1'),
        ('{"version": 1, "weight": 3}', "QuantSpec"),
        ('{"settings": {"quant": {"weights": 3}}}', "'weight' may be meant"),
    ):
        path.write_text(text)
        with pytest.raises(ExperimentError, match=rf"--recipe .*recipe.json: .*({message})"):
            quantization.read_recipe(path)


def test_a_run_is_a_recipe(tmp_path: Path) -> None:
    experiment = configs.get("lenet5_mnist", quant=CONFIG)
    runs.write_results(tmp_path, experiment, {})
    runs.write_json(tmp_path / "config.json", experiment.settings())
    (tmp_path / "recipe.json").write_text(CONFIG.to_json())
    for name in ("results.json", "config.json", "recipe.json"):
        assert quantization.read_recipe(tmp_path / name) == CONFIG


@pytest.mark.parametrize("content", [[HEAD], {"rules": [HEAD]}, {"version": 1, "rules": [HEAD]}])
@pytest.mark.parametrize("in_file", [False, True])
def test_rules_take_the_place_of_others(content: object, in_file: bool, tmp_path: Path) -> None:
    given = json.dumps(content)
    if in_file:
        (tmp_path / "rules.json").write_text(given)
        given = str(tmp_path / "rules.json")
    found = quantization.with_rules(CONFIG, given)
    assert found == sq.SimQATConfig(
        weight_bits=4, rules=[sq.Rule(path="head", weight=sq.QuantSpec(num_bits=8))]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("rules.json", "--rules rules.json cannot be read: No such file"),
        ("[{]", "--rules: Expecting"),
        ('[{"pat": "head"}]', r"--rules: rules\[0\] has a field 'pat', .*'path' may be meant"),
        ('{"path": "head"}', "--rules: it holds no rules. Write a list of them"),
        ('["head"]', r"--rules: rules\[0\] must be a JSON object"),
    ],
)
def test_what_holds_no_rules(given: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        quantization.with_rules(CONFIG, given)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["weight_bits=2"], sq.SimQATConfig(weight_bits=2)),
        (["weight.num_bits=2", "bn_fold=none"], sq.SimQATConfig(weight_bits=2, bn_fold="none")),
        (["freeze_bn=7", "strict=False", "freeze_bn=None"], sq.SimQATConfig(strict=False)),
        (['exclude=["a", "b/*"]'], sq.SimQATConfig(exclude=["a", "b/*"])),
        (
            ["activation.observer=fixed", "activation.range=[0, 6]"],
            sq.SimQATConfig(activation=sq.QuantSpec(observer="fixed", range=(0, 6))),
        ),
        (['rules=[{"path": "a", "quantize": false}]'], sq.SimQATConfig(exclude=["a"])),
    ],
)
def test_settings_replace_fields(given: list[str], wanted: sq.SimQATConfig) -> None:
    found = quantization.with_settings(sq.SimQATConfig(), given)
    assert found.decisions == wanted.decisions
    for field in ("weight", "activation", "bn_fold", "freeze_bn", "strict"):
        assert getattr(found, field) == getattr(wanted, field)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("weight_bits", "--set takes FIELD=VALUE, .* got 'weight_bits'"),
        ("bn_fold.x=1", "--set takes FIELD=VALUE, .* got 'bn_fold.x=1'"),
        ("weigth_bits=4", "--set weigth_bits=4: .*'weight_bits' may be meant"),
        ("weight.bits=4", "--set weight.bits=4: the recipe's weight has a field 'bits'"),
        ("weight_bits=many", "--set weight_bits=many: SimQATConfig.weight_bits must be a number"),
        ("exclude=head", r"--set exclude=head: .* Write exclude=\['head'\]"),
        ("bn_fold=three", "--set bn_fold=three: SimQATConfig.bn_fold"),
    ],
)
def test_settings_that_are_none(given: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        quantization.with_settings(sq.SimQATConfig(), [given])


def test_the_command_line_takes_them_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(CONFIG.to_json())
    arguments = tyro.cli(
        train.Arguments,
        args=[
            *("--config", "lenet5_mnist", "--recipe", str(tmp_path / "recipe.json")),
            *("--rules", json.dumps([HEAD]), "--set", "weight_bits=3", "--set", "freeze_bn=9"),
        ],
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert job.chosen_quantization(arguments) == sq.SimQATConfig(
        weight_bits=3, freeze_bn=9, rules=[sq.Rule(path="head", weight=sq.QuantSpec(num_bits=8))]
    )
