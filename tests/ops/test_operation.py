"""Which operations ask for the codes of their inputs, so that they run on integers."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from steps import step_of

from simqat_jax.ir.compound import MatMul, Norm, Softmax
from simqat_jax.ir.graph import Add, BatchNorm, Concat, Mean


def floats(x):
    """What stays float by itself: it has a pole."""
    return jnp.log(jnp.abs(nn.Dense(6)(x)))


ASKING = {
    "mean": (Mean, lambda x: floats(x).mean(1)),
    "softmax": (Softmax, lambda x: nn.softmax(floats(x))),
    "norm": (Norm, lambda x: nn.LayerNorm()(floats(x))),
    "sum": (Add, lambda x: floats(x) + floats(x)),
    "concatenation": (Concat, lambda x: jnp.concatenate([floats(x), floats(x)], 1)),
    "matrix product": (MatMul, lambda x: floats(x) @ floats(x).swapaxes(1, 2)),
}
NOT_ASKING = {
    "sum with a constant": (Add, lambda x: floats(x) + jnp.arange(6.0)[None, None]),
    "batch norm": (BatchNorm, lambda x: nn.BatchNorm(use_running_average=True)(floats(x))),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_for_codes(name):
    kind, body = ASKING[name]
    assert step_of(kind, body, (2, 5, 4)).quantized


@pytest.mark.parametrize("name", NOT_ASKING)
def test_what_is_float_behind_float(name):
    kind, body = NOT_ASKING[name]
    assert not step_of(kind, body, (2, 5, 4)).quantized
