"""What files say of themselves: what is refused, and what both files say alike."""

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from models import export, observed

import simqat_jax as sq
from simqat_jax.targets.metadata import Codes
from simqat_jax.targets.onnx.listing import list_onnx
from simqat_jax.targets.tflite.listing import list_tflite

LABELS = ("zero", "eins", "deux", "три", "four, or 4")
METADATA = sq.FileMetadata(
    name="Net",
    version="2.1",
    author="Ada",
    license="Apache-2.0",
    description="Tells what is seen.",
    tensors={
        "input": sq.TensorMetadata(description="an image", mean=[1, 2, 3], std=64),
        "scores": sq.TensorMetadata(labels=LABELS),
        "best": sq.TensorMetadata(description="the class", labels=[*LABELS, "none of them"]),
    },
)
LISTINGS = {"onnx": list_onnx, "tflite": list_tflite}


class Net(nn.Module):
    """Two inputs, one on no grid, and two outputs, one of integers."""

    @nn.compact
    def __call__(self, x, ids):
        y = nn.Dense(5)(nn.Conv(4, (3, 3))(x).mean((1, 2)))
        y = y + nn.Embed(7, 5)(ids)
        return {"scores": y, "best": jnp.argmax(y, -1)}


X = np.random.default_rng(0).normal(size=(3, 6, 6, 3)).astype(np.float32)
IDS = np.array([1, 0, 6])


@pytest.fixture(scope="module")
def models():
    """A model for each of the runtimes."""
    qmodel, variables, _ = observed(Net(), X, IDS)
    return {name: sq.convert(qmodel, variables, X, IDS, backend=name) for name in LISTINGS}


@pytest.fixture(params=LISTINGS)
def model(request, models):
    """One of them."""
    return models[request.param]


def exported(model, folder, **options):
    path = folder / f"m.{model.backend}"
    export(model, path, **options)
    return path


@pytest.mark.parametrize("io", [False, "int8", "uint8"])
def test_files_with_metadata_compute_the_same_and_tell_it(model, io, tmp_path):
    path = exported(model, tmp_path, integer_io=io, metadata=METADATA)
    found = sq.verify(model, path, X, IDS)
    assert (found.differing, found.differing_values, found.codes, found.values) == (0, 0, 15, 3)
    about, image, _, best, scores = LISTINGS[model.backend](path).notes()
    assert about == "Net 2.1, Ada, Apache-2.0. Tells what is seen"
    grid = model.tensors[model.inputs[0]].grid
    kind = io or {"onnx": "uint8", "tflite": "int8"}[model.backend]
    zero = grid.zero_point + (0 if kind == "uint8" else -128)
    sign = f"- {zero}" if zero >= 0 else f"+ {-zero}"
    codes = f"{kind} codes: real = {grid.scale:.9g} * (code {sign})"
    assert image.startswith("input: an image. " + ("" if io else "float32, inside ") + codes)
    assert image.endswith("made of raw values by (raw - [1, 2, 3]) / 64")
    assert best.startswith("best: the class. int32. 6 labels: zero, eins, deux, три, four, or 4, n")
    assert scores.endswith("5 labels: zero, eins, deux, три, four, or 4") and " codes: " in scores


def test_all_labels_on_demand(model, tmp_path):
    path = exported(model, tmp_path, metadata=METADATA)
    listing = LISTINGS[model.backend](path)
    short, whole = listing.notes(), listing.notes(whole=True)
    best = [f"  {place} {label}" for place, label in enumerate((*LABELS, "none of them"))]
    scores = [f"  {place} {label}" for place, label in enumerate(LABELS)]
    assert whole[:3] == short[:3] and (whole[4:10], whole[11:]) == (tuple(best), tuple(scores))
    assert whole[3].endswith("6 labels") and whole[10].endswith("5 labels")


@pytest.mark.parametrize("io", [False, "int8", "uint8"])
def test_without_metadata_scale_and_zero_point_can_be_found(model, io, tmp_path):
    listing = LISTINGS[model.backend](exported(model, tmp_path, integer_io=io))
    _, scores = model.program.outputs  # "best" is on no grid
    grid = model.tensors[scores].grid
    kind = np.dtype(io or {"onnx": "uint8", "tflite": "int8"}[model.backend])
    zero = grid.zero_point + (0 if kind == np.uint8 else -128)
    best, codes = (end.codes for end in listing.outputs)
    if io and model.backend == "tflite":
        image = model.tensors[model.inputs[0]].grid
        found = listing.inputs[0].codes
        assert found == Codes(io, float(image.scale), image.zero_point + image.offset_in(kind))
    told = [note for note in listing.notes() if note.startswith("scores: ")]
    if (model.backend, io) == ("onnx", "uint8"):  # the graph has no operator that would tell
        sign = f"- {zero}" if zero >= 0 else f"+ {-zero}"
        assert (best, codes) == (None, None)
        assert told == [f"scores: uint8 codes: real = {grid.scale:.9g} * (code {sign})"]
    else:
        assert (best, codes) == (None, Codes(kind.name, float(grid.scale), zero))
        assert bool(told) == (model.backend == "onnx" and bool(io))


def test_scales_of_one_entry_are_read_like_scalars(models, tmp_path):
    path = exported(models["onnx"], tmp_path)
    listed, file = LISTINGS["onnx"](path), onnx.load(path)
    for held in file.graph.initializer:
        if not held.dims:
            held.dims.append(1)
    onnx.save(file, path)
    assert LISTINGS["onnx"](path).outputs == listed.outputs
    assert any(end.codes for end in listed.outputs)


def test_scale_and_zero_point_are_written_in_any_case(model, tmp_path):
    path = exported(model, tmp_path, metadata=sq.FileMetadata(), integer_io=True)
    image, ids, best, scores = LISTINGS[model.backend](path).notes()
    assert " * (code " in image and " * (code " in scores
    assert (ids, best) == ("input_1: int32", "best: int32")


def test_onnx_runtime_reads_it(models, tmp_path):
    model = models["onnx"]
    path = exported(model, tmp_path, integer_io="int8", metadata=METADATA)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    told = session.get_modelmeta()
    properties = told.custom_metadata_map
    assert told.description == METADATA.description
    keys = ("model_name", "model_version", "model_author", "model_license")
    assert [properties[key] for key in keys] == ["Net", "2.1", "Ada", "Apache-2.0"]
    inputs, outputs = (json.loads(properties[key]) for key in ("inputs", "outputs"))
    assert [end["name"] for end in inputs] == [i.name for i in session.get_inputs()]
    assert [end["name"] for end in outputs] == [o.name for o in session.get_outputs()]
    assert (inputs[0]["mean"], inputs[0]["std"]) == ([1, 2, 3], [64])
    assert outputs[1]["labels"] == list(LABELS)
    codes = np.asarray(session.run(["scores"], {"input": _codes(inputs[0]), "input_1": IDS32})[0])
    real = (codes.astype(np.float32) - outputs[1]["zero_point"]) * np.float32(outputs[1]["scale"])
    np.testing.assert_array_equal(real, model(X, IDS)["scores"])
    infos = {info.name: info.doc_string for info in onnx.load(path).graph.input}
    made = "made of raw values by (raw - [1, 2, 3]) / 64"
    assert infos["input"].startswith(f"an image. {made}. int8 codes: real = ")


IDS32 = IDS.astype(np.int32)


def _codes(end):
    """Quantize as a device does that has read the file alone."""
    codes = np.rint(X / np.float32(end["scale"])) + end["zero_point"]
    return np.clip(codes, -128, 127).astype(end["dtype"])


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"image": {}}, r"speak of 'image'. The model takes input, input_1 and returns best, sc"),
        ({"scores": {"labels": LABELS[:4]}}, "scores: 4 labels, and its last axis has length 5"),
        ({"input": {"mean": [1, 2], "std": 1}}, "input: mean and std are of 2 channels, and"),
    ],
)
def test_what_does_not_fit_the_model(model, tensors, message, tmp_path):
    tensors = {name: sq.TensorMetadata(**about) for name, about in tensors.items()}
    with pytest.raises(ValueError, match=message):
        exported(model, tmp_path, metadata=sq.FileMetadata(tensors=tensors))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"mean": 1}, ValueError, "mean and std belong together"),
        ({"mean": [1, 2], "std": [1, 2, 3]}, ValueError, "got 2 and 3 numbers"),
        ({"mean": 0, "std": 0}, ValueError, "std must be above 0"),
        ({"mean": np.nan, "std": 1}, ValueError, "mean must be finite, got nan"),
        ({"mean": [[0]], "std": 1}, ValueError, "mean must be a number or one a channel"),
        ({"mean": "0", "std": "x"}, TypeError, "std must be a number or a list of them, got 'x'"),
        ({"labels": "cat"}, TypeError, "labels must be a list of strings, got 'cat'"),
        ({"labels": [1, 2]}, TypeError, "labels must be a list of strings"),
        ({"labels": ["a\nb"]}, ValueError, r"one line of text, got 'a\\nb'"),
        ({"description": None}, TypeError, "description must be a str, got None"),
    ],
)
def test_wrong_metadata_of_a_tensor(given, error, message):
    with pytest.raises(error, match=message):
        sq.TensorMetadata(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"version": 2}, "version must be a str, got 2"),
        ({"tensors": [sq.TensorMetadata()]}, "tensors must be a dictionary"),
        ({"tensors": {"input": "bytes"}}, r"tensors\['input'\] must be a TensorMetadata, got 'by"),
    ],
)
def test_wrong_metadata_of_a_file(given, message):
    with pytest.raises(TypeError, match=message):
        sq.FileMetadata(**given)
