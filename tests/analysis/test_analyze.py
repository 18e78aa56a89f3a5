"""What an analysis finds is what NumPy computes from the definitions."""

import dataclasses
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq

LAYERS = ("input", "first", "last")


def sqnr(aim, got):
    aim, got = np.asarray(aim, np.float64), np.asarray(got, np.float64)
    return 10 * np.log10((aim**2).sum() / ((aim - got) ** 2).sum())


def grid(lo, hi, bits):
    """Scale and zero point of unsigned codes, as `calibrate` leaves a range."""
    lo, hi = min(float(lo), 0.0), max(float(hi), 0.0)
    scale = (hi - lo) / (2**bits - 1)
    return scale, round(-lo / scale)


def rounded(x, lo, hi, bits=4):
    scale, zero = grid(lo, hi, bits)
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def rounded_kernel(w, bits=4):
    scale = np.abs(w).max(axis=0) / (2 ** (bits - 1) - 1)
    return np.rint(w / scale) * scale


class ByHand:
    """The model of `analyzed` in float64, with each layer quantized or not."""

    def __init__(self, analyzed):
        self.params = jax.tree.map(np.float64, jax.device_get(analyzed.floats["params"]))
        self.x = np.concatenate(analyzed.batches).astype(np.float64)
        self.ranges = {}
        self.ranges = self.extremes(analyzed.batches[0].astype(np.float64))

    def extremes(self, x):
        found = {}
        for name, values in zip(LAYERS, self.run((), x)[0], strict=True):
            found[name] = values.min(), values.max()
        return found

    def run(self, on, x=None):
        """Return each layer's result as it is rounded, and before it is."""
        x, results, before = self.x if x is None else x, [], []
        for name in LAYERS:
            if name != "input":
                w, b = self.params[name]["kernel"], self.params[name]["bias"]
                x = x @ (rounded_kernel(w) if name in on else w) + b
                x = np.maximum(x, 0) if name == "first" else x
            before.append(x)
            x = rounded(x, *self.ranges[name]) if name in on else x
            results.append(x)
        return results, before


@pytest.fixture(scope="module")
def by_hand(analyzed):
    return ByHand(analyzed)


def test_outputs_and_every_layer_alone(analyzed, by_hand):
    aim, everything = by_hand.run(())[0][-1], set(LAYERS)
    analysis = analyzed.analysis
    assert analysis.examples == 24
    whole = sqnr(aim, by_hand.run(everything)[0][-1])
    assert analysis.sqnr == pytest.approx(whole, abs=1e-2)
    for layer in analysis.layers:
        alone = sqnr(aim, by_hand.run({layer.name})[0][-1])
        without = sqnr(aim, by_hand.run(everything - {layer.name})[0][-1])
        assert layer.alone_quantized == pytest.approx(alone, abs=1e-2)
        assert layer.alone_float == pytest.approx(without, abs=1e-2)
        assert layer.gain == pytest.approx(without - whole, abs=1e-2)
    order = [layer.alone_quantized for layer in analysis.layers]
    assert order == sorted(order) and len(order) == len(LAYERS)


def test_tensors(analyzed, by_hand):
    aims, _ = by_hand.run(())
    results, before = by_hand.run(set(LAYERS))
    for name, aim, result, x in zip(LAYERS, aims, results, before, strict=True):
        tensor = analyzed.analysis.tensors[name if name == "input" else f"{name}/output"]
        scale, zero = grid(*by_hand.ranges[name], 4)
        codes = np.rint(x / scale) + zero
        assert tensor.sqnr == pytest.approx(sqnr(aim, result), abs=1e-2)
        assert (tensor.lo, tensor.hi) == pytest.approx((x.min(), x.max()), abs=1e-5)
        assert tensor.grid == pytest.approx((-zero * scale, (15 - zero) * scale), abs=1e-5)
        assert tensor.below == pytest.approx((codes < 0).mean(), abs=1e-9)
        assert tensor.above == pytest.approx((codes > 15).mean(), abs=1e-9)
        assert tensor.clipped == tensor.below + tensor.above
        inside = (x / scale + zero)[(codes >= 0) & (codes <= 15)]
        counts, _ = np.histogram(inside, np.linspace(-0.5, 15.5, 65))
        assert np.abs(counts - tensor.counts).sum() <= 2, "values on the edge of a bin"
    assert any(tensor.clipped > 0.01 for tensor in analyzed.analysis.tensors.values())


def test_kernels(analyzed, by_hand):
    for name in LAYERS[1:]:
        w, tensor = by_hand.params[name]["kernel"], analyzed.analysis.tensors[f"{name}/kernel"]
        assert tensor.sqnr == pytest.approx(sqnr(w, rounded_kernel(w)), abs=1e-3)
        assert (tensor.role, tensor.clipped, sum(tensor.counts)) == ("weight", 0, w.size)
        assert (tensor.lo, tensor.hi) == pytest.approx((w.min(), w.max()))


def test_tensors_come_in_order_of_evaluation(analyzed):
    names = "input first/kernel first/output last/kernel last/output"
    assert list(analyzed.analysis.tensors) == names.split()


class Deep(nn.Module):
    """Layers enough for two stages; a skip across them, a computed kernel, a concatenation."""

    @nn.compact
    def __call__(self, x):
        skip = nn.relu(nn.Dense(6)(x))
        scale, y = self.param("scale", nn.initializers.ones, (6, 1)), skip
        for k in range(3):
            y = nn.relu(nn.Dense(6, name=f"hidden_{k}")(y))
        w = self.param("w", nn.initializers.lecun_normal(), (6, 6))
        y = y @ (w * scale) + 0.1 * skip
        y = jnp.concatenate([nn.Dense(6, name="left")(y), nn.Dense(6, name="right")(y)], -1)
        return {"logits": nn.Dense(3, name="head")(y), "class": jnp.argmax(y, -1)}


@pytest.fixture(scope="module")
def deep() -> Any:
    """One channel of a layer has a thousand times the others' size, which leaves them no codes."""
    x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    weight = dataclasses.replace(sq.SimQATConfig().weight, per_channel=False)
    qmodel = sq.SimQAT(sq.SimQATConfig(weight=weight)).apply(Deep())
    floats: Any = Deep().init(jax.random.key(0), x)
    params = floats["params"]
    params["scale"] = np.linspace(0.5, 2, 6, dtype=np.float32)[:, None]
    params["hidden_1"]["kernel"] = params["hidden_1"]["kernel"].at[:, 2].multiply(1000)
    params["hidden_2"]["kernel"] = params["hidden_2"]["kernel"].at[2].multiply(1e-3)
    return sq.analyze(qmodel, sq.calibrate(qmodel, floats, [x], progress=False), [x])


def test_a_bad_layer_comes_first(deep):
    assert deep.layers[0].name == "hidden_1"
    assert deep.layers[0].alone_quantized < deep.layers[2].alone_quantized - 10
    lines = str(deep).splitlines()
    assert lines[4].startswith("hidden_1 ")


def test_a_layer_starts_where_its_stage_does(deep):
    """And gives the bits of a run from the start, whatever its parameters are used for."""
    study = deep.study
    stages, batch = study.stages, study._data[0]
    assert len(stages) == 2 and set(stages.first) == {0, 1}
    known, _ = study._walked(batch)
    sides = (study._real, known.real), (study._exact, known.exact)
    for layer, (base, inputs) in itertools.product(range(len(stages.layers.names)), sides):
        other = study._exact if base is study._real else study._real
        version = base.with_layer_of(other, layer, stages.layers)
        first = stages.first[layer]
        late = stages.finish(first, version, inputs[first])
        early = stages.finish(0, version, stages.start(batch.arrays))
        np.testing.assert_array_equal(late[0], early[0], stages.layers.names[layer])


def test_float_variables_are_those_of_a_float_layer(analyzed):
    params = analyzed.variables["params"]
    moved = {"kernel": params["last"]["kernel"], "bias": params["last"]["bias"] + 3.0}
    variables = {**analyzed.variables, "params": {**params, "last": moved}}
    analysis = sq.analyze(
        analyzed.qmodel, variables, analyzed.batches, analyzed.floats, progress=False
    )
    before = {layer.name: layer for layer in analyzed.analysis.layers}
    (last,) = (layer for layer in analysis.layers if layer.name == "last")
    assert analysis.layers[0] == last
    assert last.alone_quantized < before["last"].alone_quantized - 3
    assert last.alone_float == pytest.approx(before["last"].alone_float, abs=1e-6)


def test_ranges_of_training_and_progress(analyzed, capsys):
    stats, history = analyzed.variables["quant_stats"], []
    for step, hi in ((0, -np.inf), (100, 1.5), (200, 2.5)):
        state = stats["input"]._replace(hi=jnp.float32(hi))
        history.append({"quant_stats": {**stats, "input": state, "step": jnp.int32(step)}})
    analysis = sq.analyze(
        analyzed.qmodel, analyzed.variables, analyzed.batches[:1], history=history
    )
    lo = float(stats["input"].lo)
    points = [(point.step, point.lo, point.hi) for point in analysis.ranges["input"]]
    assert points == [(100, lo, 1.5), (200, lo, 2.5)]
    assert len(analysis.ranges["last/output"]) == 3
    assert "analyze: run 4 of 4" in capsys.readouterr().err


# What is wrong ------------------------------------------------------------------------------------


def test_one_state_in_the_place_of_a_history(analyzed):
    with pytest.raises(TypeError, match=r"must be a list .* Pass history=\[variables\]"):
        args = analyzed.qmodel, analyzed.variables, analyzed.batches[:1]
        sq.analyze(*args, history=analyzed.variables)


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "yielded nothing"), ([np.zeros((0, 5), np.float32)], "no example")],
)
def test_no_data(analyzed, batches, message):
    with pytest.raises(ValueError, match=f"analyze: .*{message}"):
        sq.analyze(analyzed.qmodel, analyzed.variables, batches, progress=False)


def test_nan_in_the_data_is_named(analyzed):
    broken = analyzed.batches[1].copy()
    broken[3, 2] = np.nan
    batches = [analyzed.batches[0], broken]
    with pytest.raises(ValueError, match=r"input holds NaN or Inf in batch 1 .* Look at the data"):
        sq.analyze(analyzed.qmodel, analyzed.variables, batches, progress=False)


def test_broken_parameters_are_told_from_broken_data(analyzed):
    params = analyzed.variables["params"]
    broken = {**params["last"], "bias": params["last"]["bias"].at[0].set(jnp.inf)}
    variables = {**analyzed.variables, "params": {**params, "last": broken}}
    call = analyzed.qmodel, variables, analyzed.batches
    with pytest.raises(ValueError, match="last/output holds NaN or Inf in batch 0"):
        sq.analyze(*call, progress=False)
    broken["bias"] = broken["bias"].at[0].set(jnp.nan)
    with pytest.raises(ValueError, match="the quantized model makes NaN or Inf of batch 0"):
        sq.analyze(*call, analyzed.floats, progress=False)


def test_variables_of_another_model_are_named(analyzed):
    others = jax.tree.map(lambda x: x, analyzed.floats)
    others["params"]["last"]["kernel"] = jnp.zeros((6, 7))
    call = analyzed.qmodel, analyzed.variables, analyzed.batches
    shapes = r"params/last/kernel is of shape \(6, 7\) there, of shape \(6, 4\) here"
    with pytest.raises(ValueError, match=f"float_variables holds other variables .*{shapes}"):
        sq.analyze(*call, others, progress=False)
    del others["params"]["last"]
    with pytest.raises(ValueError, match="params/last/bias is missing there"):
        sq.analyze(*call, others, progress=False)


def test_ranges_never_observed(analyzed):
    with pytest.raises(ValueError, match="quant_stats for input, "):
        sq.analyze(analyzed.qmodel, analyzed.floats, analyzed.batches, progress=False)


def test_an_output_to_judge_by(analyzed):
    class Chooses(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.argmax(nn.Dense(3)(x), -1)

    x, qmodel = analyzed.batches[0], sq.SimQAT().apply(Chooses())
    variables = sq.calibrate(qmodel, Chooses().init(jax.random.key(0), x), [x], progress=False)
    with pytest.raises(ValueError, match=r"no floating-point array .* Pass method="):
        sq.analyze(qmodel, variables, [x], progress=False)
