"""Nothing is silently wrong: what was, once, and others of its kind."""

import hashlib
import io
import itertools
import json
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from models import by_half

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
        (("params", "alpha"), np.inf),
    ],
)
def test_a_diverged_parameter_shows(trained, path, value):
    """As NaN in evaluation, and as an error that names it in conversion."""
    qmodel, variables, evaluate = trained
    broken = replaced(variables, path, spoiled(value))
    assert np.isnan(evaluate(broken, IMAGE)).all()
    said = f"{path[1]}.*{path[-1]}"
    if path == ("params", "alpha"):
        said = "mul: a parameter" if np.isnan(value) else "alpha: the variable in params"
    with pytest.raises(ValueError, match=said):
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


# Numbers at the ends of float32 ------------------------------------------------------------------


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
@pytest.mark.parametrize("gamma", by_half([0.0, 1e-6, -1e-11, 1e-14, -1e-19, 1e-25, 1e-37, 1e-40]))
def test_a_channel_with_a_tiny_gamma_trains_on(fold, gamma):
    """Outputs, gradients and statistics are finite, and those of the float network."""
    model = Net()
    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold=fold)).apply(model)
    mutable = ["batch_stats", "quant_stats"]
    variables = replaced(
        qmodel.init(KEY, IMAGE),
        ("params", "BatchNorm_0", "scale"),
        lambda scale: scale.at[0].set(gamma),
    )

    @jax.jit
    def step(params):
        y, updates = qmodel.apply(
            {**variables, "params": params}, IMAGE, train=True, mutable=mutable
        )
        return jnp.mean(y**2), updates

    gradient, updates = jax.grad(step, has_aux=True)(variables["params"])
    for leaf in jax.tree.leaves((gradient, updates["batch_stats"])):
        assert np.isfinite(leaf).all()
    floats = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    _, want = model.apply(floats, IMAGE, train=True, mutable=["batch_stats"])
    for got, expected in zip(
        jax.tree.leaves(updates["batch_stats"]), jax.tree.leaves(want["batch_stats"]), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0.02, atol=0.02)
    trained = {**variables, **updates}
    evaluated = jax.jit(qmodel.apply)(trained, IMAGE)
    np.testing.assert_array_equal(sq.convert(qmodel, trained, IMAGE)(IMAGE), evaluated)


@pytest.mark.parametrize("variance", [1e26, 1e36])
def test_a_huge_running_variance_stays_finite(variance):
    qmodel = sq.SimQAT().apply(Net())
    variables = replaced(
        qmodel.init(KEY, IMAGE), ("batch_stats", "BatchNorm_0", "var"), lambda v: v + variance
    )
    y, updates = jax.jit(
        lambda v: qmodel.apply(v, IMAGE, train=True, mutable=["batch_stats", "quant_stats"])
    )(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, updates["batch_stats"])))


@pytest.mark.parametrize("scale", [1e-34, 1e-35, 1e-36])
def test_products_of_scales_that_float32_does_not_hold_are_refused(scale):
    with pytest.raises(ValueError, match=r"Dense_\d: its input counts .* near 1"):
        converted(lambda x: nn.Dense(3)(nn.relu(nn.Dense(8)(x))), ROW * scale)


def test_smaller_and_larger_scales_are_exact(tmp_path):
    for scale in (1e-30, 1e30):
        model = converted(lambda x: nn.Dense(3)(nn.relu(nn.Dense(8)(x))), ROW * scale)
        sq.export_tflite(model, tmp_path / "m.tflite")
        assert sq.verify(model, tmp_path / "m.tflite", ROW * scale).differing == 0


# Mapped axes -------------------------------------------------------------------------------------


class Mapped(nn.Module):
    """BatchNorm over a mapped axis."""

    axis_name: str | None = "batch"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, use_bias=False)(x)
        norm = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)
        return nn.Dense(2)(nn.relu(norm(x)))


def test_ranges_are_those_of_all_devices_of_a_mapped_axis():
    """As if they were one device, where BatchNorm's statistics are."""
    x = ROW * jnp.repeat(jnp.array([1.0, 2.0, 4.0, 8.0]), 2)[:, None]
    mutable = ["batch_stats", "quant_stats"]
    one, many = (sq.SimQAT().apply(Mapped(name)) for name in (None, "batch"))
    variables = one.init(KEY, x)
    _, want = one.apply(variables, x, train=True, mutable=mutable)

    def step(x):
        return many.apply(variables, x, train=True, mutable=mutable)[1]

    got = jax.vmap(step, axis_name="batch")(x.reshape(4, 2, -1))
    for name, state in want["quant_stats"].items():
        mapped = got["quant_stats"][name]
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, jnp.stack([b] * 4), rtol=1e-5, atol=1e-6)


def test_init_and_plan_need_no_mapped_axis():
    qmodel = sq.SimQAT().apply(Mapped())
    variables = qmodel.init(KEY, ROW, train=True)
    plan = qmodel.plan(variables, ROW, train=True)
    assert "BatchNorm folded" in plan.details()
    with pytest.raises(NameError, match="batch"):
        qmodel.apply(variables, ROW, train=True, mutable=["batch_stats", "quant_stats"])


def test_batch_norms_over_different_axes_are_refused():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            for axis in ("a", "b"):
                x = nn.BatchNorm(use_running_average=False, axis_name=axis)(nn.Dense(4)(x))
            return x

    qmodel = sq.SimQAT().apply(Both())
    variables = qmodel.init(KEY, ROW)

    def step(x):
        return qmodel.apply(variables, x, mutable=["batch_stats", "quant_stats"])

    mapped = jax.vmap(jax.vmap(step, axis_name="a"), axis_name="b")
    with pytest.raises(ValueError, match="BatchNorm_0: 'a', BatchNorm_1: 'b'"):
        mapped(ROW.reshape(2, 2, 2, -1))


# What is no activation ---------------------------------------------------------------------------


def test_losses_and_state_are_never_put_on_a_grid():
    """A loss has no batch axis; what a model sows or keeps is its own."""

    class Variational(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, logvar = nn.Dense(4)(x), nn.Dense(4)(x)
            kl = -0.5 * (1 + logvar - mean**2 - jnp.exp(logvar)).sum(-1).mean()
            self.sow("losses", "l2", (mean**2).mean())
            seen = self.variable("running", "mean", jnp.zeros, ())
            seen.value = 0.9 * seen.value + 0.1 * (mean**2).mean()
            return nn.Dense(6)(mean), kl

    qmodel = sq.SimQAT().apply(Variational())
    variables = qmodel.init(KEY, ROW)
    names = {name for name in variables["quant_stats"] if name != "step"}
    assert names == {"input", "Dense_0/output", "Dense_1/output", "Dense_2/output"}
    wide = 3 * ROW
    (_, kl), updates = qmodel.apply(variables, wide, mutable=["quant_stats", "losses", "running"])
    (_, twice), _ = qmodel.apply(
        {**variables, **updates}, 2 * wide, mutable=["quant_stats", "losses", "running"]
    )
    assert twice > 1.5 * kl


def test_evaluation_may_collect_what_training_did_not():
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.relu(nn.Dense(8)(x))
            self.sow("losses", "l2", (h**2).sum(-1).mean())
            return nn.Dense(3)(h)

    qmodel = sq.SimQAT().apply(Sown())
    variables = {k: v for k, v in qmodel.init(KEY, ROW).items() if k != "losses"}
    _, updates = qmodel.apply(variables, ROW, mutable=["quant_stats"])
    _, found = qmodel.apply({**variables, **updates}, ROW, mutable=["losses"])
    assert np.isfinite(found["losses"]["l2"][0])


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
    with pytest.raises(ValueError, match=f"batch_size .* 1 or more, got {size}"):
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


# Files of integer models -------------------------------------------------------------------------


def rewritten(path, change):
    """The file with its program changed and a checksum that fits."""
    with zipfile.ZipFile(path) as archive:
        body = archive.read("model.npz")
        header = json.loads(archive.read("header.json"))
    with np.load(io.BytesIO(body)) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    program = json.loads(held["program"].tobytes())
    change(program, held)
    held["program"] = np.frombuffer(json.dumps(program).encode(), np.uint8)
    return header, held


def written(path, header, held, compressed=False):
    body = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(body, **held)
    header = {**header, "sha256": hashlib.sha256(body.getvalue()).hexdigest()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", json.dumps(header))
        archive.writestr("model.npz", body.getvalue())


CHANGES = {
    "unknown operation": lambda p, h: p["ops"][0].update(kind="no such"),
    "missing field": lambda p, h: p.pop("outputs"),
    "missing attribute": lambda p, h: p["ops"][0].update(attributes={}),
    "missing array": lambda p, h: h.pop("0/kernel"),
    "reads what nothing makes": lambda p, h: p["ops"][0].update(inputs=[99]),
    "no such output": lambda p, h: p.update(outputs=[99]),
    "wrong type": lambda p, h: p.update(tensors=7),
    "bad grid": lambda p, h: p["tensors"][0].update(grid={"scale": 1}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_file_that_holds_something_else_is_a_value_error_with_its_path(file, name, tmp_path):
    _, folder = file
    header, held = rewritten(folder / "model", CHANGES[name])
    written(tmp_path / "changed", header, held)
    with pytest.raises(ValueError, match="changed is no integer model"):
        sq.IntegerModel.load(tmp_path / "changed")


def test_compressed_parts_are_refused_before_they_are_unpacked(file, tmp_path):
    _, folder = file
    header, held = rewritten(folder / "model", lambda p, h: None)
    held["0/kernel"] = np.zeros((1000, 1000), np.int8)
    written(tmp_path / "bomb", header, held, compressed=True)
    with pytest.raises(ValueError, match=r"bomb .* compressed"):
        sq.IntegerModel.load(tmp_path / "bomb")


def test_a_directory_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        sq.IntegerModel.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        sq.IntegerModel.load(tmp_path / "missing")
