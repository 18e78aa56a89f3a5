"""Which operations ask for the codes of their inputs, so that they run on integers."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from steps import planned, step_of

from simqat_jax.ir.compound import MatMul, Norm, Softmax, Spread
from simqat_jax.ir.graph import Add, BatchNorm, Concat, Mean, Mul, Product


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


def test_what_computes_a_relu_behind_it():
    """With a grid that ends at zero in the place of two."""

    def body(x):
        y, z = nn.Dense(6)(x), nn.Dense(6)(x)
        joined = [y + z, y * z, y @ z.swapaxes(1, 2)]
        normed = [nn.LayerNorm()(y), nn.BatchNorm(use_running_average=True)(y)]
        return [nn.relu(v) for v in (nn.Dense(6)(x), *joined, *normed, y.mean(1), y.std(1))]

    kinds = {type(s.node) for s in planned(body, (2, 5, 4)).steps if s.clamp}
    assert kinds == {Product, Add, Mul, MatMul, Norm, BatchNorm, Mean, Spread}
