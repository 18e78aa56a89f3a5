"""Sums and products of two tensors of codes are those of real numbers, to a rounding."""

import flax.linen as nn
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.graph import Add, Mul

A, B, Y = grid(0.05, 120), grid(0.02, 7), grid(0.04, 131)
CASES = {
    "sum": (Add, np.add, lambda x: nn.Dense(3)(x) + nn.Dense(3)(x)),
    "difference": (Add, np.subtract, lambda x: nn.Dense(3)(x) - nn.Dense(3)(x)),
    "product": (Mul, np.multiply, lambda x: nn.Dense(3)(x) * nn.Dense(3)(x)),
}


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_real_numbers(name, backend):
    kind, function, body = CASES[name]
    step = step_of(kind, body, (2, 4))
    a, b = random((200, 3), A), random((200, 3), B, 1)
    real = function(*(np.asarray(v.codes, float) * v.grid.scale for v in (a, b)))
    want = np.clip(real / Y.scale + 131, 0, 255) - 131
    np.testing.assert_allclose(codes_of(step, [a, b], Y, backend=backend), want, atol=0.501)


@pytest.mark.parametrize(
    ("name", "bits", "fits"),
    [
        ("sum", (8, 8), True),
        ("sum", (8, 9), False),
        ("sum", (9, 8), False),
        ("product", (12, 12), True),
        ("product", (12, 13), False),
    ],
)
def test_widths_that_have_codes(name, bits, fits):
    kind, _, body = CASES[name]
    step = step_of(kind, body, (2, 4))
    a, b = (random((2, 3), grid(0.05, 120, n)) for n in bits)
    assert (codes_of(step, [a, b], Y) is not None) == fits
    assert codes_of(step, [a, None], Y) is None
