"""What a program cannot hold is refused by name; what a model returns keeps its structure."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import observed
from zoo import Model

import simqat_jax as sq

X, IDS = jnp.linspace(-1, 1, 24).reshape(4, 6), jnp.arange(4).reshape(4, 1)


class Scaled(nn.Module):
    """A parameter of an operation that is no layer, whole numbers beside, and several outputs."""

    @nn.compact
    def __call__(self, x, ids):
        scale = self.param("scale", nn.initializers.ones, (1, 6))
        y = nn.Dense(3)(nn.tanh(nn.Dense(6)(x) * scale))
        return {"a": [y, (None, ids + jnp.array([[1, 2]]))], "b": (nn.relu(y),), "c": {}}


@pytest.fixture(scope="module")
def scaled():
    return observed(Scaled(), X, IDS)


@pytest.mark.parametrize("place", [0, 5])
def test_a_parameter_of_an_operation_that_holds_nan(scaled, place):
    qmodel, variables, _ = scaled
    params = variables["params"]
    params = params | {"scale": params["scale"].at[0, place].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"mul: a parameter of mul holds NaN\. Train again"):
        sq.convert(qmodel, {**variables, "params": params}, X, IDS)


def test_the_structure_and_the_names_of_inputs(scaled):
    qmodel, variables, y = scaled
    model = sq.convert(qmodel, variables, X, IDS)
    assert jax.tree.structure(model(X, IDS)) == jax.tree.structure(y)
    assert model.structure == {"a": [0, (None, 1)], "b": (2,), "c": {}}
    tensors = [model.tensors[i] for i in model.inputs]
    assert [t.name for t in tensors] == ["input", "input_1"]
    assert [t.grid is None for t in tensors] == [False, True]


def test_what_is_returned_and_no_array():
    qmodel, variables, _ = observed(Model(lambda x: [nn.Dense(3)(x), 1.5]), X)
    with pytest.raises(ValueError, match=r"models that return arrays, and this returns \[1.5\]"):
        sq.convert(qmodel, variables, X)
