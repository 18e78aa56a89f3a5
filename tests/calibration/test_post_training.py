"""From a float model to an integer one, in one call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import Small, few_bits

import simqat_jax as sq


def test_it_comes_closer_to_float_than_ranges_alone_and_converts(small):
    data = (part for part in [small.x])
    given = {"config": few_bits(), "recipe": "accurate", **small.quiet}
    qmodel, variables = sq.post_training_quantize(Small(), small.floats, data, **given)
    got = np.asarray(qmodel.apply(variables, small.x, train=False))
    model = sq.convert(qmodel, variables, small.x, train=False)
    np.testing.assert_array_equal(model(small.x), got)
    want = np.asarray(Small().apply(small.floats, small.x))
    calibrated = np.asarray(small.qmodel.apply(small.variables, small.x, train=False))
    assert np.mean((got - want) ** 2) < np.mean((calibrated - want) ** 2) / 4


def test_a_model_without_biases_is_taken():
    model, x = nn.Dense(2, use_bias=False), jnp.linspace(-1, 1, 8).reshape(2, 4)
    floats = model.init(jax.random.key(0), x)
    _, variables = sq.post_training_quantize(model, floats, [x], progress=False)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], floats["params"])


def test_what_is_refused(small):
    given = (Small(), small.floats)
    with pytest.raises(ValueError, match="recipe must be 'fast' or 'accurate', got 'best'"):
        sq.post_training_quantize(*given, [small.x], recipe="best")
    with pytest.raises(TypeError, match="batches must yield batches"):
        sq.post_training_quantize(*given, small.x)
    config = sq.SimQATConfig(activation=sq.QuantSpec(quant_delay=7))
    with pytest.raises(ValueError, match=r"SimQATConfig.activation has a quant_delay of 7"):
        sq.post_training_quantize(*given, [small.x], config=config)
    with pytest.raises(ValueError, match="calibrate: batches yielded nothing"):
        sq.post_training_quantize(*given, [], **small.quiet)
