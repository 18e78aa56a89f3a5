"""A layer's arrays are computed once, and however they are compiled."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.ops import shared
from simqat_jax.ops.shared import SharedLayers


def test_the_same_operands_and_numbers_are_computed_once():
    layers, computed = SharedLayers(), []
    x, y = np.ones(3, np.float32), np.ones(3, np.float32)

    def doubled(operands, number, name="kernel"):
        def arguments():
            computed.append(name)
            return operands, number

        given = [{name: operands}]
        return layers.arrays(
            "alike", lambda x, n: {"sum": 2 * x + n}, given, (np.float32(number),), arguments
        )

    first = doubled(x, 1)
    np.testing.assert_array_equal(first.pop("sum"), [3, 3, 3])
    np.testing.assert_array_equal(doubled(x, 1)["sum"], [3, 3, 3])  # also after the `pop`
    assert len(computed) == 1
    np.testing.assert_array_equal(doubled(x, 2)["sum"], [4, 4, 4])
    doubled(y, 2)  # equal, but other objects
    doubled(y, 2, "bias")
    assert len(computed) == 4


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(7, (3, 3))(x)))
        return nn.Dense(5)(x.reshape(len(x), -1))


@pytest.fixture(scope="module")
def trained():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    qmodel = sq.SimQAT().apply(Layers())

    @jax.jit
    def observe():
        variables = qmodel.init(jax.random.key(1), x)
        _, state = qmodel.apply(variables, x, mutable=["quant_stats"])
        return {**variables, **state}

    return qmodel, observe(), x


def test_how_it_is_compiled_changes_no_bit(trained, monkeypatch):
    qmodel, variables, x = trained

    def arrays():
        model = sq.convert(qmodel, variables, x)
        return [(op.path, name, a.tobytes()) for op in model.ops for name, a in op.arrays.items()]

    small = arrays()
    monkeypatch.setattr(shared, "_LARGE", 0)
    large = arrays()
    monkeypatch.setattr(shared, "_options", lambda large: {})
    assert small == large == arrays()
    assert len(small) == 8
