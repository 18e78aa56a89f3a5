"""For one key the initial values are the float module's, however it holds its submodules."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (2, 8))
RNGS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}


class Holds(nn.Module):
    """Holds modules in whatever its attribute is."""

    held: Any

    @nn.compact
    def __call__(self, x):
        held = self.held.values() if hasattr(self.held, "values") else self.held
        for layer in held if isinstance(held, Sequence) or hasattr(self.held, "values") else [held]:
            x = nn.relu(layer(x))
        return nn.Dense(3)(x)


class Twice(nn.Module):
    layer: nn.Module

    def __call__(self, x):
        return self.layer(self.layer(x))


class InSetup(nn.Module):
    inner: nn.Module

    def setup(self):
        self.own = [nn.Dense(8), self.inner.clone()]
        self.norm = nn.BatchNorm(use_running_average=True)

    def __call__(self, x):
        for layer in self.own:
            x = layer(x)
        return self.norm(self.inner(x))

    def head(self, x):
        return self.own[0](x)


class Makes(nn.Module):
    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(self.make()(x))
        x = x + self.param("bias", nn.initializers.normal(), (8,))[None]
        return nn.remat(nn.Dense)(8, name="module")(x)


class Inside(nn.Module):
    """A model with a part that is quantized."""

    make: Callable[[], nn.Module]
    quantized: bool = False

    @nn.compact
    def __call__(self, x):
        part = self.make().clone(parent=None)
        if self.quantized:
            part = sq.SimQAT().apply(part, name="part")
        else:
            part = part.clone(parent=self, name="part")
        return nn.Dense(2)(part(part(nn.Dense(8)(x))))


MODELS = {
    "sequential": lambda: nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]),
    "nested": lambda: nn.Sequential([nn.Sequential([nn.Dense(8)]), nn.Sequential([nn.Dense(3)])]),
    "attribute": lambda: Holds(nn.Dense(8)),
    "deep attribute": lambda: Holds(Holds(Holds(nn.Dense(8)))),
    "list": lambda: Holds([nn.Dense(8), nn.Dense(4)]),
    "tuple": lambda: Holds((nn.Dense(8), Holds([nn.Dense(4)]))),
    "dict": lambda: Holds({"a": nn.Dense(8), "b": nn.Dense(4)}),
    "named": lambda: Holds(nn.Dense(8, name="special")),
    "shared": lambda: Twice(nn.Dense(8)),
    "setup": lambda: InSetup(nn.Dense(8)),
    "made": lambda: Makes(lambda: nn.Dense(8)),
    "a layer": lambda: nn.Dense(4),
    "rnn": lambda: Holds([nn.Dense(8), nn.Sequential([nn.Dense(8), nn.LayerNorm()])]),
}


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rngs", [RNGS["params"], RNGS], ids=["key", "keys"])
def test_initial_values_are_the_float_modules(name, rngs):
    rngs = RNGS if name == "made" else rngs
    want = MODELS[name]().init(rngs, X)
    got = dict(sq.SimQAT().apply(MODELS[name]()).init(rngs, X))
    del got["quant_stats"]
    assert_equal_trees(got, dict(want))


def test_of_another_method():
    want = InSetup(nn.Dense(8)).init(RNGS, X, method="head")
    got = sq.SimQAT().apply(InSetup(nn.Dense(8))).init(RNGS, X, method=InSetup.head)
    assert_equal_trees(got["params"], want["params"])


def test_with_output_and_some_collections():
    qmodel = sq.SimQAT().apply(Holds(nn.Dense(8)))
    want, variables = Holds(nn.Dense(8)).init_with_output(RNGS, X, mutable=["params"])
    got, quantized = qmodel.init_with_output(RNGS, X, mutable=["params", "quant_stats"])
    np.testing.assert_array_equal(got, want)
    assert_equal_trees(quantized["params"], variables["params"])
    assert set(quantized) == {"params", "quant_stats"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential([nn.Dense(8, parent=None), nn.relu], parent=None),
        lambda: Twice(nn.Dense(8, parent=None), parent=None),
        lambda: nn.Dense(8, parent=None),
    ],
)
def test_inside_of_another_model(make):
    """Also where it is called twice."""
    want = Inside(make).init(RNGS, X)
    got = Inside(make, quantized=True).init(RNGS, X)
    assert_equal_trees(got["params"], want["params"])


def test_of_the_page():
    """The example of the documentation: the float module's values, then training."""
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
    qmodel = sq.SimQAT().apply(model)
    variables = jax.jit(qmodel.init)(RNGS["params"], X)
    y, _ = qmodel.apply(variables, X, mutable=["quant_stats"])
    want = model.apply({"params": model.init(RNGS["params"], X)["params"]}, X)
    assert jnp.abs(y - want).max() < 0.05 * jnp.abs(want).max()
