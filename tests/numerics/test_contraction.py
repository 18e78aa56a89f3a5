"""Parts of convolutions and matrix products add up to the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from simqat_jax.numerics.contraction import partial_sums, summed_axes

NHWC = ("NHWC", "HWIO", "NHWC")


def dot(dims):
    return lambda x, y: lax.dot_general(x, y, dims)


def conv(numbers=NHWC, **settings):
    def convolved(x, y):
        known = lax.conv_dimension_numbers(x.shape, y.shape, numbers)
        return lax.conv_general_dilated(x, y, (1, 2), "SAME", dimension_numbers=known, **settings)

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
