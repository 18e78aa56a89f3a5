"""Products of two tensors of codes, against NumPy's on integers."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from models import observed
from steps import codes_of, grid, random, step_of
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.compound import MatMul
from simqat_jax.numerics.exact_sums import MOST

A, B, Y = grid(0.05, 120), grid(0.02, 7), grid(0.11, 131)


@functools.cache
def product(rows, terms, multiply=jnp.matmul):
    """Of (2, rows, terms) and (2, terms, 4)."""

    def body(x):
        a, b = nn.Dense(terms)(x), nn.Dense(terms)(x[:, :4])
        return multiply(a, b.swapaxes(1, 2))

    return step_of(MatMul, body, (2, rows, 3))


@pytest.mark.parametrize(
    ("multiply", "factor"),
    [
        (jnp.matmul, 1),
        (lambda a, b: (a @ b) / 3.0, np.float32(1) / np.float32(3)),
        (lambda a, b: ((a / 3.0) @ b) * 1.7, np.float32(1) / np.float32(3) * np.float32(1.7)),
    ],
)
def test_codes_are_those_of_whole_numbers(multiply, factor):
    step = product(5, 6, multiply)
    a, b = random((2, 5, 6), A), random((2, 4, 6), B, 1)
    sums = np.einsum("nrt,nct->nrc", a.codes.astype(int), b.codes.astype(int))
    unit = np.float32(np.float32(A.scale) * np.float32(factor)) * np.float32(B.scale)
    want = np.rint(sums.astype(np.float32) * np.float32(unit / np.float32(Y.scale)))
    transposed = step.node.contraction.eqn.params["dimension_numbers"][0][1] == (1,)
    b = b._replace(codes=b.codes.swapaxes(1, 2)) if transposed else b
    np.testing.assert_array_equal(codes_of(step, [a, b], Y), np.clip(want + 131, 0, 255) - 131)


def test_a_scale_below_zero_is_none():
    step = product(5, 6, lambda a, b: -0.5 * (a @ b))
    shape = codes_shape(step, (2, 4, 6))
    assert np.isnan(codes_of(step, [random((2, 5, 6), A), random(shape, B)], Y)).all()


def codes_shape(step, shape):
    """The shape of the second operand, turned as the product reads it."""
    turned = step.node.contraction.eqn.params["dimension_numbers"][0][1] == (1,)
    return (shape[0], shape[2], shape[1]) if turned else shape


def test_sums_that_int32_does_not_hold_have_no_codes():
    most = MOST // 255**2
    for terms, fits in ((most, True), (most + 1, False)):
        step = product(1, terms)
        x, w = (random(s, A) for s in ((1, 1, terms), codes_shape(step, (1, 4, terms))))
        assert (codes_of(step, [x, w], Y) is not None) == fits
    step = product(1, 6)
    wide = random((2, 1, 6), grid(0.05, 120, 9))
    narrow, shape = random((2, 1, 6), A), codes_shape(step, (2, 4, 6))
    assert codes_of(step, [wide, random(shape, B)], Y) is None
    assert codes_of(step, [narrow, random(shape, grid(0.05, 120, 9))], Y) is None
    assert codes_of(step, [narrow, None], Y) is None
    assert codes_of(step, [None, random(shape, B)], Y) is None
    assert jnp.shape(codes_of(step, [narrow, random(shape, B)], Y)) == (2, 1, 4)


def test_columns_are_no_terms():
    """More of them than int32 holds terms, in a program."""
    x = jnp.linspace(-1, 1, 12).reshape(1, 3, 4)
    body = Model(lambda x: nn.Dense(2)(x) @ nn.Dense(MOST // 255**2 + 1)(x[:, :2]))
    qmodel, variables, _ = observed(body, x)
    model = sq.convert(qmodel, variables, x)
    assert "matmul" in {op.kind for op in model.ops} and not model.program.float_ops
