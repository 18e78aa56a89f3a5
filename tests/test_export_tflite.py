"""TFLite files: LiteRT with XNNPACK computes the integer model's codes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import CASES

import simqat_jax as sq
from simqat_jax import integer_arithmetic as integer
from simqat_jax.export import tflite
from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid, Op, Tensor

RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
CONFIG = sq.SimQATConfig(backend="tflite")
REFUSED = {
    "conv 3d": "Conv_0: TFLite convolves over one or two axes",
    "transposed input": r"Conv_0: TFLite has no convolution with input_dilation=\(2, 2\)",
    "avg_pool without padding": "avg_pool: it is computed in float.*Return its input",
    "preprocessing": "computed in float",
    "attention": "LayerNorm_0/LayerNorm: it is computed in float",
    "softmax": "computed in float",
}
TRAINING = ("batch norm train", "dropout train")
# Cases whose operations other cases hold, in models alike, or tests of single operations.
SAME = (
    *("nested", "two inputs", "masked", "no bias", "padding VALID", "maximum", "learned scalar"),
    *("tanh", "silu", "gelu", "hard_sigmoid", "elu", "hard_swish", "own swish", "own where"),
    *("exact gelu", "prelu", "leaky_relu", "scaled", "dropout eval", "remat", "jit", "setup"),
    *("weight norm", "pre-activation", "concat with itself", "relu", "flatten"),
    *("strided", "dilated", "padding int", "padding pairs", "subtract", "multiply"),
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling takes longer than running such small models."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)


def converted(case, config=CONFIG):
    qmodel = sq.SimQAT(config).apply(case.model)

    @jax.jit
    def observe():
        variables = qmodel.init(RNGS, *case.args, **case.kwargs)
        _, updates = qmodel.apply(variables, *case.args, **case.kwargs, mutable=["quant_stats"])
        return {**variables, **updates}

    return sq.convert(qmodel, observe(), *case.args, **case.kwargs)


def interpreter(path):
    return Interpreter(str(path), num_threads=1)


def run(runtime, arrays):
    """Run on arrays of any batch size."""
    inputs = runtime.get_input_details()
    for detail, x in zip(inputs, arrays, strict=True):
        runtime.resize_tensor_input(detail["index"], x.shape, strict=True)
    runtime.allocate_tensors()
    for detail, x in zip(inputs, arrays, strict=True):
        runtime.set_tensor(detail["index"], x)
    runtime.invoke()
    return [runtime.get_tensor(detail["index"]) for detail in runtime.get_output_details()]


def signed(codes, grid):
    return (np.asarray(codes, np.int32) - (0 if grid.qmin < 0 else 128)).astype(np.int8)


def differences(model, runtime, codes):
    """Count the codes of LiteRT that are not the model's."""
    grids = [model.tensors[i].grid for i in model.inputs]
    got = run(runtime, [signed(c, g) for c, g in zip(codes, grids, strict=True)])
    want = jax.tree.leaves(model.run_codes(*codes))
    grids = [model.tensors[i].grid for i in model.outputs]
    assert [a.shape for a in want] == [b.shape for b in got]
    return sum(int((signed(a, g) != b).sum()) for a, b, g in zip(want, got, grids, strict=True))


def random_codes(model, batch, seed=0):
    rng, inputs = np.random.default_rng(seed), [model.tensors[i] for i in model.inputs]
    shapes = [[-d * batch if d < 0 else d for d in t.shape] for t in inputs]
    return [
        rng.integers(t.grid.qmin, t.grid.qmax, shape, endpoint=True).astype(t.grid.dtype)
        for t, shape in zip(inputs, shapes, strict=True)
    ]


@pytest.mark.parametrize("name", [n for n in CASES if n not in (*TRAINING, *REFUSED, *SAME)])
def test_every_construct(name, tmp_path):
    model = converted(CASES[name])
    sq.export_tflite(model, tmp_path / "m.tflite", integer_io=True)
    runtime = interpreter(tmp_path / "m.tflite")
    for batch in (1, 5):
        assert differences(model, runtime, random_codes(model, batch)) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=REFUSED[name]):
        sq.export_tflite(converted(CASES[name]), tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_float_inputs_and_outputs_by_default(tmp_path):
    model = converted(CASES["residual"])
    sq.export_tflite(model, tmp_path / "m.tflite")
    runtime = interpreter(tmp_path / "m.tflite")
    (detail,) = runtime.get_input_details()
    assert list(detail["shape_signature"]) == [-1, 8, 8, 4]
    assert list(detail["shape"]) == [1, 8, 8, 4]
    grid = model.tensors[model.inputs[0]].grid
    codes = np.arange(grid.qmin, grid.qmax) + 0.5 - grid.zero_point  # in the middle of two codes
    middle = np.resize((codes * np.float32(grid.scale)).astype(np.float32), (3, 8, 8, 4))
    beside = [np.nextafter(middle, np.float32(end)) for end in (-9, 9)]
    x = np.concatenate([middle, *beside, 100 * middle])
    (got,) = run(runtime, [x])
    np.testing.assert_array_equal(got, model(x))


def test_signature(tmp_path):
    model = converted(CASES["two heads"])
    sq.export_tflite(model, tmp_path / "m.tflite")
    signature = interpreter(tmp_path / "m.tflite").get_signature_runner("serving_default")
    x = np.asarray(CASES["two heads"].args[0])
    got, want = signature(input=x), jax.tree.leaves(model(x))
    for k, a in enumerate(want):
        np.testing.assert_array_equal(got[f"output_{k}"], a)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("num_bits", [3, 8])
def test_narrow_widths(num_bits, symmetric, tmp_path):
    spec = sq.QuantSpec(num_bits=num_bits, symmetric=symmetric)
    model = converted(CASES["residual"], sq.SimQATConfig(backend="tflite", activation=spec))
    sq.export_tflite(model, tmp_path / "i.tflite", integer_io=True)
    codes = random_codes(model, 3)
    assert differences(model, interpreter(tmp_path / "i.tflite"), codes) == 0
    sq.export_tflite(model, tmp_path / "f.tflite")
    x = 3 * np.asarray(CASES["residual"].args[0])
    np.testing.assert_array_equal(run(interpreter(tmp_path / "f.tflite"), [x])[0], model(x))


# Single operations, with any grids ---------------------------------------------------------------


def single(kind, grids, attributes, arrays=None, shape=(-1, 16), out=None, clamp=(0, 255)):
    """An integer model of one operation."""
    shapes = [shape] * (len(grids) - 1) + [out or shape]
    tensors = [
        Tensor(f"t{n}", s, "float32", Grid(float(np.float32(scale)), z, 0, 255))
        for n, (s, (scale, z)) in enumerate(zip(shapes, grids, strict=True))
    ]
    last = len(grids) - 1
    attributes = {"clamp": list(clamp), **attributes}
    op = Op(kind, "layer", tuple(range(last)), (last,), attributes, arrays or {})
    return IntegerModel(tensors, [op], range(last), [last], 0, "tflite", {})


def compared(model, folder, codes):
    sq.export_tflite(model, folder / "single.tflite", integer_io=True)
    assert differences(model, interpreter(folder / "single.tflite"), codes) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("single")


points = st.integers(0, 255)
grids = st.tuples(st.floats(0.003, 0.3), points)
# Scales whose sums and products often lie in the middle of two codes.
ties = st.tuples(st.sampled_from([k / 64 for k in (1, 2, 3, 4, 6, 12)]), points)
any_grids = st.one_of(grids, ties)
seeds = st.integers(0, 2**31)


@given(any_grids, any_grids, any_grids, seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_additions(folder, a, b, c, seed, subtract):
    scales = [jnp.float32(s) for s, _ in (a, b, c)]
    signs = (scales[0], -scales[1] if subtract else scales[1])
    multipliers = [int(m) for m in integer.add_multipliers(signs, scales[2])]
    codes = np.random.default_rng(seed).integers(0, 256, (2, 999, 16)).astype(np.uint8)
    compared(single("add", (a, b, c), {"multipliers": multipliers}), folder, list(codes))


@given(any_grids, any_grids, any_grids, seeds)
@settings(max_examples=20, deadline=None)
def test_products(folder, a, b, c, seed):
    multiplier = np.float32(a[0]) * np.float32(b[0]) / np.float32(c[0])
    codes = np.random.default_rng(seed).integers(0, 256, (2, 999, 16)).astype(np.uint8)
    model = single("mul", (a, b, c), {}, {"multiplier": multiplier}, clamp=(seed % 100, 200))
    compared(model, folder, list(codes))


def layer(rng, x, y, shape, tie):
    """Arrays of a layer with a kernel of this shape."""
    channels = shape[-1]
    scale = rng.uniform(0.001, 0.02, channels)
    scale = (2.0 ** rng.integers(-9, -5, channels) if tie else scale).astype(np.float32)
    return {
        "kernel": rng.integers(-127, 128, shape).astype(np.int8),
        "scale": scale,
        "bias": rng.integers(-5000, 5000, channels).astype(np.int32),
        "multiplier": np.float32(x[0]) * scale / np.float32(y[0]),
    }


@given(any_grids, any_grids, seeds, st.integers(1, 300), st.booleans())
@settings(max_examples=20, deadline=None)
def test_matrix_products(folder, x, y, seed, depth, tie):
    rng = np.random.default_rng(seed)
    arrays = layer(rng, x, y, (depth, 16), tie)
    model = single("dense", (x, y), {}, arrays, (-1, 2, depth), (-1, 2, 16))
    compared(model, folder, random_codes(model, 30, seed))


@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_sums_as_large_as_int32_holds(folder, zero_point):
    depth = integer.MOST // (127 * 255)
    rng = np.random.default_rng(0)
    kernel = np.where(rng.random((depth, 16)) < np.linspace(0, 1, 16), 127, -127).astype(np.int8)
    scale = np.full(16, 2.0**-24, np.float32)
    arrays = {"kernel": kernel, "scale": scale, "bias": np.zeros(16, np.int32), "multiplier": scale}
    model = single("dense", ((1.0, zero_point), (1.0, 128)), {}, arrays, (-1, depth), (-1, 16))
    codes = np.stack([np.full(depth, 255), np.zeros(depth), rng.integers(0, 256, depth)])
    compared(model, folder, [codes.astype(np.uint8)])
    got = np.asarray(model.run_codes(codes.astype(np.uint8)), np.int64)
    exact = (codes.astype(np.int64) - zero_point) @ kernel.astype(np.int64)
    np.testing.assert_array_equal(got, np.clip(np.rint(exact * 2.0**-24) + 128, 0, 255))


@given(
    any_grids,
    any_grids,
    seeds,
    st.sampled_from([(1, 4, 6), (2, 4, 6), (4, 4, 8), (1, 1, 3), (1, 70, 5)]),
    st.tuples(*[st.integers(1, 3)] * 6),
    st.tuples(*[st.integers(0, 2)] * 4),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_convolutions(folder, x, y, seed, channels, window, padding, tie):
    groups, features, out = channels
    lengths, strides, dilation = window[:2], window[2:4], window[4:]
    pads = [list(padding[:2]), list(padding[2:])]
    sizes = [
        (8 + sum(p) - (k - 1) * d - 1) // s + 1
        for p, k, d, s in zip(pads, lengths, dilation, strides, strict=True)
    ]
    arrays = layer(np.random.default_rng(seed), x, y, (*lengths, features // groups, out), tie)
    attributes = {
        "strides": list(strides),
        "padding": pads,
        "pad_mode": "constant",
        "input_dilation": [1, 1],
        "kernel_dilation": list(dilation),
        "groups": groups,
    }
    shape, out_shape = (-1, 8, 8, features), (-1, *sizes, out)
    model = single("conv", (x, y), attributes, arrays, shape, out_shape, (y[1], 255))
    compared(model, folder, random_codes(model, 2, seed))


@given(any_grids, any_grids, seeds, st.sampled_from([(-1, 9), (-1, 3, 9), (-1, 2, 3, 9)]))
@settings(max_examples=15, deadline=None)
def test_batch_norms(folder, x, y, seed, shape):
    arrays = layer(np.random.default_rng(seed), x, y, (9,), seed % 2)
    arrays["kernel"] = np.sign(arrays["kernel"]) * np.int8(127)
    model = single("affine", (x, y), {}, arrays, shape)
    compared(model, folder, random_codes(model, 20, seed))


@given(
    any_grids,
    any_grids,
    seeds,
    st.sampled_from([[1, 2], [1], [2, 3], [1, 3], [1, 2, 3]]),
    st.sampled_from([None, 1.0, 7.0]),
)
@settings(max_examples=30, deadline=None)
def test_sums(folder, x, y, seed, axes, divisor):
    shape = (-1, *map(int, np.random.default_rng(seed).integers(1, 8, 3)))
    divisor = np.float32(divisor or np.prod([shape[a] for a in axes]))
    multiplier = np.float32(x[0]) / (np.float32(y[0]) * divisor)
    out = tuple(d for k, d in enumerate(shape) if k not in axes)
    model = single("sum", (x, y), {"axes": axes}, {"multiplier": multiplier}, shape, out)
    compared(model, folder, random_codes(model, 50, seed))


@given(any_grids, any_grids, seeds, st.integers(1, 3), st.integers(1, 3), st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_pooled_sums(folder, x, y, seed, length, stride, pad):
    size = (6 + 2 * pad - length) // stride + 1
    attributes = {
        "window": [1, length, length, 1],
        "strides": [1, stride, stride, 1],
        "padding": [[0, 0], [pad, pad], [pad, pad], [0, 0]],
    }
    multiplier = np.float32(x[0]) / (np.float32(y[0]) * np.float32(length**2))
    shape, out = (-1, 6, 6, 5), (-1, size, size, 5)
    for kind, grids in (("sum_pool", (x, y)), ("max_pool", (x, x))):
        model = single(kind, grids, attributes, {"multiplier": multiplier}, shape, out)
        compared(model, folder, random_codes(model, 10, seed))


@given(any_grids, st.integers(0, 120), st.integers(121, 255))
@settings(max_examples=10, deadline=None)
def test_clips(folder, x, lo, hi):
    codes = [np.arange(256, dtype=np.uint8).reshape(16, 16)]
    compared(single("clip", (x, x), {}, clamp=(lo, hi)), folder, codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_tables_of_every_code(symmetric, tmp_path):
    grid = Grid(0.1, 0, -127, 127) if symmetric else Grid(0.1, 9, 0, 255)
    tensors = [Tensor("x", (-1,), "float32", grid), Tensor("y", (-1,), "float32", grid)]
    codes = np.arange(grid.qmin, grid.qmax + 1)
    table = np.random.default_rng(0).permutation(codes).astype(grid.dtype)
    op = Op("table", "layer", (0,), (1,), {}, {"table": table})
    model = IntegerModel(tensors, [op], [0], [1], 0, "tflite", {})
    compared(model, tmp_path, [codes.astype(grid.dtype)])


@pytest.mark.parametrize("shape, out", [((-1, 4), (-1, 3, 3, 4)), ((-1, 3, 1, 4), (-1, 3, 3, 4))])
@pytest.mark.parametrize("multiplied", [False, True])
def test_broadcasts(shape, out, multiplied, tmp_path):
    grid = Grid(0.1, 9, 0, 255)
    shapes = {"x": shape, "y": out, "wide": out, "product": out}
    tensors = [Tensor(name, s, "float32", grid) for name, s in shapes.items()]
    dims = [0, 3] if len(shape) == 2 else [0, 1, 2, 3]
    ops = [Op("broadcast", "wide", (0,), (2,), {"dimensions": dims})]
    if multiplied:
        scale = np.float32(grid.scale)
        arrays = {"multiplier": scale * scale / scale}
        ops.append(Op("mul", "product", (1, 2), (3,), {"clamp": [0, 255]}, arrays))
    model = IntegerModel(tensors, ops, [0, 1], [3 if multiplied else 2], 0, "tflite", {})
    compared(model, tmp_path, random_codes(model, 3))


def test_every_tensor_as_an_output(tmp_path):
    """Inputs, constants and repeated tensors too."""
    model = converted(CASES["constant per channel"])
    outputs = [*range(len(model.tensors)), len(model.tensors) - 1]
    model = IntegerModel(
        model.tensors, model.ops, model.inputs, outputs, list(range(len(outputs))), "tflite", {}
    )
    compared(model, tmp_path, random_codes(model, 3))


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grids", [((0.1, 0), (0.1, 0), (200.0, 0)), ((0.1, 0), (100.0, 0), (0.1, 0))]
)
def test_scales_that_xnnpack_leaves_to_others(grids, tmp_path):
    model = single("add", grids, {"multipliers": [1, 1, 1]})
    with pytest.raises(ValueError, match=r"layer: .* by a factor of"):
        sq.export_tflite(model, tmp_path / "m.tflite")


def test_additions_of_another_runtime(tmp_path):
    model = converted(CASES["residual"], sq.SimQATConfig(backend="onnx"))
    with pytest.raises(ValueError, match=r'add: .*ONNX Runtime.*backend="tflite"'):
        sq.export_tflite(model, tmp_path / "m.tflite")


@pytest.mark.parametrize("role", ["activation", "weight"])
def test_more_than_8_bits(role, tmp_path):
    wide = sq.SimQATConfig(backend="tflite", **{role: sq.QuantSpec(num_bits=12, symmetric=True)})
    with pytest.raises(ValueError, match=rf"Dense_1: .* bits.*{role}=.*num_bits=8"):
        sq.export_tflite(converted(CASES["relu"], wide), tmp_path / "m.tflite")


def test_without_the_extra(tmp_path, monkeypatch):
    model = converted(CASES["relu"])

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"simqat-jax\[export\]"):
        sq.export_tflite(model, tmp_path / "m.tflite")


def test_an_interrupted_export_leaves_no_file(tmp_path, monkeypatch):
    grid = (0.1, 0)
    model = single("clip", (grid, grid), {})

    class Interrupted:
        def __getattr__(self, name):
            raise KeyboardInterrupt

    imported = tflite.import_extra
    monkeypatch.setattr(
        tflite,
        "import_extra",
        lambda name: Interrupted() if name == "flatbuffers" else imported(name),
    )
    with pytest.raises(KeyboardInterrupt):
        sq.export_tflite(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        monkeypatch.undo()
        sq.export_tflite(model, tmp_path / "missing" / "m.tflite")
