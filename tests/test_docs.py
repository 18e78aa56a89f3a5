"""The documentation says what the code does."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import pathlib
import pkgutil
import pydoc
import re
import tomllib
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

import simqat_jax
from simqat_jax.config import RECIPE_VERSION
from simqat_jax.integer import file
from simqat_jax.targets.onnx import message
from simqat_jax.training.plan_table import Row

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "simqat_jax"
MODULES = ["simqat_jax"] + [
    module.name for module in pkgutil.walk_packages(simqat_jax.__path__, "simqat_jax.")
]
PUBLIC = {name: getattr(simqat_jax, name) for name in simqat_jax.__all__}
NAMES = PUBLIC | {"jax": jax, "jnp": jnp, "nn": nn}


# Docstrings --------------------------------------------------------------------------------------


def doctests() -> Iterator[doctest.DocTest]:
    """The examples of every docstring of the package that has any."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in MODULES:
        module = importlib.import_module(name)
        yield from (t for t in finder.find(module, globs=NAMES | vars(module)) if t.examples)


EXAMPLES = list(doctests())


def failures(test: doctest.DocTest) -> str:
    """Run a docstring's examples; return what the failing ones printed."""
    printed: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    return "".join(printed)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_in_docstrings(example):
    printed = failures(example)
    assert not printed, printed


def test_every_example_is_found_and_can_fail():
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    written = len(re.findall(r"^ *>>> ", text, re.MULTILINE))
    assert sum(len(test.examples) for test in EXAMPLES) == written > 0
    parser = doctest.DocTestParser()
    assert failures(parser.get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None))


def docstrings() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def test_docstrings_have_sections_that_the_reference_shows():
    """A section's name stands alone, and `Examples:` is plural; else the site shows it as text."""
    inline = r"^(Args|Attributes|Returns|Raises|Examples|Source):[ ]*\S"
    singular = r"^Example:\n *>>>"
    misread = re.compile(f"{inline}|{singular}", re.MULTILINE)
    assert not [text for text in docstrings() if misread.search(text)]


# Reference and settings --------------------------------------------------------------------------


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


def listed(page: str, heading: str) -> tuple[list[str], list[str]]:
    """The names in the reference before and under a heading."""
    pattern = re.compile(r"^\.\. auto(?:class|function):: simqat_jax\.(\S+)$", re.MULTILINE)
    before, under = page.split(f"\n## {heading}\n")
    return pattern.findall(before), pattern.findall(under)


def test_the_reference_holds_every_public_name_and_no_other():
    page = (DOCS / "reference.md").read_text()
    public, _ = listed(page, "What these objects hold")
    assert sorted(public) == sorted(simqat_jax.__all__)


def test_the_reference_holds_what_public_objects_return():
    _, held = listed((DOCS / "reference.md").read_text(), "What these objects hold")
    documented = {pydoc.locate(f"simqat_jax.{name}") for name in held}
    model, plan = simqat_jax.IntegerModel, typing.get_type_hints(Row)
    returned = {
        typing.get_type_hints(model.__init__)["program"],
        typing.get_args(typing.get_type_hints(model.tensors.fget)["return"])[0],
        typing.get_args(typing.get_type_hints(model.ops.fget)["return"])[0],
        Row,
        typing.get_args(plan["weight"])[0],
    }
    assert documented == returned


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


def written(pattern: str, page: str) -> list[str]:
    return re.findall(pattern, (DOCS / page).read_text(), re.MULTILINE)


def test_the_stability_page_gives_the_versions_of_files():
    (integer,) = written(r"^\| integer model.*\| (format .*?) \| formats (.*?) \|", "stability.md")
    assert integer == (f"format {file.FORMAT}", " and ".join(map(str, file._READ)))
    assert written(r"^\| recipe.*\| version (\d+) \|", "stability.md") == [str(RECIPE_VERSION)]
    onnx = (str(message._OPSET), str(message._IR_VERSION))
    assert written(r"opset (\d+), IR version (\d+)", "stability.md") == [onnx]


def test_the_install_page_gives_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (DOCS / "install.md").read_text()
    assert not [one for one in project["dependencies"] if f"`{one}`" not in page]
    extras = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", page, re.MULTILINE))
    assert set(extras) == set(project["optional-dependencies"])
    for extra in ("export", "report", "cli", "pretrained", "tiny"):
        needed = project["optional-dependencies"][extra]
        assert sorted(re.findall(r"`(\S+)`", extras[extra])) == sorted(map(name_of, needed))
    minors = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert set(written(r"\b3\.\d+\b", "install.md")) == set(minors)


def name_of(requirement: str) -> str:
    return re.split(r"[<>=]", requirement)[0]


# Search and links --------------------------------------------------------------------------------

SEARCHED = [
    *("post-training", "PTQ", "calibrate", "mixed precision", "per-layer", "latency", "orbax"),
    *("TrainState", "GPU", "multi-host", "ONNX", "TFLite", "LiteRT", "NaN", "accuracy drop"),
]
"""What readers look for, and a search of the site has to find."""


@pytest.mark.parametrize("term", SEARCHED)
def test_a_page_answers_what_is_searched(term):
    """Sphinx finds words, a page that has all of them: here one that has them side by side."""
    pages = [path for path in DOCS.rglob("*.md") if path.name != "reference.md"]
    spelled = re.compile(rf"\b{re.escape(term)}", re.IGNORECASE)
    assert [page.name for page in pages if spelled.search(page.read_text())]


def test_links_of_the_readme_lead_somewhere():
    """It is no page of the site, whose build checks all others."""
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (ROOT / "README.md").read_text())
    assert links
    for target, anchor in links:
        assert (ROOT / target).exists(), target
        headings = re.findall(r"^#+ (.*)", (ROOT / target).read_text(), re.M) if anchor else []
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings]


# Pages -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The small model that pages leave to the reader."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def float_model(examples: int) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(1), (examples, 8, 8, 1))
    return {"model": Net(), "key": jax.random.key(0), "x": x}


def trained_model() -> dict[str, Any]:
    names = float_model(8)
    qmodel, x = simqat_jax.SimQAT().apply(names["model"]), names["x"]
    variables: Any = qmodel.init(names["key"], x)
    mutable = ["batch_stats", "quant_stats"]
    _, updates = qmodel.apply(variables, x, train=True, mutable=mutable)
    return {"qmodel": qmodel, "variables": variables | updates, "x": x[:1]}


def float_variables() -> dict[str, Any]:
    names = float_model(100)
    return names | {"floats": names["model"].init(names["key"], names["x"][:1])}


def labelled() -> dict[str, Any]:
    """Batches with labels, and a checkpoint of the float model."""
    names = float_variables()
    x, y = names["x"], jnp.arange(100) % 10
    batches = [(x[i : i + 25], y[i : i + 25]) for i in range(0, 100, 25)]
    return names | {"y": y, "batches": batches, "test_batches": batches[:2]}


def calibrated() -> dict[str, Any]:
    names = labelled()
    qmodel, x = simqat_jax.SimQAT().apply(names["model"]), names["x"][:20]
    variables = simqat_jax.calibrate(qmodel, names["floats"], [x], progress=False)
    return names | {"qmodel": qmodel, "variables": variables, "x": x, "y": names["y"][:20]}


def checkpoint() -> dict[str, Any]:
    names = float_variables()
    path = pathlib.Path("floats").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, names.pop("floats"))
    return names | {"path": path, "batches": [names["x"][:25], names["x"][25:50]]}


def nothing() -> dict[str, Any]:
    return {}


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": lambda: float_model(1000),
    "docs/concepts.md": lambda: float_model(8),
    "docs/index.md": nothing,
    "docs/install.md": nothing,
    "docs/analysis.md": labelled,
    "docs/calibration.md": float_variables,
    "docs/deployment.md": trained_model,
    "docs/low_bits.md": float_variables,
    "docs/how_to/accuracy_dropped.md": calibrated,
    "docs/how_to/deploy_and_benchmark.md": lambda: calibrated() | {"x": float_model(8)["x"]},
    "docs/how_to/fine_tuning.md": labelled,
    "docs/how_to/orbax.md": checkpoint,
    "docs/how_to/own_model.md": labelled,
    "docs/how_to/post_training.md": float_variables,
    "docs/migrating.md": nothing,
    "docs/numerics.md": nothing,
    "docs/rules.md": nothing,
    "docs/tutorial.md": nothing,
    "simqat_jax/__init__.py": lambda: PUBLIC | float_model(8),
}
"""Every page with Python on it, and the names that its reader has."""


def run_page(path: pathlib.Path, names: dict[str, Any]) -> int:
    """Run the Python blocks of a page in one namespace; return how many there are.

    Tracebacks name the page and the line.
    """
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for block in blocks:
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(path), "exec"), names)
    return len(blocks)


def test_every_page_with_python_is_run():
    files = [
        *ROOT.glob("*.md"),
        *DOCS.rglob("*.md"),
        *PACKAGE.rglob("*.md"),
        *PACKAGE.rglob("*.py"),
    ]
    pages = [path for path in files if re.search(r"^ *```python", path.read_text(), re.MULTILINE)]
    assert sorted(PAGES) == sorted(path.relative_to(ROOT).as_posix() for path in pages)


@pytest.mark.parametrize("page", PAGES)
def test_code_on_a_page_runs(page, capsys, monkeypatch, tmp_path):
    """And prints what comments behind its calls of `print` promise in numbers."""
    monkeypatch.chdir(tmp_path)
    assert run_page(ROOT / page, PAGES[page]())
    promised = re.findall(r"# ([\d,]+ of [\d,]+ codes differ)$", (ROOT / page).read_text(), re.M)
    printed = capsys.readouterr().out
    assert all(promise in printed for promise in promised), printed
    shown = re.findall(r"^```text\n(SimQAT plan:.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert all(without_ranges(plan) in without_ranges(printed) for plan in shown), printed


COLUMNS = 80


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.rglob("*.md")], ids=lambda p: p.stem)
def test_code_on_a_page_is_not_cut_off(page):
    blocks = re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    assert not too_wide(blocks)


def too_wide(blocks: list[str]) -> list[str]:
    """The lines of code that a page shows only when scrolled."""
    return [line for block in blocks for line in block.splitlines() if len(line) > COLUMNS]


def cells(path: pathlib.Path) -> list[str]:
    """The code of a notebook, a string for each cell."""
    found = json.loads(path.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


NOTEBOOKS = [*(ROOT / "notebooks").glob("*.ipynb")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_in_a_notebook_is_not_cut_off(path):
    assert cells(path) and not too_wide(cells(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_need_the_package_alone(path):
    """And not the experiments, which are in the repository and not in the wheel."""
    code = "\n".join(cells(path))
    assert "import simqat_jax as sq" in code
    assert not re.search(r"^\s*(from|import) experiments\b", code, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hide_what_draws(path):
    """The site shows the figure, and its code on request."""
    cells = json.loads(path.read_text())["cells"]
    drawn = re.compile(r"plt\.(show|subplots)")
    drawing = [cell for cell in cells if drawn.search("".join(cell["source"]))]
    tags = [cell["metadata"].get("tags", []) for cell in drawing]
    assert tags and all("hide-input" in of_cell for of_cell in tags)


def without_ranges(plan: str) -> str:
    """A printed plan without digits that differ between machines."""
    return re.sub(r" \[\S+, \S+\]", "", plan)


def test_a_failing_block_names_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\na = 1\n```\n\n```python\n\na / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run_page(page, {})
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno, last.line) == (str(page), 9, "a / 0")
