"""Deviations, variances and lengths of codes are those of real numbers, to a rounding."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.compound import Spread

X, Y = grid(0.05, 120), grid(0.041, 7)
FORMS = {
    "deviation": (lambda x: jnp.std(x, 1), lambda x: x.std(1)),
    "variance": (lambda x: jnp.var(x, 2), lambda x: x.var(2)),
    "length": (lambda x: jnp.linalg.norm(x, axis=2), lambda x: np.sqrt((x * x).sum(2))),
}


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("name", FORMS)
def test_codes_are_those_of_real_numbers(name, backend):
    form, real = FORMS[name]
    step = step_of(Spread, lambda x: form(nn.Dense(6)(x)), (2, 5, 4))
    x = random((2, 5, 6), X)
    x = x._replace(codes=jnp.round(x.codes / 4))
    got = codes_of(step, [x], Y, backend=backend)
    want = real(np.asarray(x.codes, float) * X.scale) / Y.scale
    np.testing.assert_allclose(got, np.clip(want, -7, 248), atol=0.501)
    assert codes_of(step, [None], Y, backend=backend) is None
