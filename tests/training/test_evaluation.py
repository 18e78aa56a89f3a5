"""Evaluation: exactly the integer computation, here once more in int64 NumPy."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import quickly
from models import RNGS
from zoo import Model

import simqat_jax as sq

pytestmark = pytest.mark.usefixtures("optimized")
IMAGE = jax.random.normal(jax.random.key(2), (3, 7, 7, 4)) + 0.3
SPEC = sq.QuantSpec()
WIDE = sq.SimQATConfig(
    weight=sq.QuantSpec(
        num_bits=16, symmetric=True, per_channel=True, narrow_range=True, observer="batch"
    ),
    activation=sq.QuantSpec(num_bits=16, observer="minmax"),
    bn_fold="none",
)


def calibrated(model, x, config=None, **kwargs):
    """Observe two batches; return the quantized model and its variables."""
    qmodel = sq.SimQAT(config).apply(model)

    @jax.jit
    def observe(variables, x):
        _, updates = qmodel.apply(variables, x, **kwargs, rngs=RNGS, mutable=["quant_stats"])
        return {**variables, **updates}

    with quickly():
        variables = jax.jit(lambda: qmodel.init(RNGS, x, **kwargs))()
        return qmodel, observe(observe(variables, x), 0.8 * x)


def evaluated(qmodel, variables, x, **kwargs):
    return np.asarray(jax.jit(lambda v, x: qmodel.apply(v, x, **kwargs))(variables, x))


# An independent implementation in integers -------------------------------------------------------


class Oracle:
    """Integer operators on uint8 codes; a tensor is (codes, scale, zero point)."""

    def __init__(self, variables):
        self.params = jax.tree.map(np.asarray, variables["params"])
        self.stats = variables["quant_stats"]

    def grid(self, name):
        lo, hi = min(float(self.stats[name].lo), 0.0), max(float(self.stats[name].hi), 0.0)
        lo, hi = np.float32(lo), np.float32(hi)
        scale = (hi - lo) / np.float32(255)
        return scale, int(np.clip(np.rint(-lo / scale), 0, 255))

    def input(self, x, name="input"):
        scale, zero = self.grid(name)
        return np.clip(np.rint(np.asarray(x) / scale) + zero, 0, 255).astype(np.int64), scale, zero

    def requantize(self, acc, multiplier, name, relu):
        scale, zero = self.grid(name)
        codes = np.rint(acc.astype(np.float32) * multiplier).astype(np.int64) + zero
        return np.clip(codes, zero if relu else 0, 255), scale, zero

    def kernel(self, path):
        w = self.params[path]["kernel"]
        scale = np.abs(w).max(axis=tuple(range(w.ndim - 1))) / np.float32(127)
        return np.clip(np.rint(w / scale), -127, 127).astype(np.int64), scale

    def conv(self, x, path, *, strides=1, pads=((1, 1), (1, 1)), groups=1, relu=False):
        codes, scale, zero = x
        w, w_scale = self.kernel(path)
        padded = np.pad(codes - zero, ((0, 0), *pads, (0, 0)))
        height, width, depth, features = w.shape
        shape = [(n - k) // strides + 1 for n, k in zip(padded.shape[1:3], w.shape, strict=False)]
        acc = np.zeros((len(codes), *shape, features), np.int64)
        for i, j, f in itertools.product(*map(range, (height, width, features))):
            first = f // (features // groups) * depth
            part = padded[:, i:, j:, first : first + depth][:, ::strides, ::strides]
            acc[..., f] += part[:, : shape[0], : shape[1]] @ w[i, j, :, f]
        return self.linear(acc, scale * w_scale, path, relu)

    def dense(self, x, path, *, relu=False):
        w, w_scale = self.kernel(path)
        return self.linear((x[0] - x[2]) @ w, x[1] * w_scale, path, relu)

    def linear(self, acc, unit, path, relu):
        if "bias" in self.params[path]:
            acc = acc + np.rint(self.params[path]["bias"] / unit).astype(np.int64)
        name = f"{path}/output"
        return self.requantize(acc, unit / self.grid(name)[0], name, relu)

    def add(self, a, b, name, relu=False):
        scale = self.grid(name)[0]
        ra, rb = a[1] / scale, b[1] / scale
        shift = 20 - int(np.floor(np.log2(max(ra, rb))))
        ma, mb = (int(np.rint(np.float64(r) * 2**shift)) for r in (ra, rb))
        total = (a[0] - a[2]) * ma + (b[0] - b[2]) * mb + 2 ** (shift - 1) >> shift
        return self.requantize(total, np.float32(1), name, relu)

    def mean(self, x, name):
        count = np.float32(x[0].shape[1] * x[0].shape[2])
        unit = x[1] / (self.grid(name)[0] * count)
        return self.requantize((x[0] - x[2]).sum((1, 2)), unit, name, relu=False)

    def mul(self, a, b, name):
        unit = a[1] * b[1] / self.grid(name)[0]
        return self.requantize((a[0] - a[2]) * (b[0] - b[2]), unit, name, relu=False)

    def max_pool(self, x):
        codes = x[0][:, :6, :6].reshape(len(x[0]), 3, 2, 3, 2, -1).max((2, 4))
        return codes, *x[1:]


def real(x):
    return (x[0] - x[2]).astype(np.float32) * x[1]


CONVS = {
    "plain": ({}, {}),
    "valid": ({"padding": "VALID"}, {"pads": ((0, 0), (0, 0))}),
    "strided": ({"strides": 2, "padding": 1}, {"strides": 2}),
    "uneven": ({"padding": ((2, 0), (0, 1))}, {"pads": ((2, 0), (0, 1))}),
    "grouped": ({"feature_group_count": 2}, {"groups": 2}),
    "depthwise": ({"feature_group_count": 4}, {"groups": 4}),
    "no bias": ({"use_bias": False}, {}),
}


@pytest.mark.parametrize("case", CONVS)
def test_conv(case):
    attributes, kwargs = CONVS[case]
    relu = case in ("strided", "grouped", "no bias")

    def body(x):
        x = nn.Conv(8, (3, 3), name="c", bias_init=nn.initializers.normal(0.5), **attributes)(x)
        return nn.relu(x) if relu else x

    qmodel, variables = calibrated(Model(body), IMAGE)
    oracle = Oracle(variables)
    want = oracle.conv(oracle.input(IMAGE), "c", relu=relu, **kwargs)
    np.testing.assert_array_equal(evaluated(qmodel, variables, IMAGE), real(want))
    assert len(np.unique(want[0])) > 50


@pytest.mark.versions
def test_network():
    """Every operator, one behind the other."""

    def body(x):
        x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
        y = nn.relu(nn.Conv(6, (3, 3), name="b")(x))
        x = nn.relu(x + nn.Conv(6, (1, 1), name="c")(y))
        x = nn.max_pool(x, (2, 2), (2, 2))
        gate = nn.Dense(6, name="d")(x.mean(axis=(1, 2)))
        return nn.Dense(5, name="e")((x * gate[:, None, None, :]).reshape(3, -1))

    qmodel, variables = calibrated(Model(body), IMAGE)
    o = Oracle(variables)
    x = o.conv(o.input(IMAGE), "a", relu=True)
    y = o.conv(x, "b", relu=True)
    none = ((0, 0), (0, 0))
    x = o.max_pool(o.add(x, o.conv(y, "c", pads=none), "add/output", relu=True))
    gate = o.dense(o.mean(x, "mean/output"), "d")
    gate = gate[0][:, None, None, :], *gate[1:]
    codes, *grid = o.mul(x, gate, "mul/output")
    want = o.dense((codes.reshape(3, -1), *grid), "e")
    np.testing.assert_array_equal(evaluated(qmodel, variables, IMAGE), real(want))


def test_batch_norm_quantized_before_folding():
    """`bn_fold="none"`: the integer kernel stays, the scale takes gamma / sigma."""

    def body(x):
        x = nn.Conv(6, (3, 3), name="c")(x)
        return nn.relu(nn.BatchNorm(use_running_average=True, name="n", epsilon=1e-3)(x))

    qmodel, variables = calibrated(Model(body), IMAGE, sq.SimQATConfig(bn_fold="none"))
    keys = jax.random.split(jax.random.key(5), 4)
    draw = [np.asarray(jax.random.normal(k, (6,))) for k in keys]
    variables["params"]["n"] = {"scale": draw[0], "bias": draw[1]}
    variables["batch_stats"] = {"n": {"mean": draw[2], "var": np.abs(draw[3]) + 0.1}}
    _, updates = qmodel.apply(variables, IMAGE, mutable=["quant_stats"])
    variables = {**variables, **updates}
    o = Oracle(variables)
    codes, scale, zero = o.input(IMAGE)
    w, w_scale = o.kernel("c")
    slope = draw[0] / np.sqrt(variables["batch_stats"]["n"]["var"] + np.float32(1e-3))
    bias = np.asarray(variables["params"]["c"]["bias"]) * slope + (draw[1] - draw[2] * slope)
    unit = scale * (w_scale * np.abs(slope))
    padded = np.pad(codes - zero, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    acc = np.einsum("nhwcij,ijcf->nhwf", windows, w * np.sign(slope).astype(np.int64))
    acc = acc + np.rint(bias / unit).astype(np.int64)
    want = o.requantize(acc, unit / o.grid("c/output")[0], "c/output", True)
    np.testing.assert_array_equal(evaluated(qmodel, variables, IMAGE), real(want))


@pytest.mark.parametrize("num_bits", [4, 8])
def test_bfloat16_computes_the_same_codes(num_bits):
    """The codes do not depend on the float type of the layers, only the input and the output."""
    spec = sq.QuantSpec(num_bits=num_bits)

    def body(dtype):
        def run(x):
            x = nn.relu(nn.Conv(6, (3, 3), dtype=dtype, name="a")(x))
            return nn.Conv(5, (1, 1), dtype=dtype, name="b")(nn.max_pool(x, (2, 2)))

        return Model(run)

    config = sq.SimQATConfig(activation=spec)
    _, variables = calibrated(body(jnp.float32), IMAGE, config)
    plain, half = (
        evaluated(sq.SimQAT(config).apply(body(dtype)), variables, IMAGE)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(plain.astype(jnp.bfloat16), half)


@pytest.mark.parametrize("size", [65_000, 300_001])
def test_means_of_many_elements_are_exact(size):
    x = jax.random.uniform(jax.random.key(0), (2, size, 1, 2))
    qmodel, variables = calibrated(Model(lambda x: nn.Dense(3, name="d")(x.mean((1, 2)))), x)
    oracle = Oracle(variables)
    want = oracle.dense(oracle.mean(oracle.input(x), "mean/output"), "d")
    np.testing.assert_array_equal(evaluated(qmodel, variables, x), real(want))


def test_sixteen_bits_are_the_same_with_and_without_jit():
    def body(x):
        return nn.relu(nn.Conv(6, (1, 1))(x) + nn.Conv(6, (1, 1))(x))

    x = jax.random.normal(jax.random.key(0), (16, 16, 16, 4))
    qmodel, variables = calibrated(Model(body), x, WIDE)
    np.testing.assert_array_equal(
        evaluated(qmodel, variables, x), np.asarray(qmodel.apply(variables, x))
    )


def test_layers_are_computed_once():
    """In integers, without the simulation that only a gradient needs."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(5, (3, 3))(x))
            return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 3), use_bias=False)(x)).mean((1, 2)))

    qmodel, variables = calibrated(Layers(), IMAGE)
    compiled: Any = jax.jit(qmodel.apply).lower(variables, IMAGE).compile().as_text()
    assert compiled.count(" convolution(") == 2
    assert compiled.count(" dot(") == 1


def test_kernels_are_quantized_in_turn():
    """Beside the parameters there is no room for more than one of them at a time."""
    x, width, layers = jnp.ones((2, 4)), 128, 8
    qmodel, variables = calibrated(Model(lambda x: stacked(x, width, layers)), x)
    memory = jax.jit(qmodel.apply).lower(variables, x).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 3 * 4 * width**2


def stacked(x, width, layers):
    for _ in range(layers):
        x = nn.relu(nn.Dense(width)(x))
    return x
