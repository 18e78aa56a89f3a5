"""Each observer in a whole model: trained, evaluated, converted, printed, saved and restored."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, step

import simqat_jax as sq
from simqat_jax.ir.program import grid_of


class Body(nn.Module):
    """A layer with ReLU, a sum, a constant, tensors that share a range, and the last layer."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Dense(6, name="a")(x))
        z = nn.Dense(6, name="b")(y) + y * jnp.arange(1.0, 7.0).reshape(1, 6)
        return nn.Dense(3, name="d")(jnp.concatenate([nn.Dense(2, name="c")(y), z], -1))


X = jax.random.normal(jax.random.key(3), (32, 5))
SETTINGS: dict[str, dict[str, Any]] = {
    "percentile": {"percentile": 75.0},
    "mse": {"num_bits": 4},
    "entropy": {},
    "fixed": {"range": (-2.0, 3.0)},
}
STATELESS = {"entropy": "weights", "fixed": "all"}


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request):
    """A quantized model that has trained for two steps with this observer everywhere."""
    name, settings = request.param, SETTINGS[request.param]
    weight = sq.QuantSpec(
        symmetric=True, per_channel=True, narrow_range=False, observer=name, **settings
    )
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(observer=name, **settings))
    qmodel = sq.SimQAT(config).apply(Body())
    variables = jax.jit(qmodel.init)(jax.random.key(0), X)
    train = jax.jit(lambda v, x: step(qmodel, v, x))
    for x in (X, 2 * X):
        _, variables = train(variables, x)
    return name, qmodel, variables, train


def test_codes_are_those_of_the_integer_model(trained, tmp_path):
    _, qmodel, variables, _ = trained
    model = sq.convert(qmodel, variables, X)
    want = jax.jit(qmodel.apply)(variables, 2 * X)
    assert_same(model(2 * X), want)
    assert_same(qmodel.apply(variables, 2 * X), want)
    assert len(np.unique(want)) > 5
    model.save(tmp_path / "model")
    assert_same(sq.IntegerModel.load(tmp_path / "model")(2 * X), want)


def test_what_is_kept_and_printed(trained):
    name, qmodel, variables, _ = trained
    plan, stats = qmodel.plan(variables, X), variables["quant_stats"]
    kept = {k for k, q in plan.quantizers.items() if q.role != "constant"}
    if name in STATELESS:
        kept = {k for k in kept if STATELESS[name] != "all" and not k.endswith("kernel")}
    assert set(stats) == kept | {"step"}
    text = plan.details()
    shown = {"percentile": "percentile 75", "fixed": "fixed, [-2, 3]"}
    assert shown.get(name, str(name)) in text
    for key in kept:
        assert plan.quantizers[key].lo == np.min(stats[key].lo)
        assert plan.quantizers[key].hi == np.max(stats[key].hi)
    assert all(plan.quantizers[k].lo is None for k in plan.quantizers if k.endswith("constant"))
    assert plan.quantizers["a/output"].lo == (-2 if name == "fixed" else 0)


def test_a_restored_state_goes_on(trained):
    name, qmodel, variables, train = trained
    stats, want = variables["quant_stats"], qmodel.apply(variables, X)
    for form in (lambda s: s._asdict(), list):
        plain = {k: form(s) if k != "step" else s for k, s in stats.items()}
        restored = {**variables, "quant_stats": plain}
        np.testing.assert_array_equal(qmodel.apply(restored, X), want)
        assert str(qmodel.plan(restored, X)) == str(qmodel.plan(variables, X))
        if name == "percentile" and form is list:
            got, after = train(restored, X), train(variables, X)
            jax.tree.map(np.testing.assert_array_equal, got, after)


def test_nothing_seen_and_nan(trained):
    name, qmodel, variables, train = trained
    first = jax.jit(qmodel.init)(jax.random.key(0), X)
    if name == "fixed":  # needs no data
        assert np.isfinite(qmodel.apply(first, X)).all()
        return
    with pytest.raises(ValueError, match="never observed"):
        qmodel.apply(first, X)
    _, after = train(variables, X.at[0, 0].set(jnp.nan))
    before, after = variables["quant_stats"]["input"], after["quant_stats"]
    assert after["input"].hi == before.hi
    assert sq.nonfinite_ranges(after)["input"] == 1
    assert sq.nonfinite_ranges(variables["quant_stats"]) == {}


def test_gradients_stop_where_values_are_clipped(trained):
    name, qmodel, variables, _ = trained
    if name != "percentile":
        pytest.skip("one observer tells")

    def loss(params):
        return qmodel.apply({**variables, "params": params}, X, mutable=["quant_stats"])[0].sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(variables["params"])["a"]["kernel"])
    state = variables["quant_stats"]["a/kernel"]
    share = np.abs(variables["params"]["a"]["kernel"]) / np.maximum(-state.lo, state.hi)
    assert (share > 1.01).any() and (gradient[share > 1.01] == 0).all()
    assert (gradient[share < 1] != 0).any()


# Learned steps -----------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """A convolution with BatchNorm and ReLU, and the last layer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="a")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(3, name="b")(x.mean((1, 2)))


IMAGES = jax.random.normal(jax.random.key(4), (8, 6, 6, 2))
OWN = ["quant_stats", "quant_params"]
LEARNED = ("params", "quant_params")


@pytest.fixture(scope="module")
def learned():
    """A model whose steps were set from two batches and trained for three steps."""
    weight = sq.QuantSpec(symmetric=True, per_channel=True, num_bits=4)
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(num_bits=4))
    qmodel = sq.LearnedStepSizeQuantizationAwareTraining(config).apply(Convolutional())
    first: Any = jax.jit(qmodel.init)(jax.random.key(0), IMAGES)

    @jax.jit
    def train(variables, x):
        def loss(trained):
            y, updates = qmodel.apply(
                {**variables, **trained}, x, train=True, mutable=["batch_stats", "quant_stats"]
            )
            return jnp.mean((y - 1) ** 2), updates

        trained = {k: variables[k] for k in LEARNED}
        gradients, updates = jax.grad(loss, has_aux=True)(trained)
        trained = jax.tree.map(lambda v, g: v - 0.05 * g, trained, gradients)
        return {**variables, **updates, **trained}, gradients

    def calibrate(variables, x):
        return {**variables, **qmodel.apply(variables, x, mutable=OWN)[1]}

    started = jax.jit(lambda v: calibrate(calibrate(v, IMAGES), 2 * IMAGES))(first)
    variables, gradients = started, None
    for _ in range(3):
        variables, gradients = train(variables, IMAGES)
    return qmodel, first, started, variables, gradients


def test_learned_steps_live_beside_the_float_tree(learned):
    _, first, started, _, _ = learned
    floats = jax.eval_shape(Convolutional().init, jax.random.key(0), IMAGES)
    assert jax.tree.structure(first["params"]) == jax.tree.structure(floats["params"])
    shapes = jax.tree.map(np.shape, first["quant_params"])
    tensors = dict.fromkeys(("input", "a/output", "mean/output", "b/output"), ())
    assert shapes == {"a/kernel": (4,), "b/kernel": (3,), **tensors}
    assert not any(map(np.any, first["quant_params"].values()))
    kernel = started["params"]["b"]["kernel"]
    want = 2 * np.abs(kernel).mean(0) / np.sqrt(7)
    np.testing.assert_allclose(started["quant_params"]["b/kernel"], want, rtol=1e-5)
    magnitude = 2 * (float(IMAGES.max()) - float(IMAGES.min())) / 15  # of the wider batch
    assert started["quant_params"]["input"] == pytest.approx(magnitude, rel=1e-5)


def test_learned_steps_are_trained(learned):
    _, _, started, variables, gradients = learned
    for name, now in variables["quant_params"].items():
        assert np.all(np.asarray(gradients["quant_params"][name]) != 0)
        assert np.all(now != started["quant_params"][name]) and np.all(now > 0)
    assert variables["quant_stats"]["input"].hi == started["quant_stats"]["input"].hi
    assert variables["quant_stats"]["step"] == 5


def test_learned_codes_are_those_of_the_integer_model_and_its_file(learned, tmp_path):
    qmodel, _, _, variables, _ = learned
    want = jax.jit(qmodel.apply)(variables, 2 * IMAGES)
    assert_same(qmodel.apply(variables, 2 * IMAGES), want)
    plain = {k: s._asdict() if k != "step" else s for k, s in variables["quant_stats"].items()}
    assert_same(qmodel.apply({**variables, "quant_stats": plain}, 2 * IMAGES), want)
    assert len(np.unique(want)) > 3
    model = sq.convert(qmodel, variables, IMAGES)
    assert_same(model(2 * IMAGES), want)
    grid = grid_of(model.tensors[model.inputs[0]])
    assert grid.scale == pytest.approx(float(variables["quant_params"]["input"]), rel=1e-6)
    sq.export_tflite(model, tmp_path / "model.tflite")
    compared = sq.verify(model, tmp_path / "model.tflite", np.asarray(2 * IMAGES))
    assert compared.codes == want.size and compared.differing == 0


def test_learned_steps_in_the_plan(learned):
    qmodel, first, _, variables, _ = learned
    plan = qmodel.plan(variables, IMAGES)
    step = float(variables["quant_params"]["input"])
    info = plan.quantizers["input"]
    assert info.hi - info.lo == pytest.approx(15 * step, rel=1e-6)
    assert "learned" in str(plan) and qmodel.plan(first, IMAGES).quantizers["input"].lo is None


def test_learned_steps_that_are_missing(learned):
    qmodel, first, _, variables, _ = learned
    for call in (qmodel.apply, lambda v, x: sq.convert(qmodel, v, x)):
        with pytest.raises(ValueError, match=r"learned steps of input.*are 0.*quant_params"):
            call(first, IMAGES)
    without = {k: v for k, v in variables.items() if k != "quant_params"}
    for mutable in ([], ["quant_stats"]):
        with pytest.raises(ValueError, match="hold no quant_params for input"):
            qmodel.apply(without, IMAGES, mutable=mutable)
    y = jax.jit(qmodel.apply)({**variables, "quant_params": first["quant_params"]}, IMAGES)
    assert np.isnan(y).all()  # under jit values are not at hand


def test_a_learned_step_that_training_brings_below_zero_is_its_magnitude(learned):
    qmodel, _, _, variables, _ = learned
    kernel = variables["quant_params"]["a/kernel"].at[1].multiply(-1)
    negative = {
        **variables["quant_params"],
        "a/kernel": kernel,
        "input": -variables["quant_params"]["input"],
    }
    below = {**variables, "quant_params": negative}
    qmodel.check(below)
    want = qmodel.apply(variables, IMAGES)
    assert_same(qmodel.apply(below, IMAGES), want)
    assert_same(sq.convert(qmodel, below, IMAGES)(IMAGES), want)

    def loss(steps):
        trained = {**variables, "quant_params": steps}
        mutable = ["batch_stats", "quant_stats"]
        return jnp.sum(qmodel.apply(trained, IMAGES, train=True, mutable=mutable)[0] ** 2)

    up, down = jax.grad(loss)(variables["quant_params"]), jax.grad(loss)(negative)
    for name, steps in negative.items():
        np.testing.assert_allclose(down[name], up[name] * np.sign(steps), rtol=1e-6)


DELAY = 3


@pytest.fixture(scope="module")
def delayed():
    """A model whose steps start when quantization does, in one compiled step, and its history."""
    spec = {"observer": "learned", "num_bits": 4, "quant_delay": DELAY}
    config = sq.SimQATConfig(
        weight=sq.QuantSpec.weight(**spec), activation=sq.QuantSpec(**spec), freeze_bn=DELAY + 1
    )
    qmodel = sq.SimQAT(config).apply(Convolutional())

    @jax.jit
    def train(variables, x):
        def loss(trained):
            every = ["batch_stats", *OWN]
            y, updates = qmodel.apply({**variables, **trained}, x, train=True, mutable=every)
            return jnp.mean((y - 1) ** 2), updates

        trained = {k: variables[k] for k in LEARNED}
        gradients, updates = jax.grad(loss, has_aux=True)(trained)
        new = jax.tree.map(lambda v, g: v - 0.05 * g, trained, gradients)
        new["quant_params"] = jax.tree.map(
            lambda old, new, start: jnp.where(old == 0, start, new),
            *(tree["quant_params"] for tree in (trained, new, updates)),
        )
        return {**variables, **updates, **new}

    variables: Any = jax.jit(qmodel.init)(jax.random.key(0), IMAGES)
    history = [variables]
    for number in range(DELAY + 3):
        if number == DELAY + 1:  # a run that was interrupted: plain dictionaries come back
            stats = history[-1]["quant_stats"]
            plain = {k: s._asdict() if k != "step" else s for k, s in stats.items()}
            history[-1] = {**history[-1], "quant_stats": jax.tree.map(np.asarray, plain)}
        history.append(train(history[-1], (10 if number < DELAY else 1) * IMAGES))
    return qmodel, history


def test_until_they_start_delayed_steps_are_none_and_evaluation_is_float(delayed):
    qmodel, history = delayed
    for variables in history[: DELAY + 1]:
        assert not any(map(np.any, variables["quant_params"].values()))
    for variables in history[1:DELAY]:
        floats = {k: v for k, v in variables.items() if k not in OWN}
        want = Convolutional().apply(floats, IMAGES)
        qmodel.check(variables)
        for apply in (qmodel.apply, jax.jit(qmodel.apply)):
            np.testing.assert_allclose(apply(variables, IMAGES), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="trained for 2 steps and quantizes from step 3"):
        sq.convert(qmodel, history[2], IMAGES)
    assert len(np.unique(qmodel.apply(history[DELAY], IMAGES))) <= 16  # as it would start now


def test_delayed_steps_start_from_the_data_of_the_first_step_that_quantizes(delayed):
    _, history = delayed
    before, started, later = history[DELAY], history[DELAY + 1], history[-1]
    kernel = np.abs(before["params"]["b"]["kernel"]).mean(0)
    want = 2 * kernel / np.sqrt(7)
    np.testing.assert_allclose(started["quant_params"]["b/kernel"], want, rtol=1e-5)
    magnitude = (float(IMAGES.max()) - float(IMAGES.min())) / 15  # not of the wide batches before
    assert started["quant_params"]["input"] == pytest.approx(magnitude, rel=1e-5)
    for name, now in later["quant_params"].items():
        assert np.all(now > 0) and np.any(now != started["quant_params"][name]), name


def test_codes_of_delayed_steps(delayed):
    qmodel, history = delayed
    model = sq.convert(qmodel, history[-1], IMAGES)
    want = jax.jit(qmodel.apply)(history[-1], 10 * IMAGES)
    assert_same(model(10 * IMAGES), want)
    assert len(np.unique(want)) > 3
    unset = {**history[-1], "quant_params": history[0]["quant_params"]}
    with pytest.raises(ValueError, match=r"learned steps of input.*once their quant_delay has"):
        qmodel.apply(unset, IMAGES)
    with pytest.raises(ValueError, match="learned steps of a/kernel"):
        qmodel.check(unset)


def test_golden_sticks_name_learns_both_and_keeps_the_rest():
    config = sq.SimQATConfig(activation=sq.QuantSpec(num_bits=4), freeze_bn=3)
    learning = sq.LearnedStepSizeQuantizationAwareTraining(config).config
    assert learning.freeze_bn == 3 and learning.activation.num_bits == 4
    assert learning.weight.observer == learning.activation.observer == "learned"
    with pytest.raises(TypeError, match="takes a SimQATConfig"):
        sq.LearnedStepSizeQuantizationAwareTraining(3)
