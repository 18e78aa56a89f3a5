"""A function of each element is a table of every code."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from single_operations import integer_model, operation
from steps import codes_of, step_of

import simqat_jax as sq
from simqat_jax.integer.check import check
from simqat_jax.ir.graph import Clamp, Elementwise
from simqat_jax.ir.program import Tensor
from simqat_jax.numerics.grid import Codes
from simqat_jax.ops.registry import operation_of

NO_GRAPH: Any = None
GRIDS = [sq.Grid(0.02, 77, 0, 255), sq.Grid(0.02, 0, -127, 127), sq.Grid(0.02, 9, 1, 255)]


def activated(x):
    return nn.tanh(nn.Dense(3)(x))


@pytest.mark.parametrize("x", GRIDS)
@pytest.mark.parametrize("y", GRIDS)
def test_every_code_has_its_own(x, y):
    step = step_of(Elementwise, activated, (2, 4))
    codes = np.arange(x.qmin, x.qmax + 1) - x.zero_point
    got = codes_of(step, [Codes(jnp.asarray(codes, jnp.float32), x)], y)
    want = np.tanh(codes * x.scale) / y.scale
    np.testing.assert_allclose(
        got, np.clip(want, y.qmin - y.zero_point, y.qmax - y.zero_point), atol=0.501
    )
    assert codes_of(step, [None], y) is None


@pytest.mark.parametrize("x", GRIDS)
def test_a_program_has_a_code_for_every_code_from_the_lowest(x):
    codes = np.arange(x.qmin, x.qmax + 1)
    table = np.random.default_rng(0).integers(0, 256, codes.size).astype(np.uint8)
    tensors = [Tensor("x", (-1,), "float32", x), Tensor("y", (-1,), "float32", GRIDS[0])]
    op = operation("table", (0,), (1,), arrays={"table": table})
    model = integer_model("tflite", tensors, [op], [0], [1])
    check(model.program)
    np.testing.assert_array_equal(model.run_codes(codes.astype(x.dtype)), table)


@pytest.mark.parametrize(
    ("function", "carries"),
    [
        (nn.relu, True),
        (lambda x: jnp.minimum(x, 0.0), True),
        (nn.relu6, False),
        (lambda x: jnp.clip(x, -1.0, 0.0), False),
        (lambda x: jnp.maximum(x, 1.0), False),
    ],
)
def test_what_clips_at_zero_keeps_its_grid(function, carries):
    """Of a tensor that something else reads as well."""

    def body(x):
        y = nn.Dense(3)(x)
        return nn.Dense(2)(y) + nn.Dense(2)(function(y))

    node = step_of(Clamp, body, (2, 4)).node
    assert operation_of(node).carries_grid(node, NO_GRAPH, per_channel=False) == carries
