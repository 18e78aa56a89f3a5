"""The range of least squared error: never worse than the extremes, close to the best of all."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS

F32 = np.float32
SHAPES = {
    "normal": lambda rng: rng.standard_normal(512),
    "heavy": lambda rng: rng.standard_t(2, 512),
    "outliers": lambda rng: np.append(rng.uniform(-1, 1, 511), 30 * rng.choice([-1, 1])),
    "bytes": lambda rng: rng.integers(0, 256, 512) / 255,
    "grid": lambda rng: rng.integers(-8, 8, 512) * 0.25,
    "constant": lambda rng: np.full(512, rng.uniform(-1, 1)),
    "shifted": lambda rng: rng.standard_normal(512) + 7,
}
SPECS = [
    sq.QuantSpec(observer="mse", num_bits=bits, symmetric=symmetric)
    for bits, symmetric in ((4, False), (8, False), (2, True), (8, True))
]


def values(shape: str, seed: int):
    return SHAPES[shape](np.random.default_rng(seed)).astype(F32)


def squared_error(x, lo, hi, spec):
    """In NumPy and double precision, by the definition of the grid."""
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    half = 2 ** (spec.num_bits - 1) - 1
    scale = max(-lo, hi) / half if spec.symmetric else (hi - lo) / (spec.qmax - spec.qmin)
    scale = F32(scale or 1.0)
    zero = 0 if spec.symmetric else np.rint(spec.qmin - F32(lo) / scale)
    codes = np.clip(np.rint(x / scale) + zero, spec.qmin, spec.qmax)
    return float(np.sum(((codes - zero) * float(scale) - x.astype(np.float64)) ** 2))


@cache
def updating(spec, role, channels=None):
    o = OBSERVERS["mse"].of_role(role)(spec, channels)
    return o, jax.jit(lambda state, x: o.update(state, o.measure(x)))


def best(spec, xs, role="activation"):
    o, update = updating(spec, role)
    state = o.init()
    for x in xs:
        state = update(state, jnp.asarray(x))
    return float(state.lo), float(state.hi)


drawn = st.lists(
    st.tuples(st.sampled_from(sorted(SHAPES)), st.integers(0, 99)), min_size=1, max_size=3
)


@given(drawn, st.sampled_from(SPECS), st.sampled_from([1e-25, 1.0, 1e25]))
def test_never_worse_than_minmax(drawn, spec, scale):
    xs = [(values(*args) * F32(scale)).astype(F32) for args in drawn]
    x = np.concatenate(xs)
    extremes = squared_error(x, x.min(), x.max(), spec)
    assert squared_error(x, *best(spec, xs), spec) <= extremes
    w = xs[0]
    extremes = squared_error(w, w.min(), w.max(), spec)
    assert squared_error(w, *best(spec, [w], "weight"), spec) <= extremes


@pytest.mark.parametrize("role", ["activation", "weight"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", ["normal", "heavy", "outliers"])
def test_close_to_the_best_of_all_ranges(role, symmetric, shape):
    spec = sq.QuantSpec(observer="mse", num_bits=4, symmetric=symmetric)
    x = np.concatenate([values(shape, seed) for seed in range(4)])
    ends = np.linspace(0, 1, 80)[1:]
    pairs = [(a, a) for a in ends] if symmetric else [(a, b) for a in ends for b in ends]
    least = min(squared_error(x, x.min() * a, x.max() * b, spec) for a, b in pairs)
    found = squared_error(x, *best(spec, [x], role), spec)
    assert found <= 1.05 * least
    assert shape == "outliers" or found < 0.9 * squared_error(x, x.min(), x.max(), spec)


def test_values_on_the_grid_of_their_extremes_keep_it():
    x = np.arange(256, dtype=F32) / 255
    assert best(SPECS[1], [x]) == (0, 1) and best(SPECS[1], [x], "weight") == (0, 1)


def test_bins_that_are_wider_than_codes_are_apart_tell_nothing():
    x = values("heavy", 6)
    spec = sq.QuantSpec(observer="mse", num_bits=16)
    assert best(spec, [x]) == (x.min(), x.max())


def test_each_channel_of_a_kernel_has_its_own():
    spec = sq.QuantSpec(observer="mse", num_bits=3, symmetric=True, per_channel=True)
    x = np.stack([values("normal", 1), 100 * values("heavy", 2)], -1)
    o, update = updating(spec, "weight", 2)
    state = update(o.init(), jnp.asarray(x))
    for channel in range(2):
        ends = best(spec, [x[:, channel]], "weight")
        assert (state.lo[channel], state.hi[channel]) == ends


def test_without_jit():
    spec = SPECS[0]
    o, update = updating(spec, "activation")
    x = jnp.asarray(values("heavy", 3))
    eager, jitted = o.update(o.init(), o.measure(x)), update(o.init(), x)
    np.testing.assert_array_equal(eager.counts, jitted.counts)
    errors = [squared_error(np.asarray(x), s.lo, s.hi, spec) for s in (eager, jitted)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
