"""The collection `quant_stats`: as it is after training, restored, incomplete."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TwoLayers, initialized, step

import simqat_jax as sq


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (16, 5))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nonfinite_batch_is_reported_and_poisons_nothing(bad, x):
    qmodel, variables = initialized(TwoLayers(), x)
    _, variables = step(qmodel, variables, x)
    before = variables["quant_stats"]
    _, variables = step(qmodel, variables, x.at[3, 2].set(bad))
    after = variables["quant_stats"]
    assert sq.nonfinite_ranges(before) == {}
    assert sq.nonfinite_ranges(after)["input"] == 1
    assert (after["input"].lo, after["input"].hi) == (before["input"].lo, before["input"].hi)
    assert "NaN or Inf was seen" in str(qmodel.plan(variables, x))
    assert np.isfinite(qmodel.apply(variables, x)).all()


def test_state_restored_as_dictionaries_works(x):
    qmodel, variables = initialized(TwoLayers(), x)
    _, variables = step(qmodel, variables, x)
    want = qmodel.apply(variables, x)
    plain = {k: s._asdict() if k != "step" else s for k, s in variables["quant_stats"].items()}
    for restored in (plain, {k: list(s.values()) if k != "step" else s for k, s in plain.items()}):
        restored = {**variables, "quant_stats": restored}
        np.testing.assert_array_equal(qmodel.apply(restored, x), want)
        assert str(qmodel.plan(restored, x)) == str(qmodel.plan(variables, x))
    bad = {**plain, "input": {**plain["input"], "nonfinite": 3}}
    assert sq.nonfinite_ranges(bad) == {"input": 3}
    assert sq.nonfinite_ranges({"inner": bad}) == {"inner/input": 3}
    with pytest.raises(TypeError, match=r"is no range\. Pass the collection"):
        sq.nonfinite_ranges(variables)


def test_missing_and_unobserved_ranges(x):
    qmodel, variables = initialized(TwoLayers(), x)
    with pytest.raises(ValueError, match="no quant_stats for input, Dense_0/output"):
        qmodel.apply({"params": variables["params"]}, x)
    with pytest.raises(ValueError, match="input, Dense_0/output, Dense_1/output were never"):
        qmodel.apply(variables, x)
    assert np.isnan(jax.jit(qmodel.apply)(variables, x)).all()
    _, updates = qmodel.apply({"params": variables["params"]}, x, mutable=["quant_stats"])
    assert set(updates["quant_stats"]) == set(variables["quant_stats"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))


def test_check_before_a_long_evaluation(x):
    qmodel = sq.SimQAT().apply(Normed())
    first = qmodel.init(jax.random.key(0), x)
    for call in ((first,), (first, x)):
        with pytest.raises(ValueError, match=r"were never observed.*calibrate\(") as caught:
            qmodel.check(*call)
        names = str(caught.value).removeprefix("the ranges of ").split(" were")[0].split(", ")
        assert sorted(names) == ["Dense_0/output", "Dense_1/output", "input"]
    with pytest.raises(ValueError, match="hold no quant_stats"):
        qmodel.check({"params": first["params"]})
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(qmodel.check)(first)
    good = sq.calibrate(qmodel, first, [x], progress=False)  # the remedy
    qmodel.check(good)
    qmodel.check(good, jax.ShapeDtypeStruct(x.shape, x.dtype), train=False)
    plain = {k: list(s) if k != "step" else s for k, s in good["quant_stats"].items()}
    qmodel.check({**good, "quant_stats": {"inside": plain}})  # as checkpoints and models hold them
    plain["input"][1] = np.inf
    with pytest.raises(ValueError, match="input hold NaN or Inf"):
        qmodel.check({**good, "quant_stats": plain})


def test_check_of_learned_steps(x):
    qmodel = sq.LearnedStepSizeQuantizationAwareTraining().apply(TwoLayers())
    variables = sq.calibrate(qmodel, qmodel.init(jax.random.key(0), x), [x], progress=False)
    qmodel.check(variables)
    variables["quant_params"] = {**variables["quant_params"], "input": jnp.float32(0)}
    with pytest.raises(ValueError, match=r"learned steps of input are 0.*calibrate\("):
        qmodel.check(variables)


def test_a_delay_of_other_quantizers_excuses_no_learned_step(x):
    activation = sq.QuantSpec(quant_delay=1000)
    config = sq.SimQATConfig(weight=sq.QuantSpec.weight(observer="learned"), activation=activation)
    qmodel = sq.SimQAT(config).apply(TwoLayers())
    variables = sq.calibrate(qmodel, qmodel.init(jax.random.key(0), x), [x], progress=False)
    qmodel.check(variables)
    unset = {name: 0 * step for name, step in variables["quant_params"].items()}
    with pytest.raises(ValueError, match=r"learned steps of .* are 0"):
        qmodel.check({**variables, "quant_params": unset})


def test_a_training_call_that_leaves_statistics_immutable(x):
    qmodel = sq.SimQAT().apply(Normed())
    variables = qmodel.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"batch_stats.*immutable\. Train with mutable=\['batch"):
        qmodel.apply(variables, x, train=True, mutable=["quant_stats"])
    qmodel.apply(variables, x, train=False, mutable=["quant_stats"])  # the remedies
    qmodel.apply(variables, x, train=True, mutable=["batch_stats", "quant_stats"])
