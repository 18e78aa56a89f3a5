"""Learned steps: the gradient is the paper's, the start too, and what is learned stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simqat_jax as sq
from simqat_jax.numerics.observers import OBSERVERS, Learned, LearnedState, Range, Role

F32 = np.float32
ACTIVATION = {"symmetric": False, "num_bits": 4}
WEIGHT = {"symmetric": True, "num_bits": 3, "narrow_range": True}


def observer(role: Role = "activation", channels=None, nonnegative=False, **settings):
    spec = sq.QuantSpec(observer="learned", **settings)
    made = OBSERVERS["learned"].of_role(role)(spec, channels, nonnegative)
    assert isinstance(made, Learned)
    return made


def state(step, lo, hi):
    return LearnedState(*map(jnp.asarray, (F32(step), F32(lo), F32(hi), np.int32(0))))


def slopes(v, negative, positive):
    """Section 2.1, equation 3, one value after the other."""
    return np.array(
        [-negative if a <= -negative else positive if a >= positive else np.rint(a) - a for a in v]
    )


@pytest.mark.parametrize("step", [0.1, 0.37, 2.0])
@pytest.mark.parametrize(
    ("lo", "hi", "negative", "positive"), [(-8.0, 7.0, 8, 7), (0.0, 15.0, 0, 15)]
)
def test_the_gradient_of_an_activations_step_is_the_papers(step, lo, hi, negative, positive):
    rng = np.random.default_rng(positive)
    x = (rng.standard_normal((5, 4, 3)) * 1.5 * step * positive).astype(F32)
    g = rng.standard_normal(x.shape).astype(F32)
    o = observer(nonnegative=lo == 0, **ACTIVATION)

    def loss(step):
        start = state(1, lo, hi)._replace(step=step)
        return jnp.sum(g * o.with_step_gradient(jnp.asarray(x), jnp.asarray(x), start))

    want = np.sum(g * slopes(x.ravel() / F32(step), negative, positive).reshape(x.shape))
    want /= np.sqrt(4 * 3 * positive)  # values of one example
    assert jax.jit(jax.grad(loss))(step) == pytest.approx(want, rel=1e-4, abs=1e-4)


def test_the_gradient_of_a_weights_steps_is_the_papers():
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((2, 20, 3)).astype(F32)
    steps = np.array([0.1, 0.5, 2.0], F32)
    o = observer("weight", 3, **WEIGHT)

    def loss(steps, w):
        start = state(1, [-1] * 3, [1] * 3)._replace(step=steps)
        return jnp.sum(g * o.with_step_gradient(w, w, start))

    got, through = jax.grad(loss, (0, 1))(jnp.asarray(steps), jnp.asarray(w))
    want = [np.sum(g[:, c] * slopes(w[:, c] / steps[c], 3, 3)) / np.sqrt(20 * 3) for c in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    np.testing.assert_array_equal(through, g)  # nothing is taken from the gradient of `w`
    unset = jax.grad(loss)(jnp.zeros(3), jnp.asarray(w))
    np.testing.assert_array_equal(unset, np.zeros(3))


def test_a_weight_starts_from_its_mean_magnitude():
    w = np.random.default_rng(1).standard_normal((50, 4)).astype(F32)
    o = observer("weight", 4, **WEIGHT)
    after = o.update(o.init(), o.measure(jnp.asarray(w)))
    want = 2 * np.abs(w).mean(0) / np.sqrt(3)
    np.testing.assert_allclose(o.step(after), want, rtol=1e-5)
    np.testing.assert_allclose(o.training_range(after)[1], 3 * want, rtol=1e-5)


def grid(ends: Range, o):
    return sq.quant_params(*map(jnp.asarray, ends), o.spec)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_an_activation_starts_from_the_grid_of_minmax(nonnegative):
    o = observer(nonnegative=nonnegative, **ACTIVATION)
    minmax = OBSERVERS["minmax"](o.spec, None, nonnegative)
    now, want = o.init(), minmax.init()
    lo, hi = map(np.asarray, o.range(now))
    assert lo > hi
    for x in (jnp.array([0.3, 2.0]), jnp.array([-1.0, 4.5]), jnp.array([jnp.nan, 9.0])):
        x = jnp.maximum(x, 0) if nonnegative else x
        now, want = o.update(now, o.measure(x)), minmax.update(want, minmax.measure(x))
    assert now[1:] == want
    got, minmax_grid = grid(o.training_range(now), o), grid(minmax.range(want), o)
    assert got.zero_point == minmax_grid.zero_point
    assert got.scale == pytest.approx(float(minmax_grid.scale), rel=1e-6)


@given(
    st.floats(2**-10, 2**10, width=32), st.floats(-3, 0, width=32), st.floats(0.125, 3, width=32)
)
def test_what_is_learned_stays_and_has_its_grid(step, lo, hi):
    o = observer(**ACTIVATION)
    before = state(step, lo, hi)
    after = o.update(before, o.measure(jnp.array([-100.0, 200.0])))
    assert after == before
    assert o.update(before, o.measure(jnp.array([jnp.inf]))).nonfinite == 1
    placed = grid(o.range(after), o)
    assert placed.scale == pytest.approx(step, rel=1e-6)
    assert placed.zero_point == grid((lo, hi), o).zero_point
    jitted = jax.jit(lambda state: o.range(state))(after)
    assert jitted == o.range(after)


def test_a_state_has_two_parts():
    o = observer(**ACTIVATION)
    whole = state(0.5, -1, 2)
    kept, step = o.parted(whole, 0)
    assert isinstance(kept, sq.RangeState) and step == 0.5
    for plain in (kept, kept._asdict(), list(kept)):
        assert o.joined(plain, step) == whole
    assert o.restore(whole._asdict()) == whole


@pytest.mark.parametrize("role", ["activation", "weight"])
def test_a_delayed_step_starts_from_the_data_then(role):
    o, x = observer(role, quant_delay=2, symmetric=True), jnp.array([-1.0, 0.5, 3.0])
    now, steps = o.init(), []
    for trained, factor in enumerate((100, 50, 2, 1)):
        now = o.update(o.forgetful(now, trained), o.measure(factor * x))
        kept, step = o.parted(now, trained)
        steps.append(step)
        assert o.for_evaluation(now, trained).step > 0
        now = o.joined(kept, step)
    assert steps[:2] == [0, 0]
    want = o.step(o.update(o.init(), o.measure(2 * x)))
    assert want > 0 and steps[2:] == [want, want]
