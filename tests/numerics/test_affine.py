"""Quantization against an independent NumPy oracle, exactly."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import simqat_jax as sq
from simqat_jax.numerics import affine as numerics

pytestmark = pytest.mark.usefixtures("optimized")
F32 = np.float32

specs = st.builds(
    sq.QuantSpec,
    num_bits=st.integers(2, 16),
    symmetric=st.booleans(),
    narrow_range=st.booleans(),
)
# Whether a process flushes subnormal numbers to zero depends on what else runs in it.
reals = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)
arrays = hnp.arrays(F32, hnp.array_shapes(max_dims=3, max_side=8), elements=reals)
ranges = st.tuples(reals, reals).map(sorted)


def grid_limits(spec):
    low = -(2 ** (spec.num_bits - 1)) if spec.symmetric else 0
    high = 2 ** (spec.num_bits - 1) - 1 if spec.symmetric else 2**spec.num_bits - 1
    return low + spec.narrow_range, high


def oracle_params(lo, hi, spec):
    lo, hi = np.minimum(F32(lo), F32(0)), np.maximum(F32(hi), F32(0))
    qmin, qmax = grid_limits(spec)
    if spec.symmetric:
        scale = np.maximum(-lo, hi) / F32(2 ** (spec.num_bits - 1) - 1)
    else:
        scale = (hi - lo) / F32(qmax - qmin)
    scale = np.where(scale < np.finfo(F32).tiny, F32(1), scale).astype(F32)
    if spec.symmetric:
        return scale, np.zeros_like(scale, np.int32)
    return scale, np.clip(F32(qmin) - np.rint(lo / scale), qmin, qmax).astype(np.int32)


def oracle_unclipped(x, scale, zero_point):
    with np.errstate(over="ignore"):  # tiny scales: infinity, which the limits clip
        return np.rint(x / scale).astype(np.float64) + zero_point


def oracle_quantize(x, scale, zero_point, spec):
    return np.clip(oracle_unclipped(x, scale, zero_point), *grid_limits(spec)).astype(np.int32)


def oracle_dequantize(codes, scale, zero_point):
    return (codes - zero_point).astype(F32) * scale


@given(specs, ranges)
def test_params_equal_the_oracle_with_and_without_jit(spec, bounds):
    scale, zero_point = oracle_params(*bounds, spec)
    for function in (sq.quant_params, jax.jit(sq.quant_params, static_argnums=2)):
        got = function(*bounds, spec)
        assert got.scale == scale
        assert got.zero_point == zero_point
        assert got.scale.dtype == jnp.float32 and got.zero_point.dtype == jnp.int32


@given(specs, ranges, arrays)
def test_codes_and_values_equal_the_oracle_with_and_without_jit(spec, bounds, x):
    scale, zero_point = oracle_params(*bounds, spec)
    codes = oracle_quantize(x, scale, zero_point, spec)
    values = oracle_dequantize(codes, scale, zero_point)
    params = sq.quant_params(*bounds, spec)
    for quantize, fake in (
        (sq.quantize, sq.fake_quant),
        (
            jax.jit(sq.quantize, static_argnums=3),
            jax.jit(sq.fake_quant, static_argnums=3),
        ),
    ):
        np.testing.assert_array_equal(quantize(x, *params, spec), codes)
        np.testing.assert_array_equal(fake(x, *bounds, spec), values)
    np.testing.assert_array_equal(sq.dequantize(codes, *params), values)


@given(specs, ranges, arrays)
def test_properties(spec, bounds, x):
    lo, hi = bounds
    scale, _ = oracle_params(lo, hi, spec)
    fq = np.asarray(sq.fake_quant(x, lo, hi, spec))
    codes = np.asarray(sq.quantize(x, *sq.quant_params(lo, hi, spec), spec))
    assert codes.min() >= spec.qmin and codes.max() <= spec.qmax
    np.testing.assert_array_equal(sq.fake_quant(fq, lo, hi, spec), fq)
    assert sq.fake_quant(0.0, lo, hi, spec) == 0
    low, high = (float(sq.dequantize(q, *sq.quant_params(lo, hi, spec))) for q in grid_limits(spec))
    inside = (x >= low) & (x <= high)
    assert (np.abs(fq - x)[inside] <= scale * F32(0.5001)).all()


@given(specs, ranges, arrays)
def test_gradient_is_the_analytic_mask(spec, bounds, x):
    codes = oracle_unclipped(x, *oracle_params(*bounds, spec))
    qmin, qmax = grid_limits(spec)
    cotangent = np.linspace(1, 2, x.size, dtype=F32).reshape(x.shape)

    def total(x, lo, hi):
        return jnp.sum(sq.fake_quant(x, lo, hi, spec) * cotangent)

    grads = jax.grad(total, argnums=(0, 1, 2))(x, *map(F32, bounds))
    np.testing.assert_array_equal(
        grads[0], np.where((codes >= qmin) & (codes <= qmax), cotangent, 0)
    )
    assert grads[1] == 0 and grads[2] == 0


@given(specs, hnp.arrays(F32, (3, 4, 5), elements=reals), st.integers(-3, 2))
def test_per_channel_equals_a_loop_over_channels(spec, x, axis):
    moved = np.moveaxis(x, axis, 0)
    lo, hi = moved.reshape(len(moved), -1).min(1), moved.reshape(len(moved), -1).max(1)
    got = np.moveaxis(np.asarray(sq.fake_quant(x, lo, hi, spec, axis)), axis, 0)
    for channel, (low, high) in enumerate(zip(lo, hi, strict=True)):
        want = sq.fake_quant(moved[channel], low, high, spec, channel_axis=None)
        np.testing.assert_array_equal(got[channel], want)


def test_channels_lie_along_the_last_axis_unless_said():
    spec, hi = sq.QuantSpec(), np.array([0.5, 1, 2, 3], F32)
    x = np.random.default_rng(0).normal(0, 2, (2, 3, 4)).astype(F32)
    got = numerics.fake_quant(x, -hi, hi, spec)
    np.testing.assert_array_equal(got, sq.fake_quant(x, -hi, hi, spec, channel_axis=2))


def test_the_grid_of_a_unit_range():
    spec = sq.QuantSpec()
    params = sq.quant_params(0.0, 1.0, spec)
    np.testing.assert_array_equal(
        sq.quantize(np.arange(256, dtype=F32) / F32(255), *params, spec), np.arange(256)
    )


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0, 0.1])
def test_ties_go_to_even(scale):
    spec = sq.QuantSpec(symmetric=True)
    halves = np.arange(-126.5, 127, 1).astype(F32)
    x = halves * F32(scale)
    tie = x / F32(scale) == halves  # every one of them where the product is exact
    want = np.rint(halves)
    np.testing.assert_array_equal(np.asarray(sq.quantize(x, scale, 0, spec))[tie], want[tie])
    assert tie.sum() > 100


def test_every_source_of_a_bad_scale():
    for bounds in ((0.0, 0.0), (np.inf, -np.inf), (0.0, 1e-43), (-1e-45, 0.0)):
        assert sq.quant_params(*bounds, sq.QuantSpec()).scale == 1
    wide = sq.quant_params(-3e38, 3e38, sq.QuantSpec())
    assert np.isfinite(wide.scale) and np.isfinite(sq.fake_quant(3e38, -3e38, 3e38, sq.QuantSpec()))


def test_a_range_beside_zero_is_widened_to_hold_it():
    spec = sq.QuantSpec()
    assert sq.quant_params(2.0, 4.0, spec) == sq.quant_params(0.0, 4.0, spec)
    assert sq.quant_params(-4.0, -2.0, spec) == sq.quant_params(-4.0, 0.0, spec)


def test_a_static_zero_is_the_same_as_a_traced_one():
    for spec in (sq.QuantSpec(), sq.QuantSpec(narrow_range=True), sq.QuantSpec(symmetric=True)):
        assert sq.quant_params(0.0, 5.0, spec) == sq.quant_params(jnp.float32(0), 5.0, spec)


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((), 1),
        ((8,), 1),
        ((3, 17), 9),
        ((2, 3, 0), 0),
        ((2, 9, 24), 54),
    ],
)
def test_the_backward_pass_keeps_a_bit_of_each_number(shape, kept):
    x = np.random.default_rng(0).normal(0, 150, shape).astype(F32)
    _, backward = jax.vjp(lambda x: sq.fake_quant(x, -128.0, 127.0, sq.QuantSpec()), x)
    assert sum(a.nbytes for a in jax.tree.leaves(backward)) == kept
    cotangent = np.arange(1, x.size + 1, dtype=F32).reshape(shape)
    (gradient,) = backward(cotangent)
    np.testing.assert_array_equal(gradient, np.where((x > -128.5) & (x < 127.5), cotangent, 0))


@pytest.mark.parametrize(
    "spec", [sq.QuantSpec(), sq.QuantSpec(num_bits=4), sq.QuantSpec(symmetric=True)]
)
def test_the_mask_is_the_same_kept_and_found_anew(spec):
    """On the borders of the range and a unit in the last place beside them, and on no number."""
    lo, hi = (F32(-0.3), F32(0.7))
    scale, zero_point = map(np.asarray, sq.quant_params(lo, hi, spec))
    borders = (np.array([spec.qmin, spec.qmax]) - zero_point + [-0.5, 0.5]).astype(F32) * scale
    x = [np.nextafter(b, F32(end)) for b in borders for end in (-np.inf, b, np.inf)]
    x = np.array([*x, 0, -np.inf, np.inf, np.nan], F32)
    codes = np.rint(x / scale) + zero_point
    want = np.where((codes >= spec.qmin) & (codes <= spec.qmax), 3, 0)
    for keeps_input in (False, True):

        @jax.jit
        def gradient(x, lo, hi, keeps_input=keeps_input):
            rounded = partial(numerics.fake_quant, spec=spec, channel_axis=None)
            y, backward = jax.vjp(lambda x: rounded(x, lo, hi, keeps_input=keeps_input), x)
            return y, backward(jnp.full_like(x, 3))[0]

        y, got = gradient(x, lo, hi)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(y, sq.fake_quant(x, lo, hi, spec))


def test_infinities_saturate_and_nan_stays_visible():
    spec = sq.QuantSpec()
    x = jnp.array([-jnp.inf, jnp.inf, jnp.nan])
    values = np.asarray(sq.fake_quant(x, -1.0, 2.0, spec))
    params = sq.quant_params(-1.0, 2.0, spec)
    np.testing.assert_array_equal(values[:2], sq.dequantize(jnp.array([0, 255]), *params))
    assert np.isnan(values[2])
    assert sq.quantize(x, *params, spec)[2] == params.zero_point


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_dtypes_are_kept(dtype):
    x = jnp.linspace(-1, 1, 33).astype(dtype)
    want = sq.fake_quant(x.astype(jnp.float32), -1.0, 1.0, sq.QuantSpec()).astype(dtype)
    got = sq.fake_quant(x, -1.0, 1.0, sq.QuantSpec())
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got, F32), np.asarray(want, F32))


def test_vmap_over_ranges():
    x = np.linspace(-2, 2, 12, dtype=F32).reshape(3, 4)
    hi = np.array([0.5, 1.0, 2.0], F32)
    spec = sq.QuantSpec()
    got = jax.vmap(lambda x, hi: sq.fake_quant(x, -hi, hi, spec))(x, hi)
    want = [sq.fake_quant(row, -h, h, spec) for row, h in zip(x, hi, strict=True)]
    np.testing.assert_array_equal(got, want)


def test_division_rounds_once_under_jit():
    x = np.random.default_rng(0).uniform(-9, 9, 10_000).astype(F32)
    got = jax.jit(numerics.true_divide)(x, F32(0.0371))
    np.testing.assert_array_equal(got, x / F32(0.0371))
    np.testing.assert_array_equal(
        jax.jit(lambda x: numerics.true_divide(x, 255.0))(x), x / F32(255)
    )


def test_product_and_sum_round_apart_under_jit():
    a, b = np.random.default_rng(0).normal(size=(2, 10_000)).astype(F32)

    @jax.jit
    def both(a, b):
        return numerics.rounded_product(a, 0.99) + numerics.rounded_product(b, 0.01)

    np.testing.assert_array_equal(both(a, b), F32(0.99) * a + F32(0.01) * b)


def test_a_stream_of_sums_is_compiled_once_however_many_read_it():
    """The program grows with its length, not with the square of it."""

    def roundings(once, length):
        def stream(x):
            found = []
            for k in range(length):
                x = once(jnp.clip(jnp.round((x + k) * 0.9), -128, 127))
                found += [jnp.sum(jnp.square(x), -1), jnp.cumsum(x, -1)[:, ::2] * 3]
            return found

        x = jnp.arange(384.0).reshape(8, 48)
        want = jax.tree.map(np.asarray, stream(x))
        jax.tree.map(np.testing.assert_array_equal, jax.jit(stream)(x), want)
        text = jax.jit(stream).lower(x).compile().as_text() or ""
        return text.count("round-nearest-even")

    assert roundings(numerics.computed_once, 8) < 2.5 * roundings(numerics.computed_once, 4)
    assert roundings(lambda x: x, 8) > 3 * roundings(lambda x: x, 4)  # or it is not needed


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.float32])
def test_what_is_computed_once_stays_as_it_is(dtype):
    x = jnp.asarray([[-128, 0, 127], [5, -6, 7]], dtype)
    once = numerics.computed_once
    for f in (once, jax.jit(once), jax.jit(jax.vmap(once))):
        got = f(x)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, x)
    assert jax.jit(numerics.computed_once)(x[:0]).shape == (0, 3)
    slope = jax.grad(lambda y: (numerics.computed_once(jnp.round(y)) * y).sum())(jnp.ones(3))
    np.testing.assert_array_equal(slope, jnp.ones(3))


def test_straight_through_returns_one_and_differentiates_the_other():
    value, grad = jax.value_and_grad(lambda x: numerics.straight_through(jnp.round(x), x * 3))(1.4)
    assert (value, grad) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: sq.quant_params(jnp.zeros(2), 1.0, s), r"\(2,\) and \(\)"),
        (lambda s: sq.quant_params(jnp.zeros((2, 2)), jnp.ones((2, 2)), s), r"\(2, 2\)"),
        (lambda s: sq.fake_quant(jnp.ones((2, 3)), jnp.zeros(2), jnp.ones(2), s), "3 channels"),
        (lambda s: sq.fake_quant(jnp.ones(3), jnp.zeros(3), jnp.ones(3), s, None), "per tensor"),
        (lambda s: sq.fake_quant(jnp.ones(3), jnp.zeros(3), jnp.ones(3), s, 1), "channel_axis 1"),
        (lambda s: sq.quantize(jnp.ones(3), jnp.ones(2), 0, s), r"scale has shape \(2,\)"),
        (
            lambda s: sq.quantize(jnp.ones(3), 1.0, jnp.ones(2, int), s),
            r"zero_point has shape \(2,\)",
        ),
        (lambda s: sq.dequantize(jnp.ones(3, int), jnp.ones(2), 0), r"scale has shape \(2,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(sq.QuantSpec())
