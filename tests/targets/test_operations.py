"""Each operation alone, with any grids: both runtimes compute the integer model's codes."""

import jax
import numpy as np
import pytest
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from models import export
from single_operations import (
    both,
    compared,
    grids,
    integer_model,
    kernel_bits,
    layer,
    operation,
    random_codes,
    seeds,
    single,
)

import simqat_jax as sq
from simqat_jax.ir.program import Tensor
from simqat_jax.numerics.exact_sums import MOST
from simqat_jax.numerics.rounding import ROUNDINGS

pytestmark = pytest.mark.usefixtures("optimized")
# Sums and products of tensors --------------------------------------------------------------------


def addition(backend, a, b, c, subtract=False, clamp=(0, 255)):
    rounding = ROUNDINGS[backend]
    how = rounding.subtract if subtract else rounding.add
    grids = tuple(sq.Grid(float(np.float32(scale)), zero, 0, 255) for scale, zero in (a, b, c))
    multipliers = [m.item() for m in how.constants(grids)]
    return single(backend, how.kind, (a, b, c), {"multipliers": multipliers}, clamp=clamp)


@both
@given(grids, grids, grids, seeds, st.booleans())
@examples(40)
def test_additions(backend, folder, a, b, c, seed, subtract):
    codes = np.random.default_rng(seed).integers(0, 256, (2, 999, 16)).astype(np.uint8)
    compared(addition(backend, a, b, c, subtract, (seed % 100, 255)), folder, list(codes))


@pytest.mark.versions
@both
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("zeros", [(0, 0, 0), (255, 255, 255), (0, 255, 128), (3, 130, 77)])
def test_additions_that_tie(backend, folder, zeros, subtract):
    """Every second sum of all pairs of codes lies halfway between two codes."""
    a, b, c = zip((0.25, 0.25, 0.5), zeros, strict=True)
    pairs = np.indices((256, 256)).reshape(2, -1, 16).astype(np.uint8)
    compared(addition(backend, a, b, c, subtract), folder, list(pairs))


@pytest.mark.parametrize("seed", [1, 5, 7])
def test_additions_that_tell_one_rounding_from_two(folder, seed):
    """With these grids, a product that is rounded before it is added gives another code."""
    rng = np.random.default_rng(seed)
    scales, zeros = rng.uniform(0.003, 0.3, 3).astype(np.float32), rng.integers(0, 256, 3)
    a, b, c = ((float(s), int(z)) for s, z in zip(scales, zeros, strict=True))
    pairs = np.indices((256, 256)).reshape(2, -1, 16).astype(np.uint8)
    compared(addition("onnx", a, b, c), folder, list(pairs))


@both
@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize(
    "scales",
    [(1.0, 0.003, 1 / 283), (0.003, 1.0, 0.003), (1.0, 1.0, 1e-6), (1e-5, 0.03, 0.05), (1, 1, 3e3)],
)
def test_additions_of_scales_that_differ_widely(backend, folder, scales, subtract):
    """One is one to some, 256 and more times the output's, or less than a thousandth."""
    a, b, c = zip(scales, (3, 130, 77), strict=True)
    codes = np.random.default_rng(0).integers(0, 256, (2, 4000, 16))
    codes[:, 2000:] = np.clip(codes[:, 2000:] % 4 + np.array([2, 129])[:, None, None], 0, 255)
    model = addition(backend, a, b, c, subtract, (9, 255))
    compared(model, folder, list(codes.astype(np.uint8)))


@both
@given(grids, grids, grids, seeds)
@examples(20)
def test_products(backend, folder, a, b, c, seed):
    multiplier = np.float32(a[0]) * np.float32(b[0]) / np.float32(c[0])
    codes = np.random.default_rng(seed).integers(0, 256, (2, 999, 16)).astype(np.uint8)
    kind = "mul_onnx" if backend == "onnx" else "mul"
    arrays = {"multiplier": multiplier}
    model = single(backend, kind, (a, b, c), {}, arrays, clamp=(seed % 100, 200))
    compared(model, folder, list(codes))


@both
@given(grids, seeds, st.sampled_from([(-1, 3, 5), (-1, 2, 4, 16)]), st.booleans())
@examples(10)
def test_extremes(backend, folder, a, seed, shape, constant):
    kind = ("maximum", "minimum")[seed % 2]
    model = single(backend, kind, (a, a, a), {}, shape=shape)
    codes = random_codes(model, 3, seed)
    if constant:  # one for each channel, held once along the batch
        grid = model.tensors[1].grid
        held = codes[1][:1] if seed % 3 else codes[1][:1, ..., :1]
        tensor = Tensor("t1", (shape[0], *held.shape[1:]), "float32", grid, held)
        tensors = [model.tensors[0], tensor, model.tensors[2]]
        model = integer_model(backend, tensors, model.ops, [0], [2])
        codes = codes[:1]
    compared(model, folder, codes)


@both
@pytest.mark.parametrize("kind", ["argmax", "argmin"])
@pytest.mark.parametrize("shape", [(-1, 37), (-1, 3, 200, 5)])
def test_positions(backend, folder, kind, shape):
    """Of ties the first one."""
    rng = np.random.default_rng(0)
    for axis in range(1, len(shape)):
        out = tuple(d for k, d in enumerate(shape) if k != axis)
        x = Tensor("x", shape, "float32", sq.Grid(0.1, 9, 0, 255))
        tensors = [x, Tensor("y", out, "int32", None)]
        model = integer_model(
            backend, tensors, [operation(kind, (0,), (1,), {"axis": axis})], [0], [1]
        )
        ends = ((0, 256), (126, 131), (255, 256))
        codes = np.concatenate([rng.integers(*pair, (30, *shape[1:])) for pair in ends])
        compared(model, folder, [codes.astype(np.uint8)])


# Layers ------------------------------------------------------------------------------------------


@pytest.mark.versions
@both
@given(grids, grids, seeds, st.integers(1, 300), st.booleans(), kernel_bits)
@examples(20)
def test_matrix_products(backend, folder, x, y, seed, depth, tie, bits):
    arrays = layer(np.random.default_rng(seed), x, y, (depth, 16), tie, bits)
    shapes = (-1, 2, depth), (-1, 2, 16)
    model = single(backend, "dense", (x, y), {}, arrays, *shapes, (seed % 100, 255))
    compared(model, folder, random_codes(model, 30, seed))


@both
@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_sums_as_large_as_int32_holds(backend, folder, zero_point):
    depth = MOST // (127 * 255)
    rng = np.random.default_rng(0)
    kernel = np.where(rng.random((depth, 16)) < np.linspace(0, 1, 16), 127, -127).astype(np.int8)
    scale = np.full(16, 2.0**-24, np.float32)
    arrays = {"kernel": kernel, "scale": scale, "bias": np.zeros(16, np.int32), "multiplier": scale}
    ends = ((1.0, zero_point), (1.0, 128))
    model = single(backend, "dense", ends, {}, arrays, (-1, depth), (-1, 16))
    codes = np.stack([np.full(depth, 255), np.zeros(depth), rng.integers(0, 256, depth)])
    compared(model, folder, [codes.astype(np.uint8)])
    got = np.asarray(model.run_codes(codes.astype(np.uint8)), np.int64)
    exact = (codes.astype(np.int64) - zero_point) @ kernel.astype(np.int64)
    np.testing.assert_array_equal(got, np.clip(np.rint(exact * 2.0**-24) + 128, 0, 255))


@both
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("kind", "shape", "held"),
    [
        ("dense", (64, 33), True),
        ("dense", (63, 33), False),
        ("pointwise", (1, 1, 64, 33), True),
        ("conv", (3, 3, 5, 27), False),
        ("depthwise", (3, 3, 1, 123), False),
    ],
)
def test_kernels_of_few_bits(backend, folder, kind, bits, shape, held):
    """ONNX files hold them packed, TFLite files where XNNPACK has INT4: in `held`."""
    x, y = (0.05, 120), (0.1, 128)
    depth = shape[-1] if kind == "depthwise" else shape[-2]
    arrays = layer(np.random.default_rng(bits), x, y, shape, False, bits)
    ends, sizes = (
        ((-1,), (depth, shape[-1])) if kind == "dense" else ((-1, 6, 6), (depth, shape[-1]))
    )
    attributes = {
        "strides": [1, 1],
        "padding": [[(k - 1) // 2] * 2 for k in shape[:2]],
        "input_dilation": [1, 1],
        "kernel_dilation": [1, 1],
        "groups": depth if kind == "depthwise" else 1,
    }
    shapes = [(*ends, size) for size in sizes]
    name = "dense" if kind == "dense" else "conv"
    model = single(backend, name, (x, y), attributes, arrays, *shapes, (100, 255))
    compared(model, folder, random_codes(model, 3))
    size, codes = (folder / f"single.{backend}").stat().st_size, arrays["kernel"].size
    others = 12 * shape[-1] + 3000  # scales and bias; names, operators, tables
    packed = codes * bits // 8 if backend == "onnx" else codes // 2 if held else codes
    assert packed < size < packed + others


@pytest.mark.parametrize(("bias", "held"), [(2**27 - 2**20, True), (2**28, False)])
def test_xnnpack_multiplies_sums_of_packed_kernels_by_16(folder, bias, held):
    """Larger sums would leave int32, so that their kernels take a byte each."""
    kernel = np.random.default_rng(0).integers(-8, 8, (64, 256)).astype(np.int8)
    scale = np.full(256, 2.0**-21, np.float32)
    biases = np.tile([bias, -bias, 0, 5], 64).astype(np.int32)
    arrays = {"kernel": kernel, "scale": scale, "bias": biases, "multiplier": scale}
    ends = ((1.0, 120), (1.0, 128))
    model = single("tflite", "dense", ends, {}, arrays, (-1, 64), (-1, 256))
    compared(model, folder, random_codes(model, 9))
    assert ((folder / "single.tflite").stat().st_size < kernel.size) == held


@both
@given(
    grids,
    grids,
    seeds,
    st.sampled_from([(1, 4, 6), (2, 4, 6), (4, 4, 8), (1, 1, 3), (1, 3, 16), (1, 70, 5)]),
    st.tuples(*[st.integers(1, 3)] * 6),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.booleans(),
    kernel_bits,
)
@examples(40)
def test_convolutions(backend, folder, x, y, seed, channels, window, padding, tie, bits):
    groups, features, out = channels
    lengths, strides, dilation = window[:2], window[2:4], window[4:]
    pads = [list(padding[:2]), list(padding[2:])]
    sizes = [
        (8 + sum(p) - (k - 1) * d - 1) // s + 1
        for p, k, d, s in zip(pads, lengths, dilation, strides, strict=True)
    ]
    shape = (*lengths, features // groups, out)
    arrays = layer(np.random.default_rng(seed), x, y, shape, tie, bits)
    attributes = {
        "strides": list(strides),
        "padding": pads,
        "input_dilation": [1, 1],
        "kernel_dilation": list(dilation),
        "groups": groups,
    }
    shape, out_shape = (-1, 8, 8, features), (-1, *sizes, out)
    model = single(backend, "conv", (x, y), attributes, arrays, shape, out_shape, (y[1], 255))
    compared(model, folder, random_codes(model, 2, seed))


@both
@given(grids, grids, seeds, st.sampled_from([(-1, 9), (-1, 3, 9), (-1, 2, 3, 9)]))
@examples(15)
def test_batch_norms(backend, folder, x, y, seed, shape):
    arrays = layer(np.random.default_rng(seed), x, y, (9,), seed % 2)
    arrays["kernel"] = np.sign(arrays["kernel"]) * np.int8(127)
    model = single(backend, "affine", (x, y), {}, arrays, shape)
    compared(model, folder, random_codes(model, 20, seed))


# Sums, pooling -----------------------------------------------------------------------------------


@both
@given(
    grids,
    grids,
    seeds,
    st.sampled_from([[1, 2], [1], [2, 3], [1, 3], [1, 2, 3]]),
    st.sampled_from([None, 1.0, 7.0]),
)
@examples(30)
def test_sums(backend, folder, x, y, seed, axes, divisor):
    shape = (-1, *map(int, np.random.default_rng(seed).integers(1, 8, 3)))
    divisor = np.float32(divisor or np.prod([shape[a] for a in axes]))
    multiplier = np.float32(x[0]) / (np.float32(y[0]) * divisor)
    out = tuple(d for k, d in enumerate(shape) if k not in axes)
    attributes = {"axes": axes, "count": float(divisor)}
    model = single(backend, "sum", (x, y), attributes, {"multiplier": multiplier}, shape, out)
    compared(model, folder, random_codes(model, 50, seed))


@both
@pytest.mark.parametrize("side", [28, 56, 112])
@pytest.mark.parametrize("ratio", [1.0, 0.37])
def test_means_of_large_images(backend, folder, side, ratio):
    divisor = np.float32(side**2)
    x, y = (0.0437, 3), (0.0437 / ratio, 17)
    attributes = {"axes": [1, 2], "count": float(divisor)}
    arrays = {"multiplier": np.float32(x[0]) / (np.float32(y[0]) * divisor)}
    shape, out = (-1, side, side, 2), (-1, 2)
    model = single(backend, "sum", (x, y), attributes, arrays, shape, out)
    compared(model, folder, random_codes(model, 4))


@both
@given(grids, grids, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
@examples(20)
def test_pooled_sums(backend, folder, x, y, seed, length, stride, pad):
    size = (6 + 2 * pad - length) // stride + 1
    attributes = {
        "window": [1, length, length, 1],
        "strides": [1, stride, stride, 1],
        "padding": [[0, 0], [pad, pad], [pad, pad], [0, 0]],
        "count": float(length**2),
    }
    multiplier = np.float32(x[0]) / (np.float32(y[0]) * np.float32(length**2))
    shape, out = (-1, 6, 6, 5), (-1, size, size, 5)
    for kind, ends in (("sum_pool", (x, y)), ("max_pool", (x, x))):
        model = single(backend, kind, ends, attributes, {"multiplier": multiplier}, shape, out)
        compared(model, folder, random_codes(model, 10, seed))


# What moves or maps codes ------------------------------------------------------------------------


@both
@given(grids, st.integers(0, 120), st.integers(121, 255))
@examples(10)
def test_clips(backend, folder, x, lo, hi):
    codes = [np.arange(256, dtype=np.uint8).reshape(16, 16)]
    compared(single(backend, "clip", (x, x), {}, clamp=(lo, hi)), folder, codes)


@pytest.mark.versions
@both
@pytest.mark.parametrize("symmetric", [False, True])
def test_tables_of_every_code(backend, symmetric, tmp_path):
    grid = sq.Grid(0.1, 0, -127, 127) if symmetric else sq.Grid(0.1, 9, 0, 255)
    tensors = [Tensor("x", (-1,), "float32", grid), Tensor("y", (-1,), "float32", grid)]
    codes = np.arange(grid.qmin, grid.qmax + 1)
    table = np.random.default_rng(0).permutation(codes).astype(grid.dtype)
    op = operation("table", (0,), (1,), {}, {"table": table})
    model = integer_model(backend, tensors, [op], [0], [1])
    compared(model, tmp_path, [codes.astype(grid.dtype)])


@both
@pytest.mark.parametrize("shape, out", [((-1, 4), (-1, 3, 3, 4)), ((-1, 3, 1, 4), (-1, 3, 3, 4))])
@pytest.mark.parametrize("multiplied", [False, True])
def test_broadcasts(backend, shape, out, multiplied, tmp_path):
    grid = sq.Grid(0.1, 9, 0, 255)
    shapes = {"x": shape, "y": out, "wide": out, "product": out}
    tensors = [Tensor(name, s, "float32", grid) for name, s in shapes.items()]
    dims = [0, 3] if len(shape) == 2 else [0, 1, 2, 3]
    ops = [operation("broadcast", (0,), (2,), {"dimensions": dims}, path="wide")]
    if multiplied:
        scale = np.float32(grid.scale)
        arrays = {"multiplier": scale * scale / scale}
        kind = "mul_onnx" if backend == "onnx" else "mul"
        ops.append(operation(kind, (1, 2), (3,), {"clamp": [0, 255]}, arrays))
    model = integer_model(backend, tensors, ops, [0, 1], [3 if multiplied else 2])
    compared(model, tmp_path, random_codes(model, 3))


@pytest.mark.parametrize("approximate", [True, False])
@pytest.mark.parametrize("scales", [(0.03, 0.02), (0.011, 0.017), (0.05, 0.025), (0.2, 0.1)])
def test_gelu_by_itself_and_close_to_ties(folder, scales, approximate):
    """TFLite has an operator for it, which is written where no digit can tell."""
    x, y = (sq.Grid(float(np.float32(s)), z, 0, 255) for s, z in zip(scales, (77, 9), strict=True))
    real = (np.arange(256) - 77) * x.scale
    codes = np.asarray(y.quantize(jax.nn.gelu(real.astype(np.float32), approximate=approximate)))
    pairs = ((scales[0], 77), (scales[1], 9))
    model = single("tflite", "table", pairs, {}, {"table": codes}, shape=(-1, 256))
    compared(model, folder, [np.arange(256, dtype=np.uint8)[None]])


# Masks -------------------------------------------------------------------------------------------


def of_integers(backend, kind, shapes, dtype, grids, attributes, arrays=None):
    """An integer model of an operation whose second input, of this type, has no codes."""
    x, y = (sq.Grid(float(np.float32(scale)), zero, 0, 255) for scale, zero in grids)
    given = zip("xmy", shapes, ("float32", dtype, "float32"), (x, None, y), strict=True)
    tensors = [Tensor(name, shape, t, on) for name, shape, t, on in given]
    op = operation(kind, (0, 1), (2,), attributes, arrays)
    return integer_model(backend, tensors, [op], [0, 1], [2])


@both
@given(grids, grids, seeds, st.integers(1, 40), st.booleans())
@examples(5)
def test_means_of_counts(backend, folder, a, b, seed, length, wide):
    """Of none, of all and of what is between; one count for all features or one for each."""
    shapes = (-1, length, 3), (-1, 3 if wide else 1), (-1, 3)
    divisors = np.arange(1, length + 2, dtype=np.float32)
    arrays = {"multiplier": np.float32(a[0]) / (np.float32(b[0]) * divisors)}
    attributes = {"axes": (1,), "clamp": (seed % 90, 255)}
    model = of_integers(backend, "counted_sum", shapes, "int32", (a, b), attributes, arrays)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (200, length, 3)).astype(np.uint8)
    counts = rng.integers(0, length + 1, (200, *shapes[1][1:])).astype(np.int32)
    verified(model, folder, codes, counts)


@both
@pytest.mark.parametrize("length", [1, 7])
def test_numbers_divided_by_counts(backend, folder, length):
    shapes = (-1, 5, 3), (-1, 5, 1), (-1, 5, 3)
    multiplier = np.float32(1.5) / np.arange(1, length + 2, dtype=np.float32)
    arrays, attributes = {"multiplier": multiplier}, {"axes": (), "clamp": (0, 255)}
    grids = (0.3, 77), (0.2, 120)
    model = of_integers(backend, "counted_sum", shapes, "int32", grids, attributes, arrays)
    rng = np.random.default_rng(length)
    codes = rng.integers(0, 256, (400, 5, 3)).astype(np.uint8)
    verified(model, folder, codes, rng.integers(0, length + 1, (400, 5, 1)).astype(np.int32))


@both
def test_means_of_sums_beyond_24_bits(backend, folder):
    length, shapes = 90_000, ((-1, 90_000, 2), (-1, 1), (-1, 2))
    grids = (0.25, 0), (0.5, 3)
    multiplier = np.float32(0.5) / np.arange(1, length + 2, dtype=np.float32)
    arrays, attributes = {"multiplier": multiplier}, {"axes": (1,), "clamp": (0, 255)}
    model = of_integers(backend, "counted_sum", shapes, "int32", grids, attributes, arrays)
    codes = np.random.default_rng(0).integers(240, 256, (3, length, 2)).astype(np.uint8)
    verified(model, folder, codes, np.array([[length], [length - 1], [80_000]], np.int32))


@both
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("code", [0, 77, 255])
def test_masks(backend, folder, code, keeps):
    shapes = (-1, 5, 3), (-1, 5, 1), (-1, 5, 3)
    given = ((0.1, 77), (0.1, 77)), {"keeps": keeps, "code": code}
    model = of_integers(backend, "mask", shapes, "bool", *given)
    rng = np.random.default_rng(code)
    codes = rng.integers(0, 256, (200, 5, 3)).astype(np.uint8)
    verified(model, folder, codes, rng.random((200, 5, 1)) < 0.5)


def verified(model, folder, codes, others):
    """Write the model, run the file, and compare all codes."""
    path = folder / f"single.{model.backend}"
    export(model, path)
    x = model.tensors[0].grid
    real = (codes.astype(np.float32) - np.float32(x.zero_point)) * np.float32(x.scale)
    np.testing.assert_array_equal(x.quantize(real), codes)
    report = sq.verify(model, path, real, others)
    assert report.differing == 0, report
