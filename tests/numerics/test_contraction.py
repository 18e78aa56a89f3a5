"""Parts of convolutions and matrix products add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from simqat_jax.numerics.contraction import byte_sums, integer_dot, partial_sums, summed_axes

NHWC = ("NHWC", "HWIO", "NHWC")


def dot(dims):
    return lambda x, y: lax.dot_general(x, y, dims)


def conv(numbers=NHWC, padding="SAME", **settings):
    def convolved(x, y):
        known = lax.conv_dimension_numbers(x.shape, y.shape, numbers)
        return lax.conv_general_dilated(x, y, (1, 2), padding, dimension_numbers=known, **settings)

    return convolved


def equation(function, *arrays):
    (eqn,) = jax.make_jaxpr(function)(*arrays).eqns
    return eqn.primitive.name, eqn.params


@pytest.mark.parametrize(
    ("function", "shapes", "axes"),
    [
        (dot((((1,), (0,)), ((), ()))), ((4, 7), (7, 3)), (1, 0)),
        (dot((((2, 1), (0, 2)), ((0,), (1,)))), ((2, 9, 3), (3, 2, 9)), (1, 2)),
        (conv(), ((2, 6, 6, 7), (3, 3, 7, 4)), (3, 2)),
        (conv(numbers=("NCHW", "OIHW", "NCHW")), ((2, 7, 6, 6), (4, 7, 3, 3)), (1, 1)),
    ],
)
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_add_up_to_the_whole(function, shapes, axes, parts):
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.integers(-99, 99, shape), jnp.float32) for shape in shapes)
    name, params = equation(function, x, y)
    assert summed_axes(name, params, y.shape) == axes
    found = partial_sums(name, params, x, y, parts)
    assert len(found) == parts
    np.testing.assert_array_equal(sum(found), function(x, y))


def test_products_without_an_axis_to_divide():
    x, y = jnp.ones((2, 3)), jnp.ones((4,))
    name, params = equation(dot((((), ()), ((), ()))), x, y)
    assert summed_axes(name, params, y.shape) is None
    x, y = jnp.ones((1, 6, 6, 4)), jnp.ones((3, 3, 2, 4))
    name, params = equation(conv(feature_group_count=2), x, y)
    assert summed_axes(name, params, y.shape) is None


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (dot((((1,), (0,)), ((), ()))), ((4, 300), (300, 70))),
        (dot((((1,), (0,)), ((), ()))), ((1, 300), (300, 70))),
        (dot((((2, 1), (0, 2)), ((), ()))), ((2, 40, 9), (9, 3, 40))),
        (conv(), ((2, 6, 6, 70), (3, 3, 70, 64))),
        (conv(rhs_dilation=(2, 1)), ((2, 9, 6, 70), (3, 3, 70, 64))),
        (conv(padding=((1, 2), (2, -1)), lhs_dilation=(1, 2)), ((2, 6, 6, 70), (3, 3, 70, 64))),
        (conv(feature_group_count=2), ((2, 6, 6, 8), (3, 3, 4, 64))),
        (conv(numbers=("NCHW", "OIHW", "NCHW")), ((2, 70, 6, 6), (64, 70, 3, 3))),
    ],
)
@pytest.mark.parametrize("shift", [-128, 0, 127])
def test_bytes_multiply_to_the_same_sums(function, shapes, shift):
    """Padded with zeros, whatever byte stands for zero."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-128, 128, shapes[0]) - shift, jnp.float32)
    y = jnp.asarray(rng.integers(-127, 128, shapes[1]), jnp.float32)
    name, params = equation(function, x, y)
    (got,) = jax.jit(lambda *arrays: byte_sums(name, params, *arrays))(x, y, jnp.float32(shift))
    assert got.dtype == jnp.int32
    with jax.enable_x64():
        want = function(*(jnp.asarray(v, jnp.float64) for v in (x, y)))
    np.testing.assert_array_equal(got, want)


def test_products_side_by_side_are_not_multiplied_in_bytes():
    x, y = jnp.ones((2, 9, 3)), jnp.ones((3, 2, 9))
    name, params = equation(dot((((2,), (0,)), ((0,), (1,)))), x, y)
    assert byte_sums(name, params, x, y, jnp.float32(0)) == []


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_integers_multiply_whatever_the_number_of_rows(dtype, rows):
    rng = np.random.default_rng(2)
    x, y = rng.integers(-128, 128, (1, rows, 7, 3)), rng.integers(-128, 128, (3, 4, 7))
    got = jax.jit(lambda x, y: integer_dot(x, y, ((2, 3), (2, 0))))(
        *(jnp.asarray(v, dtype) for v in (x, y))
    )
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.tensordot(x, y, ((2, 3), (2, 0))))
