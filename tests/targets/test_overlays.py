"""Overlays are node data of Model Explorer, for the nodes that a file has."""

import dataclasses
import json
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import pytest
from models import observed

import simqat_jax as sq
from simqat_jax.targets import TARGETS

NODE_DATA = {
    "results": dict,
    "thresholds": list,
    "gradient": list,
    "hideInAggregatedStatsTable": bool,
    "hideInChildrenStatsTable": bool,
}
"""What the data of one graph may hold, as Model Explorer's `node_data_builder` documents it."""
RESULT = {"value": int | float, "bgColor": str, "textColor": str}
X = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.LayerNorm()(nn.relu(x + nn.Conv(4, (3, 3))(x)))  # its parts have no names in TFLite
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Files(NamedTuple):
    analysis: sq.Analysis
    folder: Any


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlays")
    config = sq.SimQATConfig(rules=[sq.Rule(path="head", weight_bits=4, activation_bits=6)])
    qmodel, variables, _ = observed(Net(), X, config=config)
    for backend, export in (("tflite", sq.export_tflite), ("onnx", sq.export_onnx)):
        export(sq.convert(qmodel, variables, X, backend=backend), folder / f"net.{backend}")
    return Files(sq.analyze(qmodel, variables, [X], progress=False), folder)


def read(files, suffix):
    written = sq.write_overlays(files.analysis, files.folder / f"net.{suffix}", files.folder)
    names = ["sqnr", "sensitivity", "weight_bits", "activation_bits"]
    assert [path.name for path in written] == [f"net.{name}.json" for name in names]
    return {n: json.loads(path.read_bytes()) for n, path in zip(names, written, strict=True)}


def fits(value, fields):
    """Whether it holds the first of some fields, none but them, and each of its type."""
    known = (
        isinstance(value, dict) and next(iter(fields)) in value and value.keys() <= fields.keys()
    )
    return known and all(isinstance(v, fields[name]) for name, v in value.items())


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_the_form_is_that_of_model_explorer(files, suffix):
    for data in read(files, suffix).values():
        assert fits(data, NODE_DATA) and data["results"]
        assert all(fits(result, RESULT) for result in data["results"].values())
        assert all(fits(threshold, RESULT) for threshold in data["thresholds"])
        ends = [threshold["value"] for threshold in data["thresholds"]]
        assert ends == sorted(ends)
    assert not fits({"results": {}, "other": 1}, NODE_DATA) and not fits({"bgColor": ""}, RESULT)


def values(data):
    return {key: result["value"] for key, result in data["results"].items()}


def test_nodes_of_tflite_are_output_tensors(files):
    found, analysis = read(files, "tflite"), files.analysis
    keys = {node.key for node in TARGETS[".tflite"].listing(files.folder / "net.tflite").nodes}
    assert all(keys >= set(data["results"]) for data in found.values())
    sqnr, layers = values(found["sqnr"]), {layer.name: layer for layer in analysis.layers}
    for name in ("Conv_0/output", "Conv_1/output", "add/output", "LayerNorm_0/output"):
        assert sqnr[name] == pytest.approx(analysis.tensors[name].sqnr, abs=0.01)
        alone = layers[name.removesuffix("/output")].alone_quantized
        assert values(found["sensitivity"])[name] == pytest.approx(alone, abs=0.01)
    assert values(found["weight_bits"])["head/output"] == 4
    assert values(found["activation_bits"])["head/output"] == 6
    assert "add/output" not in values(found["weight_bits"])


def test_nodes_of_onnx_are_numbered(files):
    import onnx

    found, nodes = read(files, "onnx"), onnx.load(files.folder / "net.onnx").graph.node
    assert not any(node.name for node in nodes)
    numbered = dict(zip(["node", *(f"node_{n}" for n in range(1, len(nodes)))], nodes, strict=True))
    by_kind = {}
    for key, value in values(found["sqnr"]).items():
        by_kind.setdefault(numbered[key].op_type, []).append(value)
    tensors = files.analysis.tensors
    convolutions = [tensors[f"Conv_{n}/output"].sqnr for n in (0, 1)]
    assert by_kind["Conv"] == pytest.approx(convolutions[-len(by_kind["Conv"]) :], abs=0.01)
    (add,) = (key for key, node in numbered.items() if node.output[0] == "add")
    assert numbered[add].op_type == "Add"
    assert values(found["sqnr"])[add] == pytest.approx(tensors["add/output"].sqnr, abs=0.01)


def test_what_has_no_noise_has_no_value(files):
    tensors = {n: dataclasses.replace(t, sqnr=np.inf) for n, t in files.analysis.tensors.items()}
    exact = files._replace(analysis=dataclasses.replace(files.analysis, tensors=tensors))
    assert read(exact, "tflite")["sqnr"]["results"] == {}


def test_what_is_wrong(files, tmp_path):
    file = files.folder / "net.tflite"
    with pytest.raises(TypeError, match="analysis must be an Analysis"):
        sq.write_overlays({}, file, tmp_path)
    with pytest.raises(ValueError, match=r"neither \*.onnx nor \*.tflite"):
        sq.write_overlays(files.analysis, tmp_path / "a.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        sq.write_overlays(files.analysis, tmp_path / "a.onnx", tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        sq.write_overlays(files.analysis, file, tmp_path / "none")
    other = dataclasses.replace(files.analysis.layers[0], name="other")
    analysis = dataclasses.replace(files.analysis, layers=(other,), tensors={})
    with pytest.raises(ValueError, match=r"no node of .* such as 'other'"):
        sq.write_overlays(analysis, file, tmp_path)


def test_tensors_without_a_name_are_listed(files):
    listing = TARGETS[".tflite"].listing(files.folder / "net.tflite")
    assert any(op.name == op.kind.lower() for op in listing.ops)
    assert all(node.key for node in listing.nodes)
    assert len({node.key for node in listing.nodes}) == len(listing.nodes)
