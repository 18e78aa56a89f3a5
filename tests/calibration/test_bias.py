"""Biases are moved by what quantization moves the means."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import Small

import simqat_jax as sq
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.walk import Walk


@pytest.fixture(scope="module")
def corrected(small):
    return sq.correct_bias(small.qmodel, small.variables, [small.x], **small.quiet)


def test_the_mean_error_is_gone(small, corrected):
    """Of each layer before its output is clipped to a range, and of what the model returns."""
    call = EvaluationCall(small.qmodel, None, {"train": False})
    walk = Walk(call, corrected, [small.x], small.floats, what="", progress=False)
    pairs = [(stop.moments().mean, stop.moments(real=True).mean) for stop in walk if stop.quantizer]
    assert len(pairs) == 2
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=1e-5)
    want = np.mean(Small().apply(small.floats, small.x), axis=0)
    before, after = (
        np.abs(np.mean(small.qmodel.apply(v, small.x, train=False), axis=0) - want)
        for v in (small.variables, corrected)
    )
    assert after.mean() < before.mean() / 20


def test_biases_alone_move(small, corrected):
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree.leaves_with_path(small.variables), jax.tree.leaves(corrected), strict=True
        )
        if not np.array_equal(old, new)
    }
    assert moved == {"params/BatchNorm_0/bias", "params/Dense_0/bias"}


def test_a_cast_bias_of_a_half_precise_model_is_found():
    model, x = nn.Dense(3, dtype=jnp.bfloat16), jnp.linspace(-1, 3, 12).reshape(3, 4)
    weight = sq.QuantSpec(
        num_bits=2, symmetric=True, per_channel=False, narrow_range=False, observer="batch"
    )
    qmodel, variables = sq.post_training_quantize(
        model,
        model.init(jax.random.key(0), x),
        [x],
        config=sq.SimQATConfig(weight=weight),
        progress=False,
    )
    assert np.any(variables["params"]["bias"])
    assert qmodel.module is model


def test_shared_biases_are_left():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4)
            return dense(nn.relu(dense(x)))

    x = jnp.ones((2, 4))
    qmodel = sq.SimQAT().apply(Twice())
    variables = sq.calibrate(qmodel, Twice().init(jax.random.key(0), x), [x], progress=False)
    with pytest.raises(ValueError, match="no layer of this model has a bias of its own"):
        sq.correct_bias(qmodel, variables, [x], progress=False)


def test_what_is_refused(small):
    with pytest.raises(ValueError, match="hold no quant_stats for"):
        sq.correct_bias(small.qmodel, small.floats, [small.x], **small.quiet)
    with pytest.raises(ValueError, match="reference holds other variables"):
        wrong = {"params": small.floats["params"]}
        sq.correct_bias(small.qmodel, small.variables, [small.x], reference=wrong, **small.quiet)
    with pytest.raises(ValueError, match="correct_bias: batches yielded nothing"):
        sq.correct_bias(small.qmodel, small.variables, [], **small.quiet)
