"""The range of least Kullback-Leibler divergence against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS
from simqat_jax.numerics.observers.histogram import BINS, HALF

F32 = np.float32


def observed(spec, x, role="activation"):
    o = OBSERVERS["entropy"].of_role(role)(spec)
    return jax.jit(lambda x: o.update(o.init(), o.measure(x)))(jnp.asarray(x))


def divergence(counts, first, last, spec):
    """Of the bins from `first` to `last`, clipped, from what the grid on them keeps."""
    lo, hi = min(first - HALF, 0), max(last - HALF, 0)
    if spec.symmetric:
        step, zero = F32(max(-lo, hi)) / F32(2 ** (spec.num_bits - 1) - 1), 0
    else:
        step = F32(hi - lo) / F32(spec.qmax)
        zero = -np.rint(F32(lo) / step)
    p = counts[first:last].copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    q = np.zeros(last - first)
    middles = np.arange(first, last) - HALF + F32(0.5)
    codes = np.clip(np.rint(middles / step) + zero, spec.qmin, spec.qmax)
    for code in np.unique(codes):
        where = (codes == code) & (counts[first:last] > 0)
        q[where] = counts[first:last][where].sum() / max(where.sum(), 1)
    p, q = p / p.sum(), np.maximum(q / max(q.sum(), 1), 1e-9)
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_the_least_divergence_of_all_ranges(bits, symmetric, relu):
    spec = sq.QuantSpec(observer="entropy", num_bits=bits, symmetric=symmetric)
    x = np.random.default_rng(bits).standard_t(3, 20_000).astype(F32)
    x = np.maximum(x, 0) if relu else x
    state = observed(spec, x)
    unit = 2.0 ** np.ceil(np.log2(np.abs(x).max())) / HALF
    counts = np.bincount(np.floor(x / unit).astype(int) + HALF, minlength=BINS).astype(float)
    counts[HALF] = min(counts[HALF], max(counts[HALF - 1], counts[HALF + 1]))
    lowest, highest = np.floor(x.min() / unit), np.floor(x.max() / unit) + 1
    tried = {}
    for k in range(1, 129):
        end = np.ceil(max(-lowest, highest) * k / 128)
        ends = int(max(lowest, -end)), int(min(highest, end))
        tried[ends] = divergence(counts, ends[0] + HALF, ends[1] + HALF, spec)
    found = int(np.floor(float(state.lo) / unit)), int(np.ceil(float(state.hi) / unit))
    assert tried[found] <= min(tried.values()) * (1 + 1e-3)
    assert max(tried.values()) > 1.5 * tried[found]


def test_an_outlier_is_clipped_and_a_uniform_distribution_is_not():
    spec = sq.QuantSpec(observer="entropy", symmetric=True)
    x = np.random.default_rng(0).uniform(-1, 1, 20_000).astype(F32)
    state = observed(spec, x)
    assert state.hi > 0.98 and state.lo < -0.98
    assert observed(spec, np.append(x, F32(50))).hi < 5


def test_a_weight_has_its_extremes():
    spec = sq.QuantSpec(observer="entropy", symmetric=True)
    kind = OBSERVERS["entropy"].of_role("weight")
    assert not kind.keeps_state("weight") and kind.covers
    assert kind(spec).present_range(jnp.array([-3.0, 2.0])) == (-3.0, 3.0)
