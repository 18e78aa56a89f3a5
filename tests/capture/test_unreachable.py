"""Products inside of loops and branches are named, wherever their kernel comes from."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from models import initialized

from simqat_jax.capture.unroll import MAX_STEPS

X = jax.random.normal(jax.random.key(0), (4, 6))
NORMAL = nn.initializers.lecun_normal()


class Inner(nn.Module):
    """A product in what `around` makes of a function of data and a kernel."""

    around: staticmethod

    @nn.compact
    def __call__(self, x):
        w = self.param("w", NORMAL, (6, 6))
        return self.around(lambda x, w: x @ w, x, w)


class Net(nn.Module):
    around: staticmethod

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(Inner(self.around, name="inner")(x))


LONG = MAX_STEPS + 1


def scanned(f, x, w, length=LONG):
    return lax.scan(lambda c, _: (f(c, w), None), x, length=length)[0]


def over_kernels(f, x, w):
    return lax.scan(lambda c, k: (f(c, k), None), x, jnp.stack([w] * LONG))[0]


def carried(f, x, w):
    return lax.scan(lambda c, _: ((f(c[0], c[1]), c[1]), None), (x, w), length=LONG)[0][0]


def in_two_loops(f, x, w):
    return lax.scan(lambda c, _: (scanned(f, c, w, length=2), None), x, length=LONG // 2 + 1)[0]


def looped(f, x, w):
    return lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1], w)), (0, x))[1]


def branched(f, x, w):
    return lax.cond(x.sum() > 0, f, lambda x, w: x, x, w)


def with_a_gradient(f, x, w):
    own = jax.custom_jvp(f)
    own.defjvp(lambda p, t: (f(*p), f(t[0], p[1])))
    return own(x, w)


@pytest.mark.parametrize(
    ("around", "inside"),
    [
        (scanned, "scan"),
        (over_kernels, "scan"),
        (carried, "scan"),
        (in_two_loops, "scan"),
        (looped, "while"),
        (branched, "cond"),
        (with_a_gradient, "custom_jvp_call"),
    ],
)
def test_a_product_out_of_reach_is_named(around, inside):
    with pytest.raises(ValueError, match=rf"inner: it is called inside `{inside}`") as error:
        initialized(Net(around), X)
    assert "exclude=('inner',)" in str(error.value)
    initialized(Net(around), X, exclude=("inner",))
    _, variables = initialized(Net(around), X, strict=False)
    assert set(variables["quant_stats"]) == {f"inner/{inside}/output", "Dense_0/output", "step"}


def test_what_has_no_kernel_is_none():
    powers = lambda f, x, w: lax.scan(lambda c, _: (c @ c.T @ c, None), x, length=2)[0]  # noqa: E731
    _, variables = initialized(Net(powers), X)
    assert "Dense_0/output" in variables["quant_stats"]


def test_the_model_itself_can_only_be_left_float_as_a_whole():
    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", NORMAL, (6, 6))
            return nn.Dense(2)(scanned(lambda x, w: x @ w, x, w))

    with pytest.raises(ValueError, match="the model: it is called inside `scan`") as error:
        initialized(Alone(), X)
    assert "exclude" not in str(error.value)
    initialized(Alone(), X, strict=False)
