"""The walk through a model holds what the model computes, and no more than it needs."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from small_model import Small

import simqat_jax as sq
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.walk import Walk
from simqat_jax.ir.graph import Product


def test_its_float_side_is_the_float_model(small):
    call = EvaluationCall(small.qmodel, None, {"train": False})
    walk = Walk(call, small.variables, [small.x], what="", progress=False)
    layers = (stop for stop in walk if isinstance(stop.step.node, Product))
    *_, (mean, var) = [stop.moments(real=True) for stop in layers]
    want = np.asarray(Small().apply(small.floats, small.x))
    np.testing.assert_allclose(mean, want.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(var, want.var(axis=0), rtol=1e-4)
    variables = set(walk.placement.graph.inputs)
    assert set(walk.lanes[0].real.env) - variables == {walk.placement.steps[-1].output}


def test_models_that_depend_on_the_batch_size_are_refused():
    class Depends(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            return nn.relu(x + 1) if len(x) > 2 else x

    x = np.ones((4, 3), np.float32)
    qmodel = sq.SimQAT().apply(Depends())
    floats = Depends().init(jax.random.key(0), x)
    variables = sq.calibrate(qmodel, floats, [x], progress=False)
    with pytest.raises(ValueError, match="Give all batches one shape: leave out a smaller last"):
        sq.correct_bias(qmodel, variables, [x, x[:2]], progress=False)
