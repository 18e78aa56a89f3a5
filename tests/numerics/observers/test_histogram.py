"""Histograms against NumPy's: counts exactly, whatever order batches come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS
from simqat_jax.numerics.observers.histogram import (
    BINS,
    HALF,
    HistogramState,
    histogram_of,
    together,
)

F32 = np.float32
NAMES = ("percentile", "mse", "entropy")
histogram, join = jax.jit(histogram_of), jax.jit(together)


def oracle(x):
    """Counts and sums of offsets in NumPy, with the narrowest bins that hold the values."""
    x = np.asarray(x, np.float64)
    unit = 2.0**-110
    while np.abs(x).max() >= HALF * unit:
        unit *= 2
    where = np.floor(x / unit).astype(int) + HALF
    offsets = x / unit - (where - HALF) - 0.5
    counts = np.bincount(where, minlength=BINS)
    return counts, np.bincount(where, offsets, minlength=BINS)


def values(seed: int, scale: float, shift: float):
    rng = np.random.default_rng(seed)
    return (scale * (rng.standard_t(2, 200) + shift)).astype(F32)


batches = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from([1e-30, 1.0, 100.0]), st.sampled_from([-3, 0])),
    min_size=1,
    max_size=4,
)


@given(batches)
def test_histograms_of_batches_are_that_of_all_values(drawn):
    xs = [values(*args) for args in drawn]
    whole = histogram(xs[0])
    for x in xs[1:]:
        whole = join(whole, histogram(x))
    counts, offsets = oracle(np.concatenate(xs))
    np.testing.assert_array_equal(whole.counts, counts)
    np.testing.assert_allclose(whole.offsets, offsets, atol=1e-3)
    assert (whole.low, whole.high) == (np.concatenate(xs).min(), np.concatenate(xs).max())


@pytest.mark.parametrize(
    "x", [[0.0, 0.0], [3e38, -3.4e38], [1e-45, -2e-40, 0.0], [4.0, 4.0], [-8.0, 1.0]]
)
def test_no_values_are_too_small_or_large(x):
    x = np.array(x, F32)
    h = histogram(x)
    np.testing.assert_array_equal(h.counts, oracle(np.where(np.abs(x) < 1e-37, 0, x))[0])


def observer(name, channels=None, **settings):
    return OBSERVERS[name](sq.QuantSpec(observer=name, **settings), channels)


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_observed_one_by_one(name):
    x = jnp.stack([jnp.asarray(values(1, 1.0, 0)), jnp.asarray(values(2, 50.0, 1))], -1)
    both, one = observer(name, 2), observer(name)
    state = jax.jit(lambda x: both.update(both.init(), both.measure(x)))(x)
    update = jax.jit(lambda x: one.update(one.init(), one.measure(x)))
    for channel in range(2):
        alone = update(x[:, channel])
        for field in ("counts", "lo", "hi", "low", "high"):
            np.testing.assert_array_equal(getattr(state, field)[channel], getattr(alone, field))


def test_bfloat16_is_measured_as_the_numbers_that_it_holds():
    o = observer("percentile")
    x = jnp.asarray(values(6, 1.0, 0)).astype(jnp.bfloat16)
    measure = jax.jit(o.measure)
    jax.tree.map(np.testing.assert_array_equal, measure(x), measure(x.astype(jnp.float32)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_batches_are_left_out_and_counted(name, bad):
    o = observer(name)
    update = jax.jit(lambda state, x: o.update(state, o.measure(x)))
    good = jnp.asarray(values(3, 1.0, 0))
    poisoned = good.at[5].set(bad)
    first = update(o.init(), poisoned)
    assert first.nonfinite == 1 and first.lo > first.hi and first.counts.sum() == 0
    state = update(first, good)
    again = update(state, poisoned)
    assert again.nonfinite == 2
    for field in ("lo", "hi", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(again, field), getattr(state, field))
        np.testing.assert_array_equal(getattr(state, field), getattr(update(o.init(), good), field))


@pytest.mark.parametrize("name", NAMES)
def test_one_nan_in_a_large_tensor_poisons_nothing(name):
    o = observer(name)
    update = jax.jit(lambda state, x: o.update(state, o.measure(x)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=1 << 17).astype(F32))
    state = update(o.init(), x)
    again = update(state, x.at[777].set(jnp.nan))
    assert again.nonfinite == 1
    for field in ("lo", "hi", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(again, field), getattr(state, field))


@pytest.mark.parametrize("channels", [None, 3])
def test_devices_of_a_mapped_axis_measure_together(channels):
    o = observer("mse", channels)
    x = values(4, 1.0, 0)[:120].reshape(4, 10, 3) * F32([1, 9, 2, 0.1]).reshape(4, 1, 1)
    together = jax.vmap(lambda x: o.reduce(o.measure(x), "i"), axis_name="i")
    shared, want = jax.jit(lambda x: (together(x), o.measure(x.reshape(-1, 3))))(x)
    for device in range(4):
        got = jax.tree.map(lambda v, device=device: v[device], shared)
        np.testing.assert_array_equal(got.counts, want.counts)
        np.testing.assert_array_equal(got.low, want.low)
        np.testing.assert_allclose(got.offsets, want.offsets, atol=1e-4)


def test_a_state_is_restored_from_dictionaries_and_lists():
    o = observer("entropy")
    state = o.init()
    for plain in (state._asdict(), list(state)):
        restored = o.restore(plain)
        assert isinstance(restored, HistogramState)
        jax.tree.map(np.testing.assert_array_equal, restored, state)
    with pytest.raises(TypeError, match="is no HistogramState: it must hold lo, hi, low, high"):
        o.restore(sq.init_range())


@pytest.mark.parametrize("name", [*NAMES, "fixed"])
def test_functions_of_extremes_name_what_they_serve(name):
    spec = sq.QuantSpec(observer=name, range=(0, 1) if name == "fixed" else None)
    with pytest.raises(ValueError, match=f"ema, minmax, batch.*{name}"):
        sq.observe(sq.init_range(), jnp.ones(3), spec)
