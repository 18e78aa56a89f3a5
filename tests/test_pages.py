"""The pages that new users look for keep what they promise: short, true, and found."""

import ast
import pathlib
import re
import subprocess
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from small_model import Small

import simqat_jax as sq

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "simqat_jax"


def blocks(page: str, kind: str = "python") -> list[str]:
    """The code of a page, a string for each block."""
    text = (DOCS / page).read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines(code: str) -> int:
    """How many lines a reader writes: without empty ones, comments and imports."""
    return len(re.findall(r"^ *(?!import |from |#)\S", code, re.MULTILINE))


def told() -> Iterator[str]:
    """Every string of the package but docstrings, and what stands between the names in messages."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        explains = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in explains:
                yield str(node.value)


def test_messages_on_the_troubleshooting_page_are_those_of_the_code():
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    texts = "\n".join(told())
    assert len(quoted) > 100
    assert not [piece for piece in quoted if piece not in texts]


def block_under(page: str, heading: str) -> str:
    """The first Python under a heading, or behind a line."""
    text = (DOCS / page).read_text().split(f"\n{heading}\n")[1]
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize(
    ("page", "heading", "most"),
    [
        ("tutorial.md", "## Quantize it, without training", 8),
        ("tutorial.md", "Three lines tell where:", 3),
        ("how_to/own_model.md", "## The loop", 15),
    ],
)
def test_code_is_as_short_as_promised(page, heading, most):
    assert lines(block_under(page, heading)) <= most


def test_fine_tuning_takes_no_more_than_twenty_lines():
    """All that follows the float checkpoint: read, set, quantize, train, and the function of it."""
    first, page = blocks("tutorial.md")[0], "".join(blocks("tutorial.md"))
    function = first[first.index("def train(") : first.index("model = Net()")]
    calls = [
        "floats = ocp.StandardCheckpointer().restore(checkpoint)\n",
        "low, data = sq.SimQATConfig(weight_bits=2), [x[:256]]\n",
        "qmodel, variables = sq.post_training_quantize(model, floats, data, config=low)\n",
        "variables = train(qmodel, variables, rate=2e-3, steps=160)\n",
    ]
    places = [page.index(call) for call in calls]
    assert places == sorted(places)
    assert lines(function + "".join(calls)) <= 20


# Scripts for devices ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def integer_model(tmp_path_factory) -> tuple[sq.IntegerModel, np.ndarray, pathlib.Path]:
    """An integer model, inputs, and a folder with the files that the page writes."""
    folder = tmp_path_factory.mktemp("device")
    x = np.random.default_rng(0).standard_normal((9, 6, 6, 2), np.float32)
    qmodel = sq.SimQAT().apply(Small())
    variables = sq.calibrate(qmodel, Small().init(jax.random.key(1), x[:1]), [x], progress=False)
    model = sq.convert(qmodel, variables, x[:1])
    sq.export_tflite(model, folder / "model_int8.tflite", integer_io=True)
    sq.export_onnx(model, folder / "model.onnx")
    np.save(folder / "x.npy", x)
    return model, x, folder


@pytest.mark.parametrize("runtime", ["ai_edge_litert", "onnxruntime"])
def test_a_script_of_fourteen_lines_runs_a_file_without_the_library(
    runtime, integer_model, monkeypatch
):
    model, x, folder = integer_model
    imports = re.compile(rf"^(import|from) {runtime}\b", re.MULTILINE)
    (script,) = filter(imports.search, blocks("how_to/deploy_and_benchmark.md"))
    assert len(re.findall(r"\S.*", script)) <= 14
    assert "simqat" not in script and "sq." not in script
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(script, "script", "exec"), names)
    grid = model.tensors[model.outputs[0]].grid
    codes = np.rint(names["logits"] / grid.scale) + grid.zero_point
    assert np.array_equal(codes, np.asarray(model.run_codes(model.quantize(x))))


# Float files --------------------------------------------------------------------------------------

PEERS = ROOT / ".venv-peers/bin/python"
GIVEN = """
import flax.linen as nn, jax
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(5)(x.mean(axis=(1, 2)))
model = Net()
x = jax.random.normal(jax.random.key(0), (3, 6, 6, 2))
floats = model.init(jax.random.key(1), x)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not PEERS.exists(), reason="`make peers` has not been run.")
def test_named_converters_write_float_files(tmp_path):
    (code,) = blocks("how_to/deploy_and_benchmark.md", "py")
    subprocess.run([PEERS, "-c", GIVEN + code], cwd=tmp_path, check=True)
    names: dict = {}
    exec(GIVEN, names)
    x = np.asarray(names["x"])
    expected = names["model"].apply(names["floats"], x)
    (found,) = sq.open_file(tmp_path / "float.onnx").run([x])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (found,) = sq.open_file(tmp_path / "float.tflite").run([x[:1]])
    np.testing.assert_allclose(found, expected[:1], atol=1e-5)
