"""The collection `quant_stats`: as it is after training, restored, incomplete."""

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
