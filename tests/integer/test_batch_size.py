"""A model that depends on its batch size keeps it; every other one takes any."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from models import assert_same, export, trained
from zoo import case

import simqat_jax as sq

ROW, IMAGE = (4, 6), (8, 8, 4)


def centered(x):
    h = nn.Dense(5)(x)
    return h - h.mean(0, keepdims=True)


def class_token(x):
    token = jnp.broadcast_to(jnp.ones((1, 6)), (x.shape[0], 6))
    return nn.Dense(3)(jnp.concatenate([token, nn.Dense(6)(x)], -1))


def stacked(x):
    h = nn.Dense(6)(x)
    return jnp.stack([h, jnp.ones_like(h)])


def zeros_behind(x):
    h = nn.Dense(6)(x)
    return nn.Dense(3)(jnp.concatenate([h, jnp.zeros_like(h)], -1))


DEPENDENT = {
    "scaled by it": (lambda x: nn.Dense(3)(nn.Dense(6)(x) * (1.0 / x.shape[0])), ROW),
    "mean over it": (lambda x: nn.Dense(3)(nn.Dense(5)(x).mean(0, keepdims=True)), ROW),
    "mean over all": (lambda x: nn.Dense(6)(x).mean(keepdims=True), ROW),
    "centered": (centered, ROW),
    "unbatched image": (lambda x: nn.Dense(3)(nn.Conv(4, (3, 3))(x).mean((0, 1))), IMAGE),
    "class token": (class_token, ROW),
    "stacked with a constant": (stacked, ROW),
    "zeros behind": (zeros_behind, ROW),
    "halves": (lambda x: jnp.split(nn.Dense(4)(jnp.concatenate([x, -x], 0)), 2), ROW),
    "last example": (lambda x: nn.Dense(3)(nn.Dense(5)(x)[-1]), ROW),
    "float function of it": (lambda x: nn.standardize(nn.Dense(4)(x), axis=0), ROW),
}
FREE = {
    "edge padding": (
        lambda x: nn.Dense(3)(jnp.pad(nn.Dense(5)(x), ((0, 0), (1, 1)), "edge")),
        ROW,
    ),
    "height": (lambda x: nn.Conv(3, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x))), (8, 8, 3)),
    "mean over positions": (lambda x: nn.Conv(3, (3, 3))(x).mean((1, 2)), (2, 8, 8, 4)),
    "float function": (lambda x: nn.softmax(nn.Dense(4)(x)), ROW),
}


def converted(body, shape, backend):
    small = case(body, shape, 0, 0)
    qmodel, variables, evaluate = trained(small, sq.SimQATConfig(backend=backend))
    model = sq.convert(qmodel, variables, *small.args)
    return lambda x: evaluate(variables, x), model, small.args[0]


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("name", DEPENDENT)
def test_a_model_that_depends_on_its_batch_size_keeps_it(name, backend, tmp_path):
    evaluate, model, x = converted(*DEPENDENT[name], backend)
    assert model.tensors[model.inputs[0]].shape == x.shape
    assert_same(model(x), evaluate(x))
    with pytest.raises(ValueError, match="shape"):
        model(jnp.concatenate([x, x]))
    model.save(tmp_path / "model")
    assert_same(sq.IntegerModel.load(tmp_path / "model")(x), evaluate(x))
    if name != "float function of it":
        path = tmp_path / f"m.{backend}"
        export(model, path)
        assert sq.verify(model, path, x).differing == 0


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("name", FREE)
def test_every_other_model_takes_any(name, backend, tmp_path):
    evaluate, model, x = converted(*FREE[name], backend)
    assert model.tensors[model.inputs[0]].shape == (-1, *x.shape[1:])
    more = jnp.concatenate([x, 0.5 * x, x[:1]])
    assert_same(model(more), evaluate(more))
    if name != "float function":
        path = tmp_path / f"m.{backend}"
        export(model, path)
        assert sq.verify(model, path, more).differing == 0
