"""Statistics of BatchNorm, as the quantized model computes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import Small, few_bits

import simqat_jax as sq


def test_statistics_are_those_of_the_data(small):
    """With 16 bits they are the float model's, which NumPy takes."""
    qmodel = sq.SimQAT(few_bits(16)).apply(Small())
    floats = jax.tree.map(jnp.asarray, small.floats)
    floats["params"]["BatchNorm_0"]["scale"] = floats["params"]["BatchNorm_0"]["scale"].at[2].set(0)
    variables = sq.calibrate(qmodel, floats, [small.x], **small.quiet)
    got = sq.reestimate_batch_norm(qmodel, variables, [small.x], **small.quiet)
    conv = nn.Conv(6, (3, 3), use_bias=False)
    y = np.asarray(conv.apply({"params": floats["params"]["Conv_0"]}, small.x), np.float64)
    want = {"mean": y.mean(axis=(0, 1, 2)), "var": y.var(axis=(0, 1, 2))}
    for name, old in floats["batch_stats"]["BatchNorm_0"].items():
        new = np.asarray(got["batch_stats"]["BatchNorm_0"][name])
        assert new[2] == old[2]  # its scale is zero: what it was computed from, nobody can tell
        alive = np.arange(6) != 2
        np.testing.assert_allclose(new[alive], want[name][alive], rtol=2e-3, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, got["params"], floats["params"])


def test_a_model_without_batch_norm_is_refused():
    x = jnp.ones((2, 3))
    qmodel = sq.SimQAT().apply(nn.Dense(2))
    variables = sq.calibrate(qmodel, nn.Dense(2).init(jax.random.key(0), x), [x], progress=False)
    with pytest.raises(ValueError, match="no BatchNorm with statistics of its own"):
        sq.reestimate_batch_norm(qmodel, variables, [x], progress=False)
