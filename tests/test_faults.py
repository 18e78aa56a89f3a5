"""Nothing is silently wrong: what was, once, and others of its kind."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import simqat_jax as sq
from simqat_jax.targets import verify as command

KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


class Net(nn.Module):
    """Conv, BatchNorm, a functional parameter, Dense."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        x = nn.relu(x) * self.param("alpha", nn.initializers.constant(0.7), ())
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def trained():
    qmodel = sq.SimQAT().apply(Net())
    variables = qmodel.init(KEY, IMAGE)
    _, updates = qmodel.apply(variables, IMAGE, train=True, mutable=["batch_stats", "quant_stats"])
    return qmodel, {**variables, **updates}, jax.jit(qmodel.apply)


def replaced(tree, path, change):
    """The tree with one leaf changed."""
    name, *rest = path
    return {**tree, name: replaced(tree[name], rest, change) if rest else change(tree[name])}


PARAMETERS = [
    ("params", "Conv_0", "kernel"),
    ("params", "Conv_0", "bias"),
    ("params", "BatchNorm_0", "scale"),
    ("params", "BatchNorm_0", "bias"),
    ("params", "Dense_0", "kernel"),
    ("params", "Dense_0", "bias"),
    ("batch_stats", "BatchNorm_0", "mean"),
    ("batch_stats", "BatchNorm_0", "var"),
]


def spoiled(value):
    return lambda x: x.at[(0,) * x.ndim].set(value)


@pytest.mark.parametrize(
    "path, value",
    [
        *itertools.product(PARAMETERS, (np.nan, np.inf, -np.inf)),
        (("batch_stats", "BatchNorm_0", "var"), -1.0),
        (("params", "alpha"), np.nan),
    ],
)
def test_a_diverged_parameter_shows(trained, path, value):
    """As NaN in evaluation, and as an error that names it in conversion."""
    qmodel, variables, evaluate = trained
    broken = replaced(variables, path, spoiled(value))
    assert np.isnan(evaluate(broken, IMAGE)).all()
    where = path[1] if len(path) > 2 else "mul"
    with pytest.raises(ValueError, match=f"{where}.*{path[-1] if len(path) > 2 else 'parameter'}"):
        sq.convert(qmodel, broken, IMAGE)


def test_a_healthy_model_stays_finite(trained):
    _, variables, evaluate = trained
    assert np.isfinite(evaluate(variables, IMAGE)).all()


RANGES = ["input", "Conv_0/output", "mul/output", "mean/output", "Dense_0/output"]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("ends", [(np.inf, -np.inf), (np.nan, np.nan), (-np.inf, 1.0)])
def test_a_range_without_values_shows_under_jit(trained, name, ends):
    qmodel, variables, evaluate = trained
    lo, hi = map(jnp.float32, ends)
    state = sq.RangeState(lo, hi, jnp.int32(0))
    broken = replaced(variables, ("quant_stats", name), lambda _: state)
    assert np.isnan(evaluate(broken, IMAGE)).all()
    with pytest.raises(ValueError, match=name):
        qmodel.apply(broken, IMAGE)
    with pytest.raises(ValueError, match=name):
        sq.convert(qmodel, broken, IMAGE)


def test_gradients_of_a_broken_model_are_no_error(trained):
    qmodel, variables, _ = trained
    broken = replaced(variables, PARAMETERS[0], spoiled(np.nan))
    loss = jax.grad(lambda p: qmodel.apply({**broken, "params": p}, IMAGE).sum())
    assert jax.tree.structure(loss(broken["params"])) == jax.tree.structure(broken["params"])


def test_an_empty_tensor_is_named_with_its_layer():
    class Empty(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.relu(nn.Conv(4, (5, 5), padding="VALID")(x))
            return nn.Dense(2)(jnp.pad(y, [(0, 0), (1, 0), (1, 0), (0, 0)]).reshape(2, -1))

    x = jnp.ones((2, 4, 4, 1))
    qmodel = sq.SimQAT().apply(Empty())
    variables = qmodel.init(KEY, x)
    with pytest.raises(ValueError, match="Conv_0/output: an empty tensor"):
        qmodel.apply(variables, x, mutable=["quant_stats"])


# Files -------------------------------------------------------------------------------------------

ROW = jax.random.normal(jax.random.key(2), (8, 6))


def converted(body, x=ROW, key=KEY):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return body(x)

    qmodel = sq.SimQAT().apply(Model())
    variables = qmodel.init(key, x)
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    return sq.convert(qmodel, {**variables, **updates}, x)


def heads(x):
    boxes = nn.Dense(4, name="boxes")(x)
    both = jnp.concatenate([boxes, nn.Dense(4)(x)], -1)
    return {"boxes": boxes, "score": (nn.Dense(1)(both), both), "input": nn.Dense(2)(x)}


@pytest.mark.parametrize("integer_io", [False, True])
@pytest.mark.parametrize(
    "body, names",
    [
        (lambda x: nn.Dense(2)(x), ["output"]),
        (lambda x: (nn.Dense(2)(x), nn.Dense(3)(x)), ["output_0", "output_1"]),
        (lambda x: {"logits": nn.Dense(2)(x)}, ["logits"]),
        (heads, ["boxes", "input_2", "score/0", "score/1"]),
        (lambda x: {"a": (y := nn.Dense(2)(x)), "b": y}, ["a", "b"]),
    ],
)
def test_outputs_have_the_names_that_the_model_gives_them(body, names, integer_io, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = converted(body)
    assert list(model.program.output_names()) == names
    sq.export_tflite(model, tmp_path / "m.tflite", integer_io=integer_io)
    sq.export_onnx(model, tmp_path / "m.onnx", integer_io=integer_io)
    interpreter = Interpreter(str(tmp_path / "m.tflite"))
    signature = interpreter.get_signature_list()["serving_default"]
    assert sorted(signature["outputs"]) == sorted(names)
    shown = [detail["name"] for detail in interpreter.get_output_details()]
    assert len(set(shown)) == len(shown)
    assert set(names) <= set(shown) or integer_io
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    assert [output.name for output in session.get_outputs()] == names
    if not integer_io:
        for suffix in ("tflite", "onnx"):
            assert sq.verify(model, tmp_path / f"m.{suffix}", ROW).differing == 0


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A folder with a model, its file, another model's file, and data."""
    folder = tmp_path_factory.mktemp("verify")
    model = converted(lambda x: nn.Dense(3)(x))
    model.save(folder / "model")
    sq.export_tflite(model, folder / "m.tflite")
    other = converted(lambda x: nn.Dense(3)(x), key=jax.random.key(9))
    sq.export_tflite(other, folder / "other.tflite")
    np.save(folder / "x.npy", ROW)
    return model, folder


@pytest.mark.parametrize("size", [0, -1, -64])
def test_a_batch_has_examples(file, size):
    model, folder = file
    with pytest.raises(ValueError, match=f"batch_size .* 1 or more: got {size}"):
        sq.verify(model, folder / "other.tflite", ROW, batch_size=size)


def test_nan_in_the_data_is_named(file):
    model, folder = file
    with pytest.raises(ValueError, match="input: the data hold NaN"):
        sq.verify(model, folder / "m.tflite", ROW.at[3, 1].set(np.nan))


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        (("model", "m.tflite"), 0, "0 of 24 codes differ"),
        (("model", "other.tflite"), 1, "codes differ"),
        (("model", "m.tflite", "other.tflite"), 1, "codes differ"),
        (("model", "missing.tflite"), 2, "no file at"),
        (("model", "x.npy"), 2, "neither"),
        (("m.tflite", "m.tflite"), 2, "no integer model"),
        (("missing", "m.tflite"), 2, "missing"),
        (("model", "damaged.tflite"), 2, "could not check"),
    ],
)
def test_the_command_says_what_it_found(file, arguments, status, said, capsys):
    _, folder = file
    (folder / "damaged.tflite").write_bytes(b"TFL3" * 9)
    paths = [str(folder / name) for name in arguments]
    assert command.main([*paths, "--data", str(folder / "x.npy")]) == status
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert len(printed.err.splitlines()) == (status == 2)
