"""Calibration: ranges of all batches, and nothing else moves."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq


class Net(nn.Module):
    """Two layers, BatchNorm and a dropout."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5)(x.mean(axis=(1, 2)))


class TwoInputs(nn.Module):
    """A sum of two layers."""

    @nn.compact
    def __call__(self, a, b, scale=1.0):
        return nn.Dense(3)(a) + scale * nn.Dense(3)(b)


RNG = np.random.default_rng(0)
X = [RNG.normal(size=(n, 6, 6, 2)).astype(np.float32) * n for n in (4, 4, 2)]
FLOATS: Any = Net().init(jax.random.key(0), X[0])
QMODEL = sq.SimQAT().apply(Net())


def calibrated(batches: Any, variables: Any = FLOATS, qmodel: Any = QMODEL) -> Any:
    return sq.calibrate(qmodel, variables, batches, progress=False, train=False)


@pytest.fixture(scope="module")
def variables():
    """Of a float model that has never been quantized, calibrated on batches of two sizes."""
    return calibrated(X)


def same(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_nothing_but_ranges_moves(variables):
    same({name: variables[name] for name in FLOATS}, FLOATS)
    assert variables["quant_stats"]["step"] == 0


def test_ranges_are_those_of_all_batches(variables):
    lo, hi, _ = variables["quant_stats"]["input"]
    assert (lo, hi) == (min(x.min() for x in X), max(x.max() for x in X))
    float_outputs = np.concatenate([Net().apply(FLOATS, x) for x in X])
    lo, hi, _ = variables["quant_stats"]["Dense_0/output"]
    np.testing.assert_allclose((lo, hi), (float_outputs.min(), float_outputs.max()), rtol=1e-5)


@pytest.mark.parametrize("observer", ["ema", "minmax", "batch"])
def test_no_observer_of_extremes_forgets(observer):
    activation = sq.QuantSpec(observer=observer)
    qmodel = sq.SimQAT(sq.SimQATConfig(activation=activation)).apply(nn.Dense(2))
    floats = nn.Dense(2).init(jax.random.key(0), X[0])
    lo, hi, _ = sq.calibrate(qmodel, floats, X[:2], progress=False)["quant_stats"]["input"]
    assert (lo, hi) == (min(x.min() for x in X), max(x.max() for x in X))


def test_a_second_call_goes_on(variables):
    same(calibrated(iter(X[1:]), calibrated(x for x in X[:1])), variables)


def test_evaluation_and_integer_model_take_what_it_returns(variables):
    want = QMODEL.apply(variables, X[0], train=False)
    np.testing.assert_allclose(want, Net().apply(FLOATS, X[0]), atol=0.05)
    model = sq.convert(QMODEL, variables, X[0], train=False)
    np.testing.assert_array_equal(model(X[0]), want)


def test_steps_of_training_stay_and_ranges_go_on():
    x, qmodel = X[2], sq.SimQAT().apply(nn.Dense(2))
    trained: Any = nn.Dense(2).init(jax.random.key(0), x)
    for _ in range(2):
        _, updates = qmodel.apply(trained, x, mutable=["quant_stats"])
        trained = {**trained, **updates}
    stats = sq.calibrate(qmodel, trained, [2 * x], progress=False)["quant_stats"]
    assert stats["step"] == 2
    assert stats["input"].hi == 2 * x.max()


def test_learned_steps_are_those_of_least_squared_error():
    floats, batches = nn.Dense(2).init(jax.random.key(0), X[0]), X[:2]

    def taken(observer, variables, batches=batches):
        weight = sq.QuantSpec.weight(num_bits=4, observer=observer)
        activation = sq.QuantSpec(num_bits=4, observer=observer)
        qmodel = sq.SimQAT(sq.SimQATConfig(weight=weight, activation=activation)).apply(nn.Dense(2))
        return qmodel, sq.calibrate(qmodel, variables, batches, progress=False)

    qmodel, learned = taken("learned", floats)
    best, least = taken("mse", floats)
    quantizers = qmodel.plan(learned, X[0]).quantizers
    steps = learned["quant_params"]
    assert steps.keys() == quantizers.keys()
    for name, step in steps.items():
        lo, hi, *_ = least["quant_stats"][name]
        np.testing.assert_array_equal(step, sq.quant_params(lo, hi, quantizers[name].spec).scale)
    # The same grids, to the rounding of a range that is made of a step.
    np.testing.assert_allclose(qmodel.apply(learned, X[0]), best.apply(least, X[0]), atol=1e-5)
    same(taken("learned", learned, X[:1])[1], taken("learned", floats, X[:1])[1])


def test_several_inputs():
    a, b = jnp.ones((2, 4)), -3 * jnp.ones((2, 5))
    qmodel = sq.SimQAT().apply(TwoInputs())
    floats = TwoInputs().init(jax.random.key(0), a, b)
    kwargs = {"scale": 2.0, "progress": False}
    stats = sq.calibrate(qmodel, floats, [(a, b), (2 * a, b)], **kwargs)["quant_stats"]
    assert stats["input/0"].hi == 2
    assert stats["input/1"].lo == -3


def test_batches_with_nan_are_left_out_and_named(variables):
    broken = X[0].copy()
    broken[1, 2, 3, 0] = np.nan
    with pytest.warns(UserWarning, match=r"1 of 4 batches.*batch 1: Conv_0/output, .*input"):
        got = calibrated([X[0], broken, *X[1:]])["quant_stats"]
    for name, state in variables["quant_stats"].items():
        same(got[name], state if name == "step" else state._replace(nonfinite=np.int32(1)))
    counts = sq.nonfinite_ranges(got)
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], ValueError, "yielded nothing"),
        (X[0], TypeError, r"an array of shape .* Pass a list"),
        (7, TypeError, "got 7"),
        ({"x": X[0]}, TypeError, "must yield batches"),
        ([X[2], X[2][:0]], ValueError, r"batch 1 holds an array of shape \(0, 6, 6, 2\)"),
        ([X[2] * np.inf], ValueError, "NaN or Inf in every batch"),
    ],
)
def test_what_is_no_data_is_refused(batches, error, words):
    with pytest.raises(error, match=words):
        calibrated(batches)


def test_labels_among_the_arguments_are_named():
    qmodel, x = sq.SimQAT().apply(nn.Dense(2)), np.ones((3, 2), np.float32)
    floats = nn.Dense(2).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match=r"a tuple of 2: .* \[x for x, y in batches\]"):
        sq.calibrate(qmodel, floats, [(x, np.zeros(3))], progress=False)


def test_a_call_of_training_is_refused():
    with pytest.raises(ValueError, match="Pass the arguments of evaluation, such as train=False"):
        sq.calibrate(QMODEL, FLOATS, X, progress=False, train=True)
    norm = sq.SimQAT().apply(nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=False)]))
    floats = norm.init(jax.random.key(0), X[2])
    with pytest.raises(ValueError, match="layers_1: calibration makes the call of evaluation"):
        sq.calibrate(norm, floats, X, progress=False)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match="qmodule must be a QuantizedModule"):
        sq.calibrate(Net(), FLOATS, X)
    with pytest.raises(TypeError, match="variables must be a dictionary"):
        sq.calibrate(QMODEL, None, X)


def test_progress_is_written_to_stderr(capsys):
    floats = nn.Dense(2).init(jax.random.key(0), X[0])
    sq.calibrate(sq.SimQAT().apply(nn.Dense(2)), floats, [X[0], X[1]])
    out, err = capsys.readouterr()
    assert not out
    assert "calibrate: batch 2 of 2, " in err


def test_ranges_of_kernels_with_a_state_are_observed():
    weight = dataclasses.replace(sq.SimQATConfig().weight, observer="minmax")
    qmodel = sq.SimQAT(sq.SimQATConfig(weight=weight)).apply(nn.Dense(2))
    floats: Any = nn.Dense(2).init(jax.random.key(0), X[0])
    stats = sq.calibrate(qmodel, floats, [X[0]], progress=False)["quant_stats"]
    np.testing.assert_array_equal(stats["kernel"].hi, floats["params"]["kernel"].max(axis=0))
