"""What docs/architecture.md says can be added: another rounding, another observer."""

from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, step, trained
from zoo import Model, case

import simqat_jax as sq
from simqat_jax import config as config_module
from simqat_jax.ir.program import grid_of
from simqat_jax.numerics import spec as spec_module
from simqat_jax.numerics.affine import rounded_product, true_divide
from simqat_jax.numerics.observers import OBSERVERS, Observer
from simqat_jax.numerics.requantize import FREE
from simqat_jax.numerics.rounding import ROUNDINGS, Product, Rounding, Sum
from simqat_jax.numerics.rounding.xnnpack import XNNPACK
from simqat_jax.ops import arithmetic
from simqat_jax.ops.registry import PROGRAM_OPERATIONS

pytestmark = pytest.mark.usefixtures("optimized")

# A runtime that rounds down ----------------------------------------------------------------------


def floor_of_sum(sign):
    """Add or subtract real values in units of an output code, and round down."""

    def apply(a, b, constants, grids):
        del grids
        ra, rb = (jnp.asarray(c, jnp.float32) for c in constants)
        x, y = (v.astype(jnp.float32) for v in (a, b))
        return jnp.floor(rounded_product(x, ra) + sign * rounded_product(y, rb))

    return apply


def ratios(grids):
    a, b, y = grids
    return [true_divide(grid.params.scale, y.params.scale) for grid in (a, b)]


def floor_of_product(products, multiplier, grid):
    del grid
    return jnp.floor(rounded_product(products.astype(jnp.float32), multiplier))


DOWN = Rounding(
    name="down",
    add=Sum("add_down", ratios, floor_of_sum(1)),
    subtract=Sum("sub_down", ratios, floor_of_sum(-1)),
    multiply=Product("mul_down", floor_of_product),
    norm=XNNPACK.norm,
)


@pytest.fixture
def rounds_down(monkeypatch):
    monkeypatch.setitem(ROUNDINGS, DOWN.name, DOWN)
    monkeypatch.setattr(config_module, "Backend", Literal["tflite", "onnx", "down"])
    # What follows from ROUNDINGS when the package is imported.
    sums = {how.kind: how for r in ROUNDINGS.values() for how in (r.add, r.subtract)}
    products = {r.multiply.kind: r.multiply for r in ROUNDINGS.values()}
    monkeypatch.setattr(arithmetic, "_SUMS", sums, raising=False)
    monkeypatch.setattr(arithmetic, "_PRODUCTS", products, raising=False)
    for kinds, op in ((sums, arithmetic.Sum), (products, arithmetic.Multiply)):
        for kind in kinds:
            monkeypatch.setitem(PROGRAM_OPERATIONS, kind, op)


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


@pytest.mark.parametrize("name", BINARY)
def test_another_rounding(name, rounds_down, tmp_path):
    """Evaluation, the integer model and its file round down; nothing else knows of it."""
    small = case(lambda x: BINARY[name](nn.Dense(4)(x), nn.Dense(4)(x)), (64, 6), 0, 0)
    qmodel, variables, evaluate = trained(small, sq.SimQATConfig(backend=DOWN.name))
    model = sq.convert(qmodel, variables, *small.args)
    assert [op.kind for op in model.ops][-1] == f"{name}_down"
    want = evaluate(variables, *small.args)
    assert_same(model(*small.args), want)
    model.save(tmp_path / "model")
    assert_same(sq.IntegerModel.load(tmp_path / "model")(*small.args), want)

    # The codes of the operands, and what becomes of them in NumPy.
    grids = [grid_of(model.tensors[op.outputs[0]]) for op in model.ops[-3:]]
    paths = [f"Dense_{n}" for n in range(2)]
    layers = [sq.convert(*trained_layer(qmodel, variables, path), *small.args) for path in paths]
    codes = [np.asarray(layer.run_codes(layer.quantize(*small.args)), int) for layer in layers]
    (a, b), y = (c - g.zero_point for c, g in zip(codes, grids, strict=False)), grids[2]
    sa, sb, sy = (np.float32(g.scale) for g in grids)
    if name == "mul":
        exact = (a * b).astype(np.float32) * (sa * sb / sy)
    else:
        sign = np.float32(1 if name == "add" else -1)
        exact = a.astype(np.float32) * (sa / sy) + sign * (b.astype(np.float32) * (sb / sy))
    down = np.clip(np.floor(exact) + y.zero_point, 0, 255)
    assert_same(model.run_codes(model.quantize(*small.args)), down)
    assert (np.floor(exact) != np.rint(exact)).mean() > 0.3  # another rounding would be seen


def trained_layer(qmodel, variables, path):
    """One layer of a model as a model, with the ranges that it was trained with."""
    layer = sq.SimQAT(qmodel.config).apply(Model(lambda x: nn.Dense(4, name=path)(x)))
    return layer, variables


# An observer of values ---------------------------------------------------------------------------


class PercentileState(NamedTuple):
    """A moving average of a percentile of magnitudes; below zero: none yet."""

    magnitude: jax.Array
    nonfinite: jax.Array


class Percentile(Observer):
    """A range that leaves out the largest tenth of magnitudes: extremes do not tell it."""

    def init(self) -> Any:
        shape = () if self.num_channels is None else (self.num_channels,)
        return PercentileState(jnp.full(shape, -1.0), jnp.zeros((), jnp.int32))

    def restore(self, state: Any) -> Any:
        fields = state.values() if isinstance(state, dict) else state
        return PercentileState(*fields)

    def measure(self, x, bounds=FREE) -> Any:
        magnitudes = jnp.abs(jnp.clip(jax.lax.stop_gradient(x), *bounds))
        axes = None if self.num_channels is None else tuple(range(x.ndim - 1))
        return jnp.quantile(magnitudes.astype(jnp.float32), 0.9, axis=axes)

    def merge(self, one: Any, other: Any) -> Any:
        return jnp.maximum(one, other)

    def update(self, state: Any, measured: Any) -> Any:
        finite = jnp.isfinite(measured).all()
        mean = jnp.where(state.magnitude < 0, measured, 0.5 * state.magnitude + 0.5 * measured)
        return PercentileState(
            jnp.where(finite, mean, state.magnitude), state.nonfinite + jnp.where(finite, 0, 1)
        )

    def range(self, state: Any):
        lo = jnp.zeros_like(state.magnitude) if self.nonnegative else -state.magnitude
        return lo, state.magnitude

    def training_range(self, state: Any, before=None):
        return self.range(state)

    def present_range(self, x):
        return self.range(PercentileState(self.measure(x), jnp.zeros((), jnp.int32)))


def body(x):
    """A layer with ReLU, a sum, a constant, tensors that share a range, and the last layer."""
    y = nn.relu(nn.Dense(6, name="a")(x))
    z = nn.Dense(6, name="b")(y) + y * jnp.arange(1.0, 7.0).reshape(1, 6)
    return nn.Dense(3, name="d")(jnp.concatenate([nn.Dense(2, name="c")(y), z], -1))


X = jax.random.normal(jax.random.key(3), (32, 5))


@pytest.fixture
def percentile(monkeypatch):
    """A quantized model that has trained for two steps with this observer everywhere."""
    monkeypatch.setitem(OBSERVERS, "percentile", Percentile)
    names = Literal["ema", "minmax", "batch", "percentile"]
    monkeypatch.setattr(spec_module, "ObserverName", names)
    weight = sq.QuantSpec(
        symmetric=True, per_channel=True, narrow_range=False, observer="percentile"
    )
    config = sq.SimQATConfig(weight=weight, activation=sq.QuantSpec(observer="percentile"))
    qmodel = sq.SimQAT(config).apply(Model(body))
    variables = jax.jit(qmodel.init)(jax.random.key(0), X)
    train = jax.jit(lambda v, x: step(qmodel, v, x))
    for x in (X, 3 * X):
        y, variables = train(variables, x)
    return qmodel, variables, y


def test_another_observer_trains(percentile):
    qmodel, variables, y = percentile
    stats, params = variables["quant_stats"], variables["params"]
    states = [state for name, state in stats.items() if name != "step"]
    assert states and all(isinstance(state, PercentileState) for state in states)
    magnitude = np.quantile(np.abs(X), 0.9)
    np.testing.assert_allclose(stats["input"].magnitude, 2 * magnitude, rtol=1e-5)
    kernel = np.quantile(np.abs(params["a"]["kernel"]), 0.9, axis=0)
    np.testing.assert_allclose(stats["a/kernel"].magnitude, kernel, rtol=1e-5)
    assert np.isfinite(y).all()

    def loss(params):
        return qmodel.apply({**variables, "params": params}, X, mutable=["quant_stats"])[0].sum()

    grads = jax.jit(jax.grad(loss))(params)
    largest = np.abs(params["a"]["kernel"]) / kernel
    gradient = np.asarray(grads["a"]["kernel"])
    assert (gradient[largest > 1.02] == 0).all()  # clipped by this range
    assert (gradient[largest < 1] != 0).any() and (largest > 1.02).any()


def test_another_observer_evaluates_as_its_integer_model(percentile, tmp_path):
    qmodel, variables, _ = percentile
    evaluate = jax.jit(qmodel.apply)
    model = sq.convert(qmodel, variables, X)
    magnitude = float(variables["quant_stats"]["input"].magnitude)
    grid = grid_of(model.tensors[model.inputs[0]])
    assert grid.scale == pytest.approx(2 * magnitude / 255, rel=1e-5)
    want = evaluate(variables, 2 * X)
    assert_same(model(2 * X), want)
    assert len(np.unique(want)) > 20
    model.save(tmp_path / "model")
    assert_same(sq.IntegerModel.load(tmp_path / "model")(2 * X), want)


def test_another_observer_in_the_plan(percentile):
    qmodel, variables, _ = percentile
    plan = qmodel.plan(variables, X)
    for name in ("input", "a/kernel"):
        largest = float(np.max(variables["quant_stats"][name].magnitude))
        assert plan.quantizers[name].hi == pytest.approx(largest)
        assert plan.quantizers[name].lo == pytest.approx(-largest)
    assert plan.quantizers["a/output"].lo == 0 < plan.quantizers["a/output"].hi
    assert "percentile" in str(plan)


def test_another_observer_in_a_checkpoint(percentile):
    qmodel, variables, _ = percentile
    stats = variables["quant_stats"]
    plain = {k: s._asdict() if k != "step" else s for k, s in stats.items()}
    lists = {k: list(s) if k != "step" else s for k, s in stats.items()}
    want, after = qmodel.apply(variables, X), step(qmodel, variables, X)
    for restored in (plain, lists):
        restored = {**variables, "quant_stats": restored}
        np.testing.assert_array_equal(qmodel.apply(restored, X), want)
        assert str(qmodel.plan(restored, X)) == str(qmodel.plan(variables, X))
        jax.tree.map(np.testing.assert_array_equal, step(qmodel, restored, X), after)


def test_another_observer_that_has_seen_nothing_or_nan(percentile):
    qmodel, variables, _ = percentile
    with pytest.raises(ValueError, match="never observed"):
        qmodel.apply(qmodel.init(jax.random.key(0), X), X)
    before = variables["quant_stats"]
    _, after = step(qmodel, variables, X.at[0, 0].set(jnp.nan))
    assert after["quant_stats"]["input"].magnitude == before["input"].magnitude
    assert sq.nonfinite_ranges(before) == {}
    assert sq.nonfinite_ranges(after["quant_stats"])["input"] == 1
