"""Each primitive in both runtimes: exact where arithmetic is, close where a function is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from primitive_programs import in_runtime, primitives_of

from simqat_jax.ops.primitives import Primitive
from simqat_jax.targets.onnx import primitives as onnx
from simqat_jax.targets.tflite import primitives as tflite

pytestmark = pytest.mark.usefixtures("optimized")
both = pytest.mark.parametrize("backend", ["onnx", "tflite"])

RNG = np.random.default_rng(0)
SHAPE = (40, 6, 8)
REALS = [(scale * RNG.normal(size=SHAPE)).astype(np.float32) for scale in (90, 3)]
REALS[0][:10] = np.rint(REALS[0][:10]) + 0.5  # ties
REALS[1][0] = REALS[0][0]
UNIT = (np.abs(RNG.normal(size=SHAPE)) % 0.8 + 0.1).astype(np.float32)
INTS = [RNG.integers(-9, 9, SHAPE).astype(np.int32), RNG.integers(1, 9, SHAPE).astype(np.int32)]
BOOLS = [x > 3 for x in INTS]
BYTES = RNG.integers(0, 256, SHAPE).astype(np.uint8)
MEAN, STD = np.float32([[0.485, 0.456] * 4]), np.float32([[0.229, 0.224] * 4])
f32 = np.float32


def named(names):
    """Functions of `jax.lax`."""
    return {name: getattr(lax, name) for name in names.split()}


def results(functions, backend, folder, *args):
    """Yield name, result and what JAX returns for each function, in a runtime and in the model."""
    model = primitives_of(lambda *xs: [f(*xs) for f in functions.values()], backend, *args)
    runs = [in_runtime(model, folder, *args)]
    if backend == "onnx":  # the other model holds the same primitives
        runs.append(model(*args))
    arrays = args if functions is ARITHMETIC else list(map(jnp.asarray, args))
    wants = [np.asarray(f(*arrays)) for f in functions.values()]
    for run in runs:
        yield from zip(functions, run, wants, strict=True)


def assert_exact(functions, *where):
    """Runtime and integer model give every bit."""
    for name, got, want in results(functions, *where):
        assert got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want, err_msg=name)


def assert_close(functions, tolerance, *where):
    """The runtime gives a result that is as close."""
    for name, got, want in results(functions, *where):
        np.testing.assert_allclose(got, want, tolerance, tolerance, err_msg=name)


# Arithmetic --------------------------------------------------------------------------------------

ARITHMETIC = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "square": lambda x, y: (x - y) ** 2,
    "cube": lambda x, y: (x * x) * x,
    "bytes": lambda x, y: x / f32(255),
    "to one": lambda x, y: f32(2) * (x / f32(255)) - f32(1),
    "half": lambda x, y: x / f32(127.5) - f32(1),
    "normalized": lambda x, y: (x / f32(255) - MEAN[None]) / STD[None],
    "inverse times": lambda x, y: (f32(1) / x) * y,
    "times inverse": lambda x, y: y * (f32(1) / x),
    "inverse twice": lambda x, y: f32(1) / (f32(1) / x),
    "contracted": lambda x, y: x * y + x,
    "scaled": lambda x, y: x * f32(0.1) + f32(0.3),
    "factors": lambda x, y: x * f32(0.1) * f32(0.7),
    "divisors": lambda x, y: x / f32(3) / f32(7),
    "terms": lambda x, y: x + f32(0.1) + f32(0.7),
    "difference of squares": lambda x, y: x * x - y * y,
}
"""What compilers like to rewrite; NumPy rounds each operation by itself."""


@both
def test_arithmetic_is_rounded_operation_by_operation(backend, tmp_path):
    assert_exact(ARITHMETIC, backend, tmp_path, *REALS)


POWERS = {y: functools.partial(lax.integer_pow, y=y) for y in (0, 1, 2, 3, 4, 7, 11, -1, -3)}


@both
def test_whole_powers(backend, tmp_path):
    assert_exact(POWERS, backend, tmp_path, UNIT)


EXACT = named("max min eq ne lt le gt ge")
EXACT_ALONE = {
    **named("neg abs sign floor ceil square is_finite"),
    "round": jnp.round,
    "clamp": lambda x: lax.clamp(-1.0, x, 2.0),
    "to int32": lambda x: x.astype(jnp.int32),
    "to bool": lambda x: x.astype(bool),
    "reduce_max": lambda x: x.max((1, 2)),
    "reduce_min": lambda x: x.min(-1),
    "argmax": lambda x: jnp.argmax(x, 1),
    "argmin": lambda x: jnp.argmin(x, 2),
    "sort": lambda x: jnp.sort(x, 1),
    "top_k": lambda x: lax.top_k(x, 3)[0],
    "places of top_k": lambda x: lax.top_k(x, 3)[1],
}


SELECT = {
    "arrays": jnp.where,
    "number": lambda p, x, y: jnp.where(p, x, -1e9),
    "row": lambda p, x, y: jnp.where(p[:, :1], x, y),
}


@both
def test_what_picks_values_is_exact(backend, tmp_path):
    assert_exact(EXACT, backend, tmp_path, *REALS)
    assert_exact(EXACT_ALONE, backend, tmp_path, REALS[0])
    assert_exact(SELECT, backend, tmp_path, BOOLS[0], *REALS)


# Integers, truth values, moves -------------------------------------------------------------------

TABLE = np.arange(60, dtype=np.float32).reshape(20, 3)
INTEGERS = named("add sub mul div rem max min eq ne lt le gt ge bitwise_xor")
INTEGERS_ALONE = {
    **named("neg abs sign bitwise_not"),
    "reduce_sum": lambda x: x.sum(1),
    "reduce_prod": lambda x: x.prod(-1),
    "reduce_max": lambda x: x.max(1),
    "reduce_min": lambda x: x.min(-1),
    "argmax": lambda x: jnp.argmax(x, -1),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "cumsum from behind": lambda x: lax.cumsum(x, 2, reverse=True),
    "sort": lambda x: jnp.sort(x, -1),
    "to float32": lambda x: x.astype(jnp.float32),
    "to uint8": lambda x: x.astype(jnp.uint8),
    "taken": lambda x: jnp.take(TABLE, x + 9, axis=0),
    "taken by bytes": lambda x: lax.gather(
        TABLE,
        (x + 9).astype(jnp.uint8)[..., None],
        lax.GatherDimensionNumbers((3,), (0,), (0,)),
        (1, 3),
    ),
    "taken and clipped": lambda x: jnp.take(TABLE, x * 3, axis=0, mode="clip"),
    "one_hot": lambda x: jax.nn.one_hot(x, 5),
}
TRUTH = named("bitwise_and bitwise_or bitwise_xor eq ne lt max min")
TRUTH_ALONE = {
    "not": lax.bitwise_not,
    "any": lambda p: p.any(1),
    "all": lambda p: p.all(-1),
    "max": lambda p: p.max(1),
    "min": lambda p: p.min(-1),
    "argmax": lambda p: jnp.argmax(p, 1),
    "to float32": lambda p: p.astype(jnp.float32),
    "to int32": lambda p: p.astype(jnp.int32),
}
MOVES = {
    "rev": lambda x: lax.rev(x, (1, 2)),
    "transpose": lambda x: x.transpose(0, 2, 1),
    "slice": lambda x: x[:, 1:5:2],
    "backwards": lambda x: x[:, ::-2],
    "concatenate": lambda x: jnp.concatenate([x, x[:, :2]], 1),
    "stack": lambda x: jnp.stack([x, x], -1),
    "split": lambda x: jnp.split(x, [2, 3], 1)[1],
    "broadcast": lambda x: jnp.broadcast_to(x[:, :, None], (*x.shape[:2], 3, 8)),
    "tile": lambda x: jnp.tile(x, (1, 2, 1)),
    "repeat": lambda x: jnp.repeat(x, 2, 1),
    "reshape": lambda x: x.reshape(-1, 48),
    "batch in rows": lambda x: x.reshape(-1, 8),
    "taken": lambda x: x[:, jnp.array([1, 3, 3])],
    "along the batch": lambda x: jnp.concatenate(
        [jnp.broadcast_to(jnp.zeros(8, x.dtype), (x.shape[0], 1, 8)), x], 1
    ),
}
PAD = {"pad": lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 2)), constant_values=1)}


@both
def test_integers_are_exact(backend, tmp_path):
    assert_exact(INTEGERS, backend, tmp_path, *INTS)
    assert_exact(INTEGERS_ALONE, backend, tmp_path, INTS[0])
    assert_exact(TRUTH, backend, tmp_path, *BOOLS)
    assert_exact(TRUTH_ALONE, backend, tmp_path, BOOLS[0])


@both
@pytest.mark.parametrize("x", [REALS[0], INTS[0], BOOLS[0], BYTES], ids=lambda x: str(x.dtype))
def test_moves_are_exact(backend, x, tmp_path):
    assert_exact(MOVES if x.dtype == np.uint8 else MOVES | PAD, backend, tmp_path, x)


# Functions and sums ------------------------------------------------------------------------------

SMOOTH = {
    **named("exp exp2 expm1 log log1p tanh logistic sqrt rsqrt cbrt sin cos tan"),
    "pow": lambda x: lax.pow(x, x + 1),
}
SMOOTH_IN_ONE = {
    "onnx": {
        **named("asin acos atan sinh cosh asinh atanh erf erfc"),
        "acosh": lambda x: lax.acosh(x + 1),
    },
    "tflite": {"atan2": lambda x: lax.atan2(x, 1 - x)},
}
SUMS = {
    "reduce_sum": lambda x, y: x.sum(1),
    "of two axes": lambda x, y: x.sum((1, 2)),
    "reduce_prod": lambda x, y: x.prod(1),
    "cumsum": lambda x, y: jnp.cumsum(x, 1),
    "dense": lambda x, y: x @ TABLE[:8],
    "precise": lambda x, y: jnp.matmul(x, TABLE[:8], precision="highest"),
    "batched": lambda x, y: x @ y.transpose(0, 2, 1),
    "scalar": lambda x, y: jnp.einsum("bik,bik->b", x, y),
    "outer": lambda x, y: jnp.einsum("bi,bj->bij", x[:, 0], y[:, 0]),
    "heads": lambda x, y: jnp.einsum(
        "bqhd,bkhd->bhqk", x.reshape(-1, 6, 2, 4), y.reshape(-1, 6, 2, 4)
    ),
}
KERNEL = RNG.normal(size=(3, 2, 8, 6)).astype(np.float32)


def convolution(strides, padding, kernel, groups=1, dilation=None):
    """A function of rows, or of images."""
    numbers = ("NWC", "WIO", "NWC") if kernel.ndim == 3 else ("NHWC", "HWIO", "NHWC")

    def convolve(x):
        x = x if kernel.ndim == 3 else x.reshape(-1, 3, 2, 8)
        given = {"feature_group_count": groups, "rhs_dilation": dilation}
        return lax.conv_general_dilated(
            x, kernel, strides, padding, None, dimension_numbers=numbers, precision="high", **given
        )

    return convolve


CONVOLUTIONS = {
    "one axis": convolution((1,), "SAME", KERNEL[:, 0]),
    "strides": convolution((2,), ((2, 1),), KERNEL[:, 1]),
    "groups": convolution((1,), "VALID", KERNEL[:, 0, :4], 2),
    "depthwise": convolution((1,), "SAME", KERNEL[:, 0, :1, :4].repeat(4, -1), 8),
    "two axes": convolution((1, 1), "SAME", KERNEL),
    "dilated": convolution((1, 2), ((2, 2), (0, 1)), KERNEL, dilation=(2, 1)),
    "channels first": lambda x: lax.conv_general_dilated(
        x.transpose(0, 2, 1), KERNEL[:, 0].transpose(2, 1, 0), (1,), "SAME"
    ),
}


@both
def test_functions_and_sums_are_close(backend, tmp_path):
    """Within ten units in the last place of one; sums within that of what they add up."""
    assert_close(SMOOTH | SMOOTH_IN_ONE[backend], 1.2e-6, backend, tmp_path, UNIT)
    assert_close(SUMS, 1.2e-6, backend, tmp_path, UNIT, UNIT[::-1])
    assert_close(CONVOLUTIONS, 1e-5, backend, tmp_path, UNIT)


# Refusals ----------------------------------------------------------------------------------------

REFUSED = {
    "onnx": {
        "ONNX has no atan2": lambda x: lax.atan2(x, x),
        "rounds halves away": lambda x: lax.round(x),
        "pads between": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0))),
        "float16, which no file": lambda x: jnp.sin(x.astype(jnp.float16)),
        "depends on the batch size": lambda x: jnp.broadcast_to(
            x[:, 0, :1, None], (x.shape[0], 1, x.shape[0])
        ).reshape(x.shape[0], x.shape[0]),
        "cuts the batch": lambda x: x.reshape(-1, 8)[: x.shape[0]],
    },
    "tflite": {
        "TFLite has no erf": lax.erf,
        "no remainder": lambda x: lax.rem(x, x),
        "rounds halves away": lambda x: lax.round(x),
        "less than nothing": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 0, 0), (0, 0, 0))),
        "no matrices of int32": lambda x: x.astype(jnp.int32) @ np.ones((8, 2), np.int32),
        "one batch by another": lambda x: x[:, 0] @ x[:, 1].T,
    },
}


@pytest.mark.parametrize(
    ("backend", "problem"), [(b, problem) for b, table in REFUSED.items() for problem in table]
)
def test_what_a_runtime_lacks_is_refused_by_name(backend, problem, tmp_path):
    model = primitives_of(REFUSED[backend][problem], backend, UNIT)
    with pytest.raises(ValueError, match=problem):
        in_runtime(model, tmp_path, UNIT)


def test_every_primitive_that_is_written_is_tested():
    alone = SMOOTH | SMOOTH_IN_ONE["onnx"] | SMOOTH_IN_ONE["tflite"] | POWERS | CONVOLUTIONS
    tables = [
        (ARITHMETIC | EXACT | SUMS, [UNIT, UNIT]),
        (EXACT_ALONE | alone | MOVES | PAD, [UNIT]),
        (SELECT, [BOOLS[0], *REALS]),
        (INTEGERS, INTS),
        (INTEGERS_ALONE, INTS[:1]),
        (TRUTH, BOOLS),
        (TRUTH_ALONE, BOOLS[:1]),
    ]
    tested = set()
    for functions, args in tables:
        calls = functions.values()
        model = primitives_of(lambda *xs, calls=calls: [f(*xs) for f in calls], "onnx", *args)
        tested |= {op.name for op in model.ops if isinstance(op, Primitive)}
    written = onnx.WRITERS.keys() | tflite.WRITERS.keys()
    assert written == tested
