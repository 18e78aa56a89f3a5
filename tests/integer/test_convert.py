"""Conversion: what a trained model becomes, and every reason for which it cannot."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, observed, trained
from zoo import CASES, Model, batch_norm, case

import simqat_jax as sq
from simqat_jax.ir.program import grid_of

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def dense(config=None):
    plain = case(lambda x: nn.Dense(3)(nn.relu(nn.Dense(4)(x))), (4, 6), 0, 0)
    return trained(plain, config)


def test_backends_differ_in_additions_alone():
    case = CASES["residual"]
    models = {}
    for backend in ("tflite", "onnx"):
        qmodel, variables, evaluate = trained(case, sq.SimQATConfig(backend=backend))
        models[backend] = sq.convert(qmodel, variables, *case.args)
        assert_same(models[backend](*case.args), evaluate(variables, *case.args))
    kinds = {name: [op.kind for op in m.ops] for name, m in models.items()}
    assert [k for k in kinds["onnx"] if k != "add_onnx"] == [
        k for k in kinds["tflite"] if k != "add"
    ]
    other = sq.convert(qmodel, variables, *case.args, backend="tflite")
    assert other.backend == "tflite"


def test_what_is_not_a_trained_model():
    qmodel, variables, _ = dense()
    with pytest.raises(TypeError, match=r"must be a QuantizedModule, got Dense"):
        sq.convert(nn.Dense(3), variables, X)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda v: sq.convert(qmodel, v, X))(variables)
    fresh = qmodel.init(KEY, X)
    with pytest.raises(ValueError, match=r"ranges of input, .* never observed"):
        sq.convert(qmodel, fresh, X)
    with pytest.raises(ValueError, match="no quant_stats for input"):
        sq.convert(qmodel, {"params": variables["params"]}, X)
    with pytest.raises(ValueError, match=r"backend must be one of"):
        sq.convert(qmodel, variables, X, backend="onxx")


def test_weights_that_are_not_finite():
    qmodel, variables, _ = dense()
    params = jax.tree.map(jnp.array, variables["params"])
    params["Dense_1"]["kernel"] = params["Dense_1"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="Dense_1: its kernel holds NaN or Inf"):
        sq.convert(qmodel, {**variables, "params": params}, X)


@pytest.mark.parametrize("fold", ["none", "one_conv"])
@pytest.mark.parametrize("norm", [False, True])
def test_channels_with_tiny_weights_keep_their_bias(fold, norm, tmp_path):
    """In units of its accumulator such a bias has more than 32 bits."""

    def model(x):
        x = nn.Conv(4, (3, 3), name="Conv_0")(x)
        return nn.BatchNorm(use_running_average=True)(x) if norm else x

    qmodel = sq.SimQAT(sq.SimQATConfig(bn_fold=fold)).apply(Model(model))
    x = 80 * jnp.abs(jax.random.normal(KEY, (2, 6, 6, 3)))  # as of raw pixels
    variables = qmodel.init(KEY, x)
    factors = jnp.array([0.0, 1e-14, 1e-4, 1.0]).reshape(1, 1, 1, 4)
    kernel = 0.01 * jnp.asarray(variables["params"]["Conv_0"]["kernel"]) * factors
    params = {**variables["params"], "Conv_0": {"kernel": kernel, "bias": jnp.full(4, 0.3)}}
    variables = {**variables, "params": params}
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    variables = {**variables, **updates}
    evaluated, integer = qmodel.apply(variables, x), sq.convert(qmodel, variables, x)
    step = grid_of(integer.tensors[integer.outputs[0]]).scale
    want = Model(model).apply(floats, x)
    np.testing.assert_allclose(evaluated[..., :3], want[..., :3], atol=step)
    np.testing.assert_allclose(evaluated, want, atol=4 * step)
    assert_same(integer(x), evaluated)
    sq.export_tflite(integer, tmp_path / "m.tflite")
    assert sq.verify(integer, tmp_path / "m.tflite", x).differing == 0


def test_a_batch_norm_of_its_own_keeps_its_shift():
    def model(x):
        return nn.BatchNorm(use_running_average=True)(nn.tanh(nn.Dense(4)(x)))

    qmodel = sq.SimQAT().apply(Model(model))
    x = 80 * jnp.abs(X)
    variables = qmodel.init(KEY, x)
    scale, shift = jnp.array([0.0, 1e-13, 1e-3, 1.0]), jnp.full(4, 0.3)
    norm = {"scale": scale, "bias": shift}
    name = next(n for n in variables["params"] if n.startswith("BatchNorm"))
    variables = {**variables, "params": {**variables["params"], name: norm}}
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    variables = {**variables, **updates}
    evaluated, integer = qmodel.apply(variables, x), sq.convert(qmodel, variables, x)
    step = grid_of(integer.tensors[integer.outputs[0]]).scale
    np.testing.assert_allclose(evaluated[:, :2], 0.3, atol=step)
    assert_same(integer(x), evaluated)


def test_a_bias_beyond_every_range():
    qmodel, variables, _ = dense()
    params = jax.tree.map(jnp.array, variables["params"])
    params["Dense_1"]["bias"] = params["Dense_1"]["bias"] + 1e9
    variables = {**variables, "params": params}
    model = sq.convert(qmodel, variables, X)
    assert_same(model(X), qmodel.apply(variables, X))
    assert all(np.abs(op.arrays["bias"]).max() <= 2**30 for op in model.ops)


def test_sums_that_int32_cannot_hold():
    wide = sq.SimQATConfig(
        weight=sq.QuantSpec(
            num_bits=16, symmetric=True, per_channel=True, narrow_range=False, observer="batch"
        ),
        activation=sq.QuantSpec(num_bits=16),
    )
    qmodel, variables, _ = dense(wide)
    with pytest.raises(ValueError, match=r"Dense_.: its sums may reach .* fewer bits"):
        sq.convert(qmodel, variables, X)


def test_a_bias_counts_among_the_sums():
    """Codes of 15 bits, 16383 and 14745, times 65535: int32 holds 0.04 of the bias besides."""
    wide = sq.SimQATConfig(
        weight=sq.QuantSpec(num_bits=15, symmetric=True, per_channel=True, observer="batch"),
        activation=sq.QuantSpec(num_bits=16),
    )
    x = jnp.array([[0.0, 1.0]])
    qmodel, variables, _ = observed(Model(lambda x: nn.Dense(1)(x)), x, config=wide)

    def converted(bias):
        layer = {"kernel": jnp.array([[1.0], [0.9]]), "bias": jnp.array([bias])}
        return sq.convert(qmodel, {**variables, "params": {"Dense_0": layer}}, x)

    assert converted(0.04).ops
    with pytest.raises(ValueError, match=r"its sums may reach 21"):
        converted(0.1)


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (lambda x: nn.relu(nn.Dense(6)(x)) * nn.relu(nn.Dense(6)(x)), (64, 6)),
        (lambda x: nn.Dense(3)(nn.relu(nn.Conv(2, (1, 1))(x)).sum((1, 2))), (1, 300, 300, 1)),
    ],
)
def test_products_and_sums_that_int32_cannot_hold_are_computed_in_float(body, shape):
    config = sq.SimQATConfig(activation=sq.QuantSpec(num_bits=16))
    qmodel, variables, evaluate = trained(case(body, shape, 0, 0), config)
    x = jnp.abs(jax.random.normal(KEY, shape)) + 1
    model = sq.convert(qmodel, variables, x)
    assert model.program.float_ops
    assert_same(model(x), evaluate(variables, x))


def test_half_precision_that_does_not_hold_the_codes():
    def body(x):
        return nn.Dense(3)(nn.Dense(4, dtype=jnp.bfloat16)(x).reshape(4, -1))

    config = sq.SimQATConfig(activation=sq.QuantSpec(num_bits=12))
    qmodel, variables, _ = trained(case(body, (2, 6), 0, 0), config)
    with pytest.raises(ValueError, match="reshape: bfloat16 does not hold codes"):
        sq.convert(qmodel, variables, jnp.ones((2, 6)))


def test_outputs_that_no_file_holds():
    qmodel, variables, _ = trained(case(lambda x: {0: nn.Dense(3)(x)}, (4, 6), 0, 0))
    with pytest.raises(ValueError, match=r"returns a dict.*strings as keys"):
        sq.convert(qmodel, variables, X)


def test_a_method_of_the_model():
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(6), nn.Dense(5)

        def encode(self, x):
            return nn.relu(self.encoder(x))

        def __call__(self, x):
            return self.decoder(self.encode(x))

    qmodel = sq.SimQAT().apply(Coder())
    variables = qmodel.init(KEY, X)
    _, updates = qmodel.apply(variables, X, method="encode", mutable=["quant_stats"])
    variables = {**variables, **updates}
    model = sq.convert(qmodel, variables, X, method="encode")
    assert_same(model(X), qmodel.apply(variables, X, method="encode"))


def test_inputs_on_one_grid_have_names_of_their_own():
    def body(a, b):
        return nn.Dense(3)(jnp.concatenate([a, b], -1))

    qmodel, variables, _ = trained(case(body, [(4, 6), (4, 2)], 0, 0))
    model = sq.convert(qmodel, variables, X, X[:, :2])
    assert [model.tensors[i].name for i in model.inputs] == ["input/0", "input/1"]


def test_what_is_not_evaluation():
    norm = case(batch_norm, (4, 8, 8, 3), 0, 0, train=False)
    qmodel, variables, _ = trained(norm)
    with pytest.raises(ValueError, match=r"Conv_0: convert takes the model in evaluation"):
        sq.convert(qmodel, variables, *norm.args, train=True)
    with pytest.raises(ValueError, match=r"the model: convert takes the model in evaluation"):
        sq.convert(*trained(CASES["dropout eval"])[:2], X[:3], deterministic=False)
    delayed = sq.SimQATConfig(activation=sq.QuantSpec(quant_delay=5))
    qmodel, variables, _ = dense(delayed)
    with pytest.raises(ValueError, match="quantizes from step 5"):
        sq.convert(qmodel, variables, X)


def test_per_channel_activations():
    config = sq.SimQATConfig(activation=sq.QuantSpec(per_channel=True))
    qmodel, variables, _ = dense(config)
    with pytest.raises(ValueError, match="per_channel=False"):
        sq.convert(qmodel, variables, X)


def test_the_call_by_its_name_is_the_call():
    qmodel, variables, evaluate = dense()
    for method in ("__call__", type(qmodel.module).__call__, sq.QuantizedModule.__call__):
        model = sq.convert(qmodel, variables, X, method=method)
        assert [model.tensors[i].name for i in model.inputs] == ["input"]
        assert_same(model(X), evaluate(variables, X))
        assert "input" in qmodel.plan(variables, X, method=method).quantizers
