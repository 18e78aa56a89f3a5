"""Each observer in a whole model: trained, evaluated, converted, printed, saved and restored."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, step

import simqat_jax as sq


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
    weight = sq.QuantSpec(symmetric=True, per_channel=True, observer=name, **settings)
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
    text = str(plan)
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
