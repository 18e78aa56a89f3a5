"""The plan as a user reads it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import TwoLayers, initialized, step

import simqat_jax as sq
from experiments.models import LeNet5


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (16, 5))


def test_plan_of_lenet5():
    x = jnp.ones((2, 32, 32, 1))
    qmodel, variables = initialized(LeNet5(), x)
    plan = qmodel.plan(variables, x, train=False)
    outputs = [row.output.name for row in plan.rows if row.output]
    weights = [row.weight.name for row in plan.rows if row.weight]
    layers = ["Conv_0", "Conv_1", "Dense_0", "Dense_1", "Dense_2"]
    assert outputs == [f"{name}/output" for name in layers]
    assert weights == [f"{name}/kernel" for name in layers]
    assert set(plan.quantizers) == {"input", *outputs, *weights}
    assert not plan.floats
    notes = [(row.op, row.note) for row in plan.rows if row.note]
    assert notes == [
        ("max_pool", "on the grid of Conv_0/output"),
        ("max_pool", "on the grid of Conv_1/output"),
        ("reshape", "on the grid of Conv_1/output"),
    ]
    kernel = plan.quantizers["Conv_1/kernel"]
    assert (kernel.channel_axis, kernel.num_channels) == (-1, 16)
    assert plan.quantizers["input"].num_channels is None
    details = plan.details()
    for part in (
        "Conv(features=6, kernel_size=(5, 5), padding=VALID, use_bias=False) + relu",
        "8 bits, symmetric, narrow, per channel (axis -1, 16), batch",
        "8 bits, asymmetric, per tensor, ema 0.99",
    ):
        assert part in details
    assert "training steps so far: 0" in str(plan)


def test_plan_shows_ranges_delays_and_what_stays_float(x):
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            x = jax.lax.cumsum(x, 1)
            return nn.softmax(nn.Dense(3)(x))

    spec = sq.QuantSpec(quant_delay=7)
    qmodel, variables = initialized(Mixed(), x, activation=spec, exclude=("Dense_1",))
    _, variables = step(qmodel, variables, x)
    plan = qmodel.plan(variables, x)
    assert plan.quantizers["input"].lo == float(x.min())
    reasons = dict(plan.floats)
    assert reasons["cumsum"].startswith("float: no integer form")
    assert "excluded" in reasons["Dense_1/dot_general"]
    assert "activations quantizes from step 7" in str(plan)
    assert "training steps so far: 1" in str(plan)


def test_plan_computes_nothing_and_takes_shapes(x):
    qmodel, variables = initialized(TwoLayers(), x)
    shapes = jax.eval_shape(lambda v: v, variables)
    plan = qmodel.plan(shapes, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert plan.details().count("Dense(") == 2
