"""The documentation says what the code does."""

import dataclasses
import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import simqat_jax

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = ["simqat_jax"] + [
    module.name for module in pkgutil.walk_packages(simqat_jax.__path__, "simqat_jax.")
]
NAMES = {"jax": jax, "jnp": jnp, "nn": nn}


class Parser(doctest.DocTestParser):
    """Ends the expected output where the text is no longer indented as its example is.

    The house style puts `Source:` right behind an example.
    """

    def parse(self, string, name="<string>"):
        lines, indent = [], None
        for line in string.expandtabs().splitlines():
            if line.lstrip().startswith(">>>"):
                indent = len(line) - len(line.lstrip())
            elif indent is not None and (not line.strip() or not line.startswith(" " * indent)):
                lines.append("")
                indent = None
            lines.append(line)
        return super().parse("\n".join(lines), name)


def doctests(module):
    public = {name: getattr(simqat_jax, name) for name in simqat_jax.__all__}
    finder = doctest.DocTestFinder(parser=Parser(), exclude_empty=True)
    return finder.find(module, globs=public | NAMES | vars(module))


def failures(tests) -> tuple[int, str]:
    """Run doctests; return how many examples ran and what the failing ones printed."""
    printed: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    attempted = sum(runner.run(test, out=printed.append).attempted for test in tests)
    return attempted, "".join(printed)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    _, printed = failures(doctests(importlib.import_module(name)))
    assert not printed, printed


def test_examples_are_found_and_can_fail():
    found = {
        test.name: test for test in doctests(importlib.import_module("simqat_jax.numerics.affine"))
    }
    attempted, _ = failures([found["simqat_jax.numerics.affine.quantize"]])
    assert attempted == 2
    wrong = Parser().get_doctest("Example:\n  >>> 1 + 1\n  3\nSource: x", {}, "wrong", None, None)
    assert failures([wrong])[1]


def documented_constant(name: str) -> bool:
    """Whether a string stands behind the assignment of an alias, where `__doc__` is its target's"""
    value = getattr(simqat_jax, name)
    source = inspect.getsource(inspect.getmodule(value))
    return bool(re.search(rf'^{name} = \w+\n"""\S', source, re.MULTILINE))


@pytest.mark.parametrize("name", simqat_jax.__all__)
def test_public_names_have_docstrings(name):
    value = getattr(simqat_jax, name)
    if value.__name__ != name:
        assert documented_constant(name)
        return
    assert (value.__doc__ or "").strip()
    generated = f"{name}("  # what dataclass and NamedTuple write if nobody else does
    assert not value.__doc__.startswith(generated)


def test_the_reference_holds_every_public_name_and_no_other():
    listed = re.findall(r"^::: simqat_jax\.(\S+)$", (DOCS / "reference.md").read_text(), re.M)
    assert sorted(listed) == sorted(simqat_jax.__all__)


@pytest.mark.parametrize("config", [simqat_jax.SimQATConfig, simqat_jax.QuantSpec])
def test_every_setting_is_explained(config):
    text = (DOCS / "concepts.md").read_text() + (DOCS / "migrating.md").read_text()
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    unexplained = [
        field.name
        for field in dataclasses.fields(config)
        if not re.search(rf"\b{field.name}\b", code)
    ]
    assert not unexplained


def migration_defaults() -> dict[str, str]:
    """The column "our default" of each setting in the migration table."""
    rows = (DOCS / "migrating.md").read_text().splitlines()
    cells = [[cell.strip() for cell in row.split("|")] for row in rows if row.startswith("| ")]
    return {row[3].strip("`"): row[4] for row in cells if len(row) == 7}


def test_the_migration_table_gives_our_defaults():
    config, table = simqat_jax.SimQATConfig(), migration_defaults()
    activation, weight = config.activation, config.weight
    for field in ("quant_delay", "num_bits"):
        pair = f"{getattr(activation, field)} and {getattr(weight, field)}"
        assert table[f"QuantSpec.{field}"] == pair
    for field in ("per_channel", "symmetric", "narrow_range"):
        pair = f"`{getattr(activation, field)}` and `{getattr(weight, field)}`"
        assert table[f"QuantSpec.{field}"] == pair
    assert table["SimQATConfig.bn_fold"] == f'`"{config.bn_fold}"`'
    assert table["SimQATConfig.freeze_bn"] == f"`{config.freeze_bn}`"
    assert table["QuantSpec.observer"] == (
        f'`"{activation.observer}"` for activations, `"{weight.observer}"` for weights'
    )
    assert table["QuantSpec.ema_decay"].startswith(f"`{activation.ema_decay}`")


@pytest.mark.parametrize("page", ["index.md", "migrating.md"])
def test_code_on_a_page_runs(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)
    assert blocks
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "index.md":
        assert "SimQAT plan" in capsys.readouterr().out
        assert int(names["variables"]["quant_stats"]["step"]) == 1
