"""Widths that stand in the way are told before training."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import simqat_jax as sq

WEIGHT = sq.SimQATConfig().weight
A16 = sq.QuantSpec(num_bits=16)
X = jax.random.normal(jax.random.key(0), (4, 6))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


def quantized(**config) -> sq.QuantizedModule:
    return sq.SimQAT(sq.SimQATConfig(**config)).apply(Net())


# Files -------------------------------------------------------------------------------------------

WIDE = {
    "activation": ({"activation": A16}, ["head/output: 16 bits, by SimQATConfig.activation"]),
    "weight": (
        {"weight": dataclasses.replace(WEIGHT, num_bits=12)},
        ["body/kernel: 12 bits, by SimQATConfig.weight"],
    ),
    "rule": (
        {"exclude": (), "rules": [sq.Rule(path="head", activation=A16)]},
        ["head/output: 16 bits, by activation of SimQATConfig.rules[0] (path='head')"],
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_what_no_file_holds_is_an_error_before_training(name):
    """The first call names it; export refuses the same model after training; the remedies work."""
    config, told = WIDE[name]
    with pytest.raises(
        ValueError, match=r"targets are tflite, onnx, and .* at most 8 bits"
    ) as error:
        quantized(**config, targets=("tflite", "onnx")).init(jax.random.key(0), X)
    assert all(line in str(error.value) for line in told)
    qmodel = quantized(**config)
    variables = qmodel.init(jax.random.key(0), X)
    assert "No ONNX or TFLite file holds the codes of: " in str(qmodel.plan(variables, X))


def test_the_export_refuses_what_the_plan_names(tmp_path):
    qmodel = quantized(activation=A16)
    variables = sq.calibrate(qmodel, Net().init(jax.random.key(0), X), [X], progress=False)
    model = sq.convert(qmodel, variables, X)
    for export in (sq.export_onnx, sq.export_tflite):
        with pytest.raises(ValueError, match=r"16 bits|more than 8 bits|codes of type"):
            export(model, tmp_path / "model")


def test_eight_bits_and_fewer_are_for_every_target():
    qmodel = quantized(targets=["onnx", "tflite"])
    plan = qmodel.plan(qmodel.init(jax.random.key(0), X), X)
    assert "file" not in str(plan)


# Kernels that round to zero ----------------------------------------------------------------------


def two_bits(**changes) -> sq.QuantSpec:
    return dataclasses.replace(WEIGHT, **{"num_bits": 2, "per_channel": False, **changes})


@pytest.mark.parametrize("observer", ["batch", "ema", "minmax", "percentile", "entropy"])
def test_kernels_that_training_rounds_to_zero_are_named(observer):
    qmodel = quantized(weight=two_bits(observer=observer))
    with pytest.warns(UserWarning, match="^body/kernel, head/kernel: 2 bits with one range"):
        qmodel.init(jax.random.key(0), X)


@pytest.mark.parametrize(
    "changes",
    [{"observer": "mse"}, {"observer": "learned"}, {"per_channel": True}, {"num_bits": 3}],
)
def test_others_are_not(changes):
    quantized(weight=two_bits(**changes)).init(jax.random.key(0), X)


def test_the_remedy_trains():
    """With learned steps a network of ternary kernels, one scale each, learns, and stays alive."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 10, 640)
    x = draw.normal(size=(10, 32))[labels] + draw.normal(size=(640, 32))
    x, y = jnp.asarray(x, jnp.float32).reshape(20, 32, 32), jnp.asarray(labels).reshape(20, 32)
    model = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(64), nn.relu, nn.Dense(10)])
    qmodel = sq.SimQAT(sq.SimQATConfig(weight=two_bits(observer="learned"))).apply(model)
    variables = dict(qmodel.init(jax.random.key(0), x[0]))
    trained = {name: variables.pop(name) for name in ("params", "quant_params")}
    trained |= qmodel.apply(trained | variables, x[0], mutable=["quant_stats", "quant_params"])[1]
    stats, optimizer = trained.pop("quant_stats"), optax.adam(3e-3)

    def step(carry, batch):
        trained, stats, state = carry

        def loss(trained):
            variables = {**trained, "quant_stats": stats}
            logits, updates = qmodel.apply(variables, batch[0], mutable=["quant_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
            return losses.mean(), updates["quant_stats"]

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        changes, state = optimizer.update(gradient, state)
        return (optax.apply_updates(trained, changes), stats, state), value

    epoch = jax.jit(lambda carry: jax.lax.scan(step, carry, (x, y)))
    carry = trained, stats, optimizer.init(trained)
    losses = jnp.inf
    for _ in range(10):
        carry, losses = epoch(carry)
    assert jnp.mean(losses) < 0.2
    params, steps = carry[0]["params"], carry[0]["quant_params"]
    for name, layer in params.items():
        zeros = jnp.mean(jnp.abs(layer["kernel"]) < steps[f"{name}/kernel"] / 2)
        assert zeros < 0.8


def test_no_warning_in_evaluation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        qmodel = quantized(weight=two_bits())
        variables = dict(qmodel.init(jax.random.key(0), X))
        variables |= qmodel.apply(variables, X, mutable=["quant_stats"])[1]
    qmodel.apply(variables, X)
