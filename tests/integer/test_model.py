"""The integer model: evaluation's codes, in one file, with nothing silently wrong."""

import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import CASES, Case, Model, batch_norm, case

import simqat_jax as sq

RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
TRAINING = ("batch norm train", "dropout train")


def trained(case: Case, config=None):
    """Initialise and observe one batch; return the model, its variables and its evaluation."""
    qmodel = sq.SimQAT(config).apply(case.model)

    @jax.jit
    def observe():
        variables = qmodel.init(RNGS, *case.args, **case.kwargs)
        _, updates = qmodel.apply(variables, *case.args, **case.kwargs, mutable=["quant_stats"])
        return {**variables, **updates}

    evaluate = jax.jit(lambda variables, *args: qmodel.apply(variables, *args, **case.kwargs))
    return qmodel, observe(), evaluate


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("name", [name for name in CASES if name not in TRAINING])
def test_every_construct(name, tmp_path):
    """Evaluation, the integer model and the model read from its file agree in every code."""
    case = CASES[name]
    qmodel, variables, evaluate = trained(case)
    model = sq.convert(qmodel, variables, *case.args, **case.kwargs)
    want = evaluate(variables, *case.args)
    assert jax.tree.structure(model(*case.args)) == jax.tree.structure(want)
    assert_same(model(*case.args), want)
    model.save(tmp_path / "model")
    loaded = sq.IntegerModel.load(tmp_path / "model")
    assert str(loaded) == str(model)
    args = case.args
    if any(d < 0 for d in model.tensors[model.inputs[0]].shape):
        args = [jnp.concatenate([a, 0.7 * a, a[:1]]) for a in args]
    assert_same(loaded(*args), evaluate(variables, *args))
    codes = loaded.quantize(*args)
    results = loaded.run_codes(*codes) if isinstance(codes, list) else loaded.run_codes(codes)
    assert_same(loaded.dequantize(results), evaluate(variables, *args))
    assert not any(
        a.dtype == np.float32 and a.ndim > 1 for op in model.ops for a in op.arrays.values()
    )


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16():
    def model(x):
        return nn.Dense(50, dtype=jnp.bfloat16)(x).astype(jnp.float32)

    qmodel, variables, evaluate = trained(case(model, (64, 6), 2, 1))
    x = jax.random.normal(jax.random.key(3), (64, 6))
    logits = evaluate(variables, x)
    assert_same(sq.convert(qmodel, variables, x)(x), logits)
    assert np.any(np.asarray(logits) != logits.astype(jnp.bfloat16).astype(jnp.float32))
    gradient = jax.grad(lambda v: qmodel.apply({**variables, "params": v}, x).sum())
    assert jax.tree.all(jax.tree.map(jnp.any, gradient(variables["params"])))


@pytest.mark.parametrize(
    ("activation_bits", "weight_bits", "symmetric"),
    [(3, 2, False), (4, 8, True), (8, 4, False), (8, 8, True), (12, 8, False), (16, 8, False)],
)
def test_widths(activation_bits, weight_bits, symmetric):
    config = sq.SimQATConfig(
        weight=sq.QuantSpec(
            num_bits=weight_bits,
            symmetric=True,
            per_channel=True,
            narrow_range=weight_bits == 8,
            observer="batch",
        ),
        activation=sq.QuantSpec(num_bits=activation_bits, symmetric=symmetric),
    )

    def body(x):
        x = nn.relu(nn.Conv(8, (3, 3), bias_init=nn.initializers.normal(0.3))(x))
        return nn.Dense(5)(nn.silu(x.mean(axis=(1, 2))))

    small = case(body, (16, 6, 6, 40), 0, 0)
    qmodel, variables, evaluate = trained(small, config)
    model = sq.convert(qmodel, variables, *small.args)
    assert_same(model(*small.args), evaluate(variables, *small.args))
    grid = model.tensors[model.outputs[0]].grid
    assert (grid.qmin, grid.qmax) == (config.activation.qmin, config.activation.qmax)


@pytest.mark.parametrize("fold", ["none", "one_conv", "two_conv"])
def test_batch_norm_of_every_kind(fold):
    """Negative, zero and dead channels, folded in each mode."""
    norm = case(batch_norm, (4, 8, 8, 3), 0, 0, train=False)
    qmodel, variables, evaluate = trained(norm, sq.SimQATConfig(bn_fold=fold))
    params = jax.tree.map(jnp.array, variables["params"])
    params["BatchNorm_0"]["scale"] = jnp.array([-0.7, 0.0, 1.0, 2.0])
    params["Conv_0"]["kernel"] = params["Conv_0"]["kernel"].at[..., 3].set(0.0)
    variables = {**variables, "params": params}
    model = sq.convert(qmodel, variables, *norm.args, train=False)
    assert_same(model(*norm.args), evaluate(variables, *norm.args))


def test_int8_weights_and_a_table_to_read():
    case = CASES["residual"]
    qmodel, variables, _ = trained(case)
    model = sq.convert(qmodel, variables, *case.args)
    kernels = [op.arrays["kernel"] for op in model.ops if op.kind == "conv"]
    assert [k.dtype for k in kernels] == [np.int8] * 3
    assert all(op.arrays["bias"].dtype == np.int32 for op in model.ops if op.kind == "conv")
    floats = sum(a.nbytes for a in jax.tree.leaves(variables["params"]))
    assert model.nbytes < 0.6 * floats  # of so few weights many are biases
    text = str(model)
    assert "Block_0/Conv_0" in text and "(batch, 8, 8, 4)" in text and "0 of them in float" in text


def test_codes_are_those_of_the_grid():
    qmodel, variables, _ = trained(CASES["nested"])
    model = sq.convert(qmodel, variables, *CASES["nested"].args)
    codes = model.quantize(*CASES["nested"].args)
    state = variables["quant_stats"]["input"]
    spec = sq.QuantSpec()
    params = sq.quant_params(state.lo, state.hi, spec)
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, sq.quantize(CASES["nested"].args[0], *params, spec, None))


# Additions in ONNX Runtime -----------------------------------------------------------------------


def test_additions_as_in_onnx_runtime_round_each_product_once():
    """Against exact rational arithmetic."""
    from fractions import Fraction

    from simqat_jax.integer_arithmetic import add_onnxruntime

    def rounded(value):  # one correct rounding to float32: through a float64 rounded to odd
        near = float(value)
        if Fraction(near) == value:
            return Fraction(float(np.float32(near)))
        away = np.nextafter(near, np.inf if value > Fraction(near) else -np.inf)
        odd = near if int(np.float64(near).view(np.int64)) & 1 else away
        return Fraction(float(np.float32(odd)))

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 400)).astype(np.int32)
    ra, rb = rng.uniform(0.2, 1.5, 2).astype(np.float32)
    z = np.float32(rng.uniform(-60, 60))
    got = jax.jit(add_onnxruntime)(a, b, ra, rb, z)
    np.testing.assert_array_equal(got, add_onnxruntime(jnp.asarray(a), jnp.asarray(b), ra, rb, z))
    for i in range(len(a)):
        inner = rounded(Fraction(int(b[i])) * Fraction(float(rb)) + Fraction(float(z)))
        outer = rounded(Fraction(int(a[i])) * Fraction(float(ra)) + inner)
        assert float(got[i]) == float(np.rint(float(outer)))


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


# Files -------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    qmodel, variables, _ = trained(CASES["relu"])
    path = tmp_path / "model"
    sq.convert(qmodel, variables, *CASES["relu"].args).save(path)
    return path


def test_a_truncated_file(saved):
    data = saved.read_bytes()
    saved.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"no integer model|damaged"):
        sq.IntegerModel.load(saved)


def test_an_altered_file(saved):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 0x10
    saved.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        sq.IntegerModel.load(saved)


def test_a_foreign_file(tmp_path):
    path = tmp_path / "foreign"
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match="no integer model"):
        sq.IntegerModel.load(tmp_path / "foreign.npz")
    path.write_text("text")
    with pytest.raises(ValueError, match="no integer model"):
        sq.IntegerModel.load(path)
    with pytest.raises(FileNotFoundError):
        sq.IntegerModel.load(tmp_path / "nothing")


def test_a_file_of_a_later_format(saved):
    with zipfile.ZipFile(saved) as archive:
        header, body = archive.read("header.json"), archive.read("model.npz")
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("header.json", header.replace(b'"format": 1', b'"format": 99'))
        archive.writestr("model.npz", body)
    with pytest.raises(ValueError, match="has format 99"):
        sq.IntegerModel.load(saved)


def test_an_interrupted_save_leaves_what_was_there(saved, monkeypatch):
    model, before = sq.IntegerModel.load(saved), saved.read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


# Bad input ---------------------------------------------------------------------------------------


def dense(config=None):
    plain = case(lambda x: nn.Dense(3)(nn.relu(nn.Dense(4)(x))), (4, 6), 0, 0)
    return trained(plain, config)


def test_what_is_not_a_trained_model():
    qmodel, variables, _ = dense()
    with pytest.raises(TypeError, match=r"what SimQAT.apply returned, got Dense"):
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
    with pytest.raises(ValueError, match="positional"):
        sq.convert(qmodel, variables, x=X)


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
    kernel = 0.01 * variables["params"]["Conv_0"]["kernel"] * factors
    params = {**variables["params"], "Conv_0": {"kernel": kernel, "bias": jnp.full(4, 0.3)}}
    variables = {**variables, "params": params}
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    variables = {**variables, **updates}
    evaluated, integer = qmodel.apply(variables, x), sq.convert(qmodel, variables, x)
    step = integer.tensors[integer.outputs[0]].grid.scale
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
    step = integer.tensors[integer.outputs[0]].grid.scale
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
        weight=sq.QuantSpec(num_bits=16, symmetric=True, per_channel=True, observer="batch"),
        activation=sq.QuantSpec(num_bits=16),
    )
    qmodel, variables, _ = dense(wide)
    with pytest.raises(ValueError, match=r"Dense_.: its sums may reach .* fewer bits"):
        sq.convert(qmodel, variables, X)


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
    assert any(op.kind == "float" for op in model.ops)
    assert_same(model(x), evaluate(variables, x))


def test_average_pooling_of_half_precision():
    def body(x):
        x = nn.avg_pool(nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x), (2, 2), (2, 2))
        return nn.Conv(3, (1, 1), dtype=jnp.bfloat16)(x)

    qmodel, variables, evaluate = trained(case(body, (8, 8, 8, 4), 0, 0))
    x = jax.random.normal(KEY, (8, 8, 8, 4))
    assert_same(sq.convert(qmodel, variables, x)(x), evaluate(variables, x))


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


def test_inputs_of_the_wrong_shape_or_type():
    qmodel, variables, _ = dense()
    model = sq.convert(qmodel, variables, X)
    assert model(X[:2]).shape == (2, 3)
    with pytest.raises(ValueError, match=r"input must have shape \(batch, 6\), got \(4, 5\)"):
        model(X[:, :5])
    with pytest.raises(ValueError, match="takes 1 arrays"):
        model(X, X)
    with pytest.raises(ValueError, match="floating-point type, got int32"):
        model(X.astype(jnp.int32))
    with pytest.raises(ValueError, match="codes must be of type uint8, got float32"):
        model.run_codes(X)


def test_a_model_that_holds_on_to_its_batch_size():
    qmodel, variables, evaluate = trained(CASES["flatten"])
    args = CASES["flatten"].args
    model = sq.convert(qmodel, variables, *args)
    assert_same(model(*args), evaluate(variables, *args))
    with pytest.raises(ValueError, match=r"must have shape \(2, 8, 8, 4\)"):
        model(args[0][:1])


def test_float_parts_are_shown():
    qmodel, variables, _ = trained(CASES["softmax"])
    text = str(sq.convert(qmodel, variables, *CASES["softmax"].args))
    assert "float (dequantized, computed, quantized again)" in text
    model = Model(lambda x: nn.Dense(2)(nn.Dense(3)(x)))
    qmodel = sq.SimQAT(sq.SimQATConfig(exclude=("Dense_1",))).apply(model)
    variables = qmodel.init(KEY, X)
    _, updates = qmodel.apply(variables, X, mutable=["quant_stats"])
    converted = sq.convert(qmodel, {**variables, **updates}, X)
    kinds = [op.kind for op in converted.ops]
    assert kinds[-2:] == ["quantize", "dense"] and "float" in kinds
    excluded = sum(a.nbytes for a in jax.tree.leaves(variables["params"]["Dense_1"]))
    assert sum(op.nbytes for op in converted.ops if op.kind == "float") == excluded
    assert converted.nbytes > excluded
