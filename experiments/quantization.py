"""How the SimQAT phases quantize, as the command line says it: a recipe, rules, single settings."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import simqat_jax as sq
from experiments.errors import ExperimentError

_WORDS = {"None": None, "True": True, "False": False}
"""As Python writes them; JSON has other words."""


def read_recipe(path: Path) -> sq.SimQATConfig:
    """Return the configuration that a file holds.

    Args:
      path: what `SimQATConfig.to_json` wrote, or the `config.json` or `results.json` of a run.

    Raises:
      ExperimentError: it cannot be read; it is no recipe of this version.
    """
    option = f"--recipe {path}"
    text = _read(path, option)
    try:
        content = json.loads(text)
        run = content.get("settings", content) if isinstance(content, dict) else {}
        if isinstance(run, dict) and isinstance(run.get("quant"), dict):
            return sq.SimQATConfig.from_dict(run["quant"])
        return sq.SimQATConfig.from_json(text)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{option}: {error}") from error


def with_rules(config: sq.SimQATConfig, given: str) -> sq.SimQATConfig:
    """Return a configuration with other rules.

    Args:
      config: whose rules are replaced.
      given: JSON, or the name of a file of it: a list of rules, each an object with the fields of
        `Rule`, or an object that has one under `rules`, such as a recipe.

    Raises:
      ExperimentError: it cannot be read; it holds no rules.
    """
    text, option = given, "--rules"
    if given.lstrip()[:1] not in ("[", "{"):
        option = f"--rules {given}"
        text = _read(Path(given), option)
    try:
        content = json.loads(text)
        rules = content.get("rules") if isinstance(content, dict) else content
        if rules is None:
            raise ValueError(
                'it holds no rules. Write a list of them: [{"path": "head", "weight": '
                '{"num_bits": 8}}]'
            )
        return sq.SimQATConfig.from_dict(config.to_dict() | {"rules": rules})
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{option}: {error}") from error


def with_settings(config: sq.SimQATConfig, given: Sequence[str]) -> sq.SimQATConfig:
    """Return a configuration with some of its fields replaced.

    Args:
      config: whose fields are replaced.
      given: each `FIELD=VALUE`, a value as JSON has it or a word: `weight_bits=4`,
        `bn_fold=none`, `exclude=["head"]`; of a spec `activation.observer=mse`.

    Raises:
      ExperimentError: a field that there is not, a value that it does not take.

    Examples:
      >>> with_settings(sq.SimQATConfig(), ["weight_bits=4", "activation.observer=mse"]).weight.qmax
      7
    """
    if not given:
        return config
    fields = config.to_dict()
    for setting in given:
        name, equals, text = setting.partition("=")
        owner, dot, field = name.strip().partition(".")
        if not (equals and owner) or (dot and not isinstance(fields.get(owner), dict)):
            raise ExperimentError(
                f"--set takes FIELD=VALUE, such as weight_bits=4 or activation.observer=mse, got "
                f"{setting!r}."
            )
        if dot:
            fields[owner] = fields[owner] | {field: _value(text)}
        else:
            fields[owner] = _value(text)
    try:
        return sq.SimQATConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"--set {' --set '.join(given)}: {error}") from error


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return _WORDS.get(text, text)


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ExperimentError(f"{option} cannot be read: {reason or error}.") from error
