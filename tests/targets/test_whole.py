"""Norms, softmax and products of two tensors alone: both runtimes compute the model's codes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from single_operations import both, compared, grids, integer_model, operation, random_codes, seeds

import simqat_jax as sq
from simqat_jax.ir.program import Tensor
from simqat_jax.numerics.norms import MOST_ELEMENTS, Guard, Statistics, normalized
from simqat_jax.numerics.rounding import ROUNDINGS
from simqat_jax.numerics.softmax import unit

pytestmark = pytest.mark.usefixtures("optimized")


def grid(pair):
    scale, zero = pair
    return sq.Grid(float(np.float32(scale)), zero, 0, 255)


def model_of(backend, kind, shapes, grids, attributes, arrays=None, constants=()):
    """An integer model of one operation; the last shape and grid are its output's."""
    tensors = [
        Tensor(f"t{n}", shape, "float32", g)
        for n, (shape, g) in enumerate(zip(shapes, grids, strict=True))
    ]
    last = len(tensors) - 1
    tensors += [Tensor("mask", m.shape, str(m.dtype), None, m) for m in constants]
    read = (*range(last), *range(last + 1, len(tensors)))
    op = operation(kind, read, (last,), attributes, arrays)
    return integer_model(backend, tensors, [op], range(last), [last])


def codes_of(rng, shape, kind):
    """Codes of rows that differ much, little, in one place, or not at all."""
    full = rng.integers(0, 256, shape)
    near = np.clip(rng.integers(0, 256, (*shape[:-1], 1)) + rng.integers(-1, 2, shape), 0, 255)
    one = np.broadcast_to(rng.integers(0, 256, (*shape[:-1], 1)), shape).copy()
    if kind == "one":
        one[..., 0] = 255 - one[..., 0]
    return {"full": full, "near": near, "same": one, "one": one}[kind].astype(np.uint8)


def norm(backend, shape, x, y, axes=(2,), groups=0, centered=True, epsilon=1e-3, seed=0):
    rng = np.random.default_rng(seed)
    features = (1,) * (len(shape) - 1) + shape[-1:]
    arrays = {
        "scale": (rng.normal(1, 0.5, features) / np.float32(y.scale)).astype(np.float32),
        "shift": (rng.normal(0, 0.5, features) / np.float32(y.scale)).astype(np.float32),
    }
    attributes = {
        "axes": axes,
        "groups": groups,
        "centered": centered,
        "epsilon": float(np.float32(epsilon)),
        "clamp": (seed % 90, 255),
    }
    kind = ROUNDINGS[backend].norm.kind
    return model_of(backend, kind, (shape, shape), (x, y), attributes, arrays)


kinds = st.sampled_from(["full", "near", "same", "one"])
epsilons = st.sampled_from([2.0**-40, 1e-6, 3.0])


@both
@given(
    grids,
    grids,
    seeds,
    st.integers(1, 70),
    kinds,
    st.booleans(),
    st.sampled_from([2.0**-40, 1e-6, 3]),
)
@examples(8)
def test_norms(backend, folder, a, b, seed, length, kind, centered, epsilon):
    shape = (-1, 50, length)
    model = norm(backend, shape, grid(a), grid(b), (2,), 0, centered, epsilon, seed)
    compared(model, folder, [codes_of(np.random.default_rng(seed), (2, 50, length), kind)])


@both
@pytest.mark.parametrize(
    ("shape", "axes", "groups", "centered"),
    [
        ((-1, 5, 1031), (2,), 0, True),
        ((-1, 3, 4000), (2,), 0, True),
        ((-1, 3, 4000), (2,), 0, False),
        ((-1, 6, 5, 12), (1, 2, 4), 3, True),
        ((-1, 40, 40, 8), (1, 2, 4), 2, True),
        ((-1, 7, 6, 5), (1, 2), 0, True),
        ((-1, 64), (2,), 8, True),
        ((-1, 2, MOST_ELEMENTS), (2,), 0, True),
        ((-1, 2, 33_000), (2,), 0, False),
    ],
)
@pytest.mark.parametrize("kind", ["full", "one"])
def test_norms_of_any_axes(backend, folder, shape, axes, groups, centered, kind):
    x, y = grid((0.013, 77)), grid((0.021, 128))
    model = norm(backend, shape, x, y, axes, groups, centered)
    compared(model, folder, [codes_of(np.random.default_rng(1), (2, *shape[1:]), kind)])


@both
@pytest.mark.parametrize("seed", range(2))
def test_norms_of_millions(backend, folder, seed):
    """A runtime that rounds once less, as `x / y` in place of `x * (1 / y)`, is off in a few."""
    model = norm(backend, (-1, 500, 64), grid((0.05, 120)), grid((0.012, 128)), seed=seed)
    codes = codes_of(np.random.default_rng(seed), (128, 500, 64), "full")
    compared(model, folder, [codes])


@both
@pytest.mark.parametrize("guard", [{"least": 3.7}, {"offset": 0.3}, {"least": 2.0, "offset": 0.1}])
def test_guarded_norms(backend, folder, guard):
    """A least deviation, and what is added to it: rows that differ much and little."""
    model = norm(backend, (-1, 50, 12), grid((0.05, 120)), grid((0.012, 128)), centered=False)
    op = dataclasses.replace(model.ops[0], **guard)
    program = dataclasses.replace(model.program, ops=(op,))
    rng = np.random.default_rng(0)
    codes = np.stack([codes_of(rng, (50, 12), kind) for kind in ("full", "near", "same", "one")])
    codes[1:] = np.clip(codes[1:], 118, 122)
    compared(sq.IntegerModel(program), folder, [codes])


def spread(backend, shape, out, x, y, axes, centered=True, rooted=True, **guard):
    multiplier = np.float32(x.scale if rooted else x.scale**2) / np.float32(y.scale)
    fields = {"axes": axes, "centered": centered, "rooted": rooted, "epsilon": 2.0**-40}
    attributes = {**fields, "clamp": (0, 255), **guard}
    kind = ROUNDINGS[backend].norm.spread
    arrays = {"multiplier": np.float32(multiplier)}
    return model_of(backend, kind, (shape, out), (x, y), attributes, arrays)


@both
@given(grids, seeds, st.integers(1, 70), kinds, st.booleans(), st.booleans())
@examples(8)
def test_spreads(backend, folder, a, seed, length, kind, centered, rooted):
    x, rng = grid(a), np.random.default_rng(seed)
    codes = codes_of(rng, (2, 50, length), kind)
    real = (codes.astype(np.float64) - a[1]) * np.float64(np.float32(a[0]))
    want = real.var(-1) if centered else (real * real).mean(-1)
    want = np.sqrt(want) if rooted else want
    y = grid((max(float(want.max()), 1e-3) / 250, 0))
    kept = seed % 2
    out = (-1, 50, 1) if kept else (-1, 50)
    model = spread(backend, (-1, 50, length), out, x, y, (2,), centered, rooted)
    compared(model, folder, [codes])
    got = np.asarray(model.run_codes(codes)).reshape(2, 50)
    # Of equal codes, the root of a fixed number of steps is not quite zero.
    assert np.max(np.abs(got - want / y.scale)) <= 0.51 + 2.5e-4 * x.scale / y.scale


@both
@pytest.mark.parametrize(
    ("shape", "axes"), [((-1, 7, 6, 5), (1, 2)), ((-1, 5, 4000), (2,)), ((-1, 33_000, 2), (1,))]
)
def test_spreads_over_any_axes(backend, folder, shape, axes):
    out = tuple(d for k, d in enumerate(shape) if k not in axes)
    x, y = grid((0.013, 77)), grid((0.01, 0))
    model = spread(backend, shape, out, x, y, axes, least=1.5)
    compared(model, folder, [codes_of(np.random.default_rng(1), (2, *shape[1:]), "full")])


@given(grids, seeds, st.integers(2, 400), kinds, st.sampled_from(sorted(ROUNDINGS)))
@examples(15)
def test_norms_are_those_of_real_numbers(a, seed, length, kind, backend):
    """Within a few units in the last place of float64."""
    codes = codes_of(np.random.default_rng(seed), (20, length), kind)
    c = codes.astype(np.float64) - a[1]
    epsilon = 1e-6 / np.float64(np.float32(a[0])) ** 2
    deviation = np.sqrt(c.var(-1, keepdims=True) + epsilon)
    got = normalized(
        jnp.asarray(c, jnp.float32),
        Statistics((1,), True),
        Guard(jnp.float32(epsilon)),
        ROUNDINGS[backend].norm.root,
    )
    np.testing.assert_allclose(got, (c - c.mean(-1, keepdims=True)) / deviation, 3e-6, 3e-6)


@both
@pytest.mark.parametrize("ends", [(-128, 127), (-127, 127), (1, 255), (-8, 7), (0, 15)])
def test_grids_of_any_width(backend, folder, ends):
    """Signed, narrow and of four bits: codes end where the grid does."""
    lo, hi = ends
    middle = (lo + hi + 1) // 2
    x, y = (sq.Grid(2.0**-k, middle, lo, hi) for k in (3, 4))
    rng, shape = np.random.default_rng(0), (-1, 20, 1500)
    codes = rng.integers(lo, hi, (2, 20, 1500), endpoint=True).astype(x.dtype)
    model = norm(backend, shape, x, y)
    op = dataclasses.replace(model.ops[0], clamp=(lo, hi))
    program = dataclasses.replace(model.program, ops=(op,))
    compared(sq.IntegerModel(program), folder, [codes])
    compared(softmax(backend, shape, x, sq.Grid(0.0001, lo, lo, hi)), folder, [codes])
    square = ((-2, 20, 1500), (-2, 1500, 3), (-2, 20, 3))
    arrays = {"multiplier": np.float32(2.0**-7)}
    attributes = {"scale": 2.0**-8, "clamp": ends}
    product = model_of(backend, "matmul", square, (x, x, y), attributes, arrays)
    other = rng.integers(lo, hi, (2, 1500, 3), endpoint=True).astype(x.dtype)
    compared(product, folder, [codes, other])


@pytest.mark.parametrize("epsilon", [1e-6, 1.0, 1e3, 1e7, 1e12, 1e20])
def test_roots_of_both_runtimes_agree(epsilon):
    v = jnp.float32(epsilon) + jnp.asarray([0.0, 0.01, 1.0, 16_256.0], jnp.float32)
    roots = [rounding.norm.root(v, jnp.float32(epsilon)) for rounding in ROUNDINGS.values()]
    np.testing.assert_allclose(*[r[1:] for r in roots], rtol=1e-6)


# Softmax -----------------------------------------------------------------------------------------


def softmax(backend, shape, x, y, mask=None, keeps=True, axis=2):
    constants = () if mask is None else (mask,)
    attributes = {"axis": axis, "keeps": keeps}
    return model_of(backend, "softmax", (shape, shape), (x, y), attributes, None, constants)


scores = st.tuples(st.floats(1e-4, 1.5), st.integers(0, 255))
shares = st.tuples(st.floats(0.0005, 0.004), st.sampled_from([0, 3]))


@both
@given(scores, shares, seeds, st.integers(1, 70), kinds, st.booleans(), st.booleans())
@examples(8)
def test_softmax(backend, folder, a, b, seed, length, kind, masked, keeps):
    rng = np.random.default_rng(seed)
    mask = rng.random((1, 30, length)) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    given = (mask, keeps) if masked else ()
    model = softmax(backend, (-1, 30, length), grid(a), grid(b), *given)
    codes = codes_of(rng, (2, 30, length), kind)
    compared(model, folder, [codes])
    real = (codes.astype(np.float64) - a[1]) * np.float64(np.float32(a[0]))
    if masked:
        real = np.where(mask == keeps, real, -1e4)
    want = np.asarray(jax.nn.softmax(real, -1), np.float64) / b[0] + b[1]
    got = np.asarray(model.run_codes(codes), np.float64)
    near = 1e-5 + length / unit(length)
    assert np.max(np.abs(got - np.clip(want, 0, 255))) <= 0.5 + near / b[0]


@both
@pytest.mark.parametrize("axis", [1, 2, 3, (1, 3), (3, 2)])
def test_softmax_along_any_axes(backend, folder, axis):
    model = softmax(backend, (-1, 4, 5, 6), grid((0.05, 9)), grid((0.004, 0)), axis=axis)
    compared(model, folder, [codes_of(np.random.default_rng(0), (2, 4, 5, 6), "full")])


@both
@pytest.mark.parametrize("scale", [0.004, 1.0])
def test_softmax_of_millions(backend, folder, scale):
    """A runtime that divides once, in place of multiplying by a quotient, is off in a few."""
    model = softmax(backend, (-1, 500, 2), grid((0.004, 3)), grid((scale, 0)))
    codes = codes_of(np.random.default_rng(0), (4000, 500, 2), "near")
    compared(model, folder, [codes])


@both
def test_softmax_of_many_terms(backend, folder):
    """Of more than 4,096 equal numbers the sum still is exact."""
    model = softmax(backend, (-1, 2, 9000), grid((0.001, 0)), grid((0.00001, 0)))
    compared(model, folder, [codes_of(np.random.default_rng(0), (1, 2, 9000), "near")])


def log_softmax(backend, shape, x, y, axis=2, mask=None):
    constants = () if mask is None else (mask,)
    attributes = {"axis": axis}
    return model_of(backend, "log_softmax", (shape, shape), (x, y), attributes, None, constants)


@both
@pytest.mark.parametrize("axis", [2, (1, 3)])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_log_softmax_behind_a_mask(backend, folder, axis, scale):
    """Also of nothing, in which case all numbers are equal."""
    rng = np.random.default_rng(0)
    mask = rng.random((1, 4, 5, 6)) < 0.5
    mask[:, :, :2] = mask[..., :1] = True
    mask[..., 1] = False
    given = grid((0.05, 9)), grid((scale, 250)), axis, mask
    model = log_softmax(backend, (-1, 4, 5, 6), *given)
    compared(model, folder, [codes_of(rng, (2, 4, 5, 6), "full")])


@both
@given(scores, st.floats(0.005, 0.2), seeds, st.integers(1, 70), kinds)
@examples(8)
def test_log_softmax(backend, folder, a, scale, seed, length, kind):
    model = log_softmax(backend, (-1, 30, length), grid(a), grid((scale, 250)))
    codes = codes_of(np.random.default_rng(seed), (2, 30, length), kind)
    compared(model, folder, [codes])
    real = (codes.astype(np.float64) - a[1]) * np.float64(np.float32(a[0]))
    real = real - real.max(-1, keepdims=True)
    want = (real - np.log(np.exp(real).sum(-1, keepdims=True))) / np.float32(scale)
    got = np.asarray(model.run_codes(codes), np.float64) - 250
    assert np.max(np.abs(got - np.clip(want, -250, 5))) <= 0.5 + 1e-4 / scale


@both
@pytest.mark.parametrize("length", [2, 1000, 16384])
def test_log_softmax_of_many_terms_and_sums(backend, folder, length):
    """Sums of all sizes: up to so many equal numbers."""
    model = log_softmax(backend, (-1, 60, length), grid((0.5, 9)), grid((0.05, 255)))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 190, (1, 60, length)) + 0 * np.arange(60)[:, None]
    codes[rng.random(codes.shape) < np.linspace(0, 1, 60)[:, None] ** 4] = 200
    compared(model, folder, [codes.astype(np.uint8)])


@both
def test_log_softmax_of_millions(backend, folder):
    model = log_softmax(backend, (-1, 500, 2), grid((0.02, 3)), grid((0.0031, 255)))
    compared(model, folder, [codes_of(np.random.default_rng(0), (2000, 500, 2), "near")])


# Products of two tensors -------------------------------------------------------------------------


def product(backend, rows, terms, columns, a, b, y, clamp=(0, 255)):
    shapes = ((-2, rows, terms), (-2, terms, columns), (-2, rows, columns))
    scale = np.float32(a.scale) * np.float32(0.25)
    multiplier = scale * np.float32(b.scale) / np.float32(y.scale)
    attributes = {"scale": float(scale), "clamp": clamp}
    arrays = {"multiplier": np.float32(multiplier)}
    return model_of(backend, "matmul", shapes, (a, b, y), attributes, arrays)


@both
@given(grids, grids, grids, seeds, *[st.integers(1, 20)] * 3)
@examples(8)
def test_products_of_two(backend, folder, a, b, y, seed, rows, terms, columns):
    model = product(backend, rows, terms, columns, *map(grid, (a, b, y)), (seed % 100, 255))
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, 256, s) for s in ((4, rows, terms), (4, terms, columns))]
    compared(model, folder, [c.astype(np.uint8) for c in codes])


def factors_of_sums_beside_ties(rng, terms, step):
    """Pairs of rows from 0 to 255, whose products add up to halves of `step`, 1 more or less."""
    a, b = rng.integers(200, 256, (2, 300, terms))
    b[rng.random((300, terms)) < np.linspace(0, 1, 300)[:, None]] = 0
    fill = step // 255**2 + 3
    a[:, -fill:], b[:, -fill:] = 0, 255
    missing = step - (a * b).sum(1) % step - step // 2 + rng.integers(-1, 2, 300)
    missing %= step
    for k in range(fill - 2):
        a[:, -fill + k] = np.where(missing >= 255**2, 255, 0)
        missing -= a[:, -fill + k] * 255
    a[:, -2], a[:, -1], b[:, -1] = missing // 255, missing % 255, 1
    return a, b


@both
@pytest.mark.parametrize(("terms", "bits"), [(258, 16), (259, 16), (700, 18), (2000, 19)])
def test_long_products_of_two(backend, folder, terms, bits):
    """Of sums that lie halfway between two codes, or beside, up to the largest ones."""
    grids = (grid((2.0**-2, 0)), grid((2.0**-6, 255)), grid((2.0 ** (bits - 10), 255)))
    model = product(backend, 1, terms, 1, *grids)
    a, b = factors_of_sums_beside_ties(np.random.default_rng(0), terms, 2**bits)
    codes = [a[:, None].astype(np.uint8), (255 - b)[..., None].astype(np.uint8)]
    compared(model, folder, codes)


@both
@pytest.mark.parametrize("clamp", [(0, 255), (70, 180)])
def test_operations_behind_each_other(backend, folder, clamp):
    """What one of them returns and the next one reads, TFLite leaves in float."""
    scores, shares, values = grid((0.05, 120)), grid((0.004, 0)), grid((0.02, 128))
    long, wide, short = (-2, 20, 30), (-2, 30, 9), (-2, 20, 9)
    described = [(long, scores), (wide, values), (long, shares), (short, values), (short, shares)]
    scale = np.float32(shares.scale)
    product = {"scale": scale.item(), "clamp": clamp}
    arrays = {"multiplier": scale * np.float32(values.scale) / np.float32(values.scale)}
    ops = [
        operation("softmax", (0,), (2,), {"axis": 2, "keeps": True}, path="first"),
        operation("matmul", (2, 1), (3,), product, arrays, path="product"),
        operation("softmax", (3,), (4,), {"axis": 2, "keeps": True}, path="last"),
    ]
    tensors = [Tensor(f"t{n}", s, "float32", g) for n, (s, g) in enumerate(described)]
    model = integer_model(backend, tensors, ops, [0, 1], [4])
    compared(model, folder, random_codes(model, 3))
