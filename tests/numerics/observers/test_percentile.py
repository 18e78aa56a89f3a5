"""Percentiles against sorted values."""

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
PERCENTS = (60.0, 90.0, 99.5, 99.9)
ALL = 1000


@cache
def updating(spec, nonnegative, role):
    o = OBSERVERS[spec.observer].of_role(role)(spec, None, nonnegative)
    return o, jax.jit(lambda state, x: o.update(state, o.measure(x)))


def ranges(spec, xs, nonnegative=False, role="activation"):
    o, update = updating(spec, nonnegative, role)
    state = o.init()
    for x in xs:
        state = update(state, jnp.asarray(x))
    return float(state.lo), float(state.hi)


def values(seed: int, shape=ALL):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, shape) + rng.integers(-3, 3)).astype(F32)


def ends_of_sorted(x, spec):
    """The smallest ends beyond which at most so many values lie."""
    out = round(len(x) * (100 - spec.percentile) / 100)
    if spec.symmetric:
        end = np.sort(np.abs(x))[len(x) - 1 - out]
        return max(x.min(), -end), min(x.max(), end)
    x = np.sort(x)
    return x[out], x[len(x) - 1 - out]


@pytest.mark.parametrize("percent", PERCENTS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_ends_leave_out_a_share_of_values(percent, symmetric):
    spec = sq.QuantSpec(observer="percentile", percentile=percent, symmetric=symmetric)
    for seed in range(5):
        x = values(seed)
        lo, hi = ends_of_sorted(x, spec)
        assert ranges(spec, [x], role="weight") == (lo, hi)  # the values themselves: exactly
        got = ranges(spec, np.split(x, 4))  # in bins: up to one of them
        width = 2.0 ** np.ceil(np.log2(np.abs(x).max())) / 2048
        assert lo - width <= got[0] <= lo and hi <= got[1] <= hi + width


@given(st.lists(st.integers(0, 999), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_all_values_are_those_of_minmax(seeds, symmetric, nonnegative):
    xs = [np.abs(values(s, 64)) if nonnegative else values(s, 64) for s in seeds]
    settings = dict(symmetric=symmetric, percentile=100.0)
    got = ranges(sq.QuantSpec(observer="percentile", **settings), xs, nonnegative)
    assert got == ranges(sq.QuantSpec(observer="minmax", **settings), xs, nonnegative)
    x = np.concatenate(xs)
    assert got == (0 if nonnegative else x.min(), x.max())


def test_more_values_move_the_ends_apart():
    x = np.arange(1, ALL + 1, dtype=F32)
    ends = [ranges(sq.QuantSpec(observer="percentile", percentile=p), [x]) for p in PERCENTS]
    lows, highs = zip(*ends, strict=True)
    assert sorted(lows, reverse=True) == list(lows) and sorted(highs) == list(highs)
    assert len(set(highs)) == len(PERCENTS)
