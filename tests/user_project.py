# pyright: strict
"""What README shows, as a user's project writes it: pyright checks it, by its strict rules."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np

import simqat_jax as sq


def quantize(model: nn.Module, key: jax.Array, x: jax.Array) -> sq.QuantizedModule:
    """Train one step, look at the plan, evaluate."""
    config = sq.SimQATConfig(
        weight_bits=4,
        activation=sq.QuantSpec.activation(observer="minmax"),
        exclude=["head"],
        rules=[sq.Rule(path="stem", weight=sq.QuantSpec.weight(num_bits=8))],
    )
    qmodel = sq.SimQAT(sq.SimQATConfig.from_json(config.to_json())).apply(model)
    variables = qmodel.init(key, x)
    _, updates = qmodel.apply(variables, x, train=True, mutable=["batch_stats", "quant_stats"])
    trained = variables | updates
    plan = qmodel.plan(trained, x)
    print(qmodel, plan, plan.details("Conv_*"), plan.floats, plan.rows[0].brief)
    qmodel.check(trained)
    print(qmodel.apply(trained, x).argmax(-1), sq.nonfinite_ranges(trained["quant_stats"]))
    return qmodel


def deploy(qmodel: sq.QuantizedModule, variables: dict[str, Any], x: jax.Array) -> int:
    """Convert, write both files, count what differs."""
    int8 = sq.convert(qmodel, variables, x, train=False, backend="onnx")
    sq.export_onnx(int8, "model.onnx")
    sq.export_tflite(sq.convert(qmodel, variables, x, train=False), "model.tflite")
    found = sq.verify(int8, "model.onnx", x)
    int8.save("model.integer")
    assert sq.IntegerModel.load("model.integer") == int8
    print(int8, int8.details(), int8.nbytes, found, found.to_dict(), int8(x), int8.to_dict())
    runtime = sq.open_file("model.tflite", threads=1)
    outputs: list[np.ndarray] = runtime.run([np.asarray(x)])
    print(outputs[0].shape, runtime.name)
    return found.differing


def post_training(model: nn.Module, floats: dict[str, Any], x: jax.Array) -> dict[str, Any]:
    """Quantize without training, in one call and in parts."""
    qmodel, variables = sq.post_training_quantize(model, floats, [x], train=False)
    calibrated = sq.calibrate(qmodel, variables, [x, x], train=False)
    return sq.correct_bias(qmodel, calibrated, [x], reference=floats, train=False)


def numerics(x: jax.Array) -> jax.Array:
    """Every function returns arrays."""
    spec = sq.QuantSpec(num_bits=4)
    state = sq.observe(sq.init_range(), x, spec)
    params = sq.quant_params(state.lo, state.hi, spec)
    codes = sq.quantize(x, params.scale, params.zero_point, spec, None)
    return sq.dequantize(codes, params.scale, params.zero_point) + sq.fake_quant(
        x, state.lo, state.hi, spec
    )


def why(
    qmodel: sq.QuantizedModule, variables: dict[str, Any], x: np.ndarray, y: np.ndarray
) -> sq.SimQATConfig:
    """Analyze, choose widths, write a page and a file that says what it takes."""
    analysis = sq.analyze(qmodel, variables, [x], train=False)
    print(analysis, analysis.layers[0].gain, analysis.tensors["input"].clipped)
    drop = sq.MaxDrop(0.01, lambda logits: (logits.argmax(-1) == y).mean())
    found = sq.suggest(analysis, drop)
    models = [sq.Measurement(name="float", accuracy=0.97, p50_ms=0.3)]
    sq.report(analysis, "report.html", measurements=models)
    about = sq.FileMetadata(name="net", tensors={"input": sq.TensorMetadata(mean=0, std=255)})
    int8 = sq.convert(qmodel, variables, x, train=False)
    sq.export_tflite(int8, "model.tflite", integer_io="uint8", metadata=about)
    print(found.nbytes, found.drop, found.widths)
    return found.config
