"""Range observers against a NumPy loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import simqat_jax as sq

pytestmark = pytest.mark.usefixtures("optimized")
F32 = np.float32
OBSERVERS = ("ema", "minmax", "batch")
# Whether a process flushes subnormal numbers to zero depends on what else runs in it.
reals = st.floats(-1e6, 1e6, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
batches = st.lists(hnp.arrays(F32, (4, 3), elements=reals), min_size=1, max_size=5)


def oracle(observer, decay, values):
    """The law of one end of the range over the extremes of successive batches."""
    state = values[0]
    for value in values[1:]:
        if observer == "ema":
            state = F32(decay) * state + F32(1 - decay) * value
        elif observer == "batch":
            state = value
    return state


@given(st.sampled_from(OBSERVERS), st.sampled_from([0.0, 0.5, 0.99]), batches, st.booleans())
def test_observers_follow_their_law(observer, decay, xs, per_channel):
    spec = sq.QuantSpec(observer=observer, ema_decay=decay, per_channel=per_channel)
    axis = 0 if per_channel else None
    lows, highs = [x.min(axis) for x in xs], [x.max(axis) for x in xs]
    if observer == "minmax":
        lo, hi = np.min(lows, axis=0), np.max(highs, axis=0)
    else:
        lo, hi = oracle(observer, decay, lows), oracle(observer, decay, highs)
    for observe in (sq.observe, jax.jit(sq.observe, static_argnums=2)):
        state = sq.init_range(3 if per_channel else None)
        for x in xs:
            state = observe(state, x, spec)
        np.testing.assert_array_equal(state.lo, lo)
        np.testing.assert_array_equal(state.hi, hi)
        assert bool(sq.observed(state)) and state.nonfinite == 0


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("first", [True, False])
def test_nonfinite_batches_are_left_out_and_counted(observer, bad, first):
    spec = sq.QuantSpec(observer=observer)
    good, poisoned = jnp.array([-1.0, 2.0]), jnp.array([bad, 1.0])
    clean = sq.observe(sq.init_range(), good, spec)
    state = sq.init_range() if first else clean
    state = sq.observe(state, poisoned, spec)
    assert state.nonfinite == 1
    assert bool(sq.observed(state)) is not first
    state = sq.observe(state, good, spec) if first else state
    assert (state.lo, state.hi) == (clean.lo, clean.hi)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_one_nan_in_a_large_tensor_is_found(dtype, per_channel):
    # XLA's large minima and maxima on CPU drop NaN.
    spec = sq.QuantSpec(per_channel=per_channel)
    x = np.random.default_rng(0).normal(size=(1 << 16, 32)).astype(F32)
    first = sq.observe(sq.init_range(32 if per_channel else None), jnp.asarray(x, dtype), spec)
    x[777, 5] = np.nan
    for observe in (sq.observe, jax.jit(sq.observe, static_argnums=2)):
        state = observe(first, jnp.asarray(x, dtype), spec)
        assert state.nonfinite == 1
        np.testing.assert_array_equal((state.lo, state.hi), (first.lo, first.hi))


@pytest.mark.parametrize("ends", [(-3e38, 3e38), (0, 3e38), (-3e38, 0)])
def test_large_numbers_are_no_nan(ends):
    x = np.tile(F32(ends), (1 << 15, 8))
    state = jax.jit(sq.observe, static_argnums=2)(sq.init_range(), x, sq.QuantSpec())
    assert state.nonfinite == 0
    assert (state.lo, state.hi) == tuple(F32(ends))


def test_a_channel_axis_other_than_the_last():
    x = np.arange(24, dtype=F32).reshape(2, 3, 4)
    state = sq.observe(sq.init_range(3), x, sq.QuantSpec(per_channel=True), channel_axis=1)
    np.testing.assert_array_equal(state.lo, x.min((0, 2)))
    np.testing.assert_array_equal(state.hi, x.max((0, 2)))


def test_the_range_of_a_nonnegative_tensor_starts_at_zero():
    state = sq.init_range(nonnegative=True)
    assert state.lo == 0 and not sq.observed(state)


def test_observing_has_no_gradient_into_the_range_but_is_differentiable():
    state = sq.init_range()
    grad = jax.grad(lambda x: sq.observe(state, x, sq.QuantSpec()).hi)(jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(grad, [0.0, 1.0])


def test_bad_input_is_named():
    per_channel = sq.QuantSpec(per_channel=True)
    with pytest.raises(ValueError, match=r"empty array of shape \(0, 3\)"):
        sq.observe(sq.init_range(), jnp.zeros((0, 3)), sq.QuantSpec())
    with pytest.raises(ValueError, match="channel_axis is None"):
        sq.observe(sq.init_range(3), jnp.zeros((2, 3)), per_channel, channel_axis=None)
    with pytest.raises(ValueError, match="channel_axis is 2"):
        sq.observe(sq.init_range(3), jnp.zeros((2, 3)), per_channel, channel_axis=2)
    with pytest.raises(ValueError, match=r"shape \(3,\).*shape \(2,\)"):
        sq.observe(sq.init_range(2), jnp.zeros((2, 3)), per_channel)
