"""Where a tensor is largest is found from its codes wherever these have the order of its values."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import KEY
from zoo import Model

import simqat_jax as sq
from simqat_jax.numerics.spec import QuantSpec

CHANNELS = QuantSpec(per_channel=True)


def layer(x):
    return nn.Dense(6)(x)


ON_CODES = {
    "along channels": (lambda x: jnp.argmax(layer(x), -1), QuantSpec()),
    "lowest": (lambda x: jnp.argmin(layer(x), 0), QuantSpec()),
}
ON_VALUES = {
    "a grid for each channel": (lambda x: jnp.argmax(layer(x), -1), CHANNELS),
    "fewer digits": (lambda x: jnp.argmax(layer(x).astype(jnp.bfloat16), -1), QuantSpec()),
    "another type of index": (lambda x: lax.argmax(layer(x), 1, jnp.int16), QuantSpec()),
    "what has no codes": (lambda x: jnp.argmax(jnp.log(jnp.abs(layer(x))), -1), QuantSpec()),
}
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 5)), jnp.float32)


@pytest.mark.parametrize("name", [*ON_CODES, *ON_VALUES])
def test_which_positions_are_those_of_codes(name):
    body, activation = (ON_CODES | ON_VALUES)[name]
    qmodel = sq.SimQAT(sq.SimQATConfig(activation=activation)).apply(Model(body))
    variables = qmodel.init(KEY, X)
    row = next(row for row in qmodel.plan(variables, X).rows if row.kind == "position")
    assert (row.note == "of its codes") == (name in ON_CODES)
    if activation.per_channel:  # which no integer model has
        return
    variables |= qmodel.apply(variables, X, mutable=["quant_stats"])[1]
    integer = sq.convert(qmodel, variables, X)
    np.testing.assert_array_equal(integer(X), qmodel.apply(variables, X))
    kinds = {op.kind for op in integer.program.ops}
    assert bool(kinds & {"argmax", "argmin"}) == (name in ON_CODES)
