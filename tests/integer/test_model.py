"""The integer model: evaluation's codes, in one file, with nothing silently wrong."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, by_night, converted, observed, trained
from zoo import CASES, Model, batch_norm, case

import simqat_jax as sq
from simqat_jax.ir.program import grid_of
from simqat_jax.ops.floats import FloatOp

pytestmark = pytest.mark.usefixtures("optimized")
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
TRAINING = ("batch norm train", "dropout train")
IN_FLOAT = ("preprocessing",)
"""All others come out whole."""


@pytest.mark.parametrize("name", by_night(name for name in CASES if name not in TRAINING))
def test_every_construct(name, tmp_path):
    """Evaluation, the integer model and the model read from its file agree in every code.

    What an operation on integers computes, its float form often has too: it has to be the first.
    """
    case = CASES[name]
    qmodel, variables, evaluate = trained(case)
    model = sq.convert(qmodel, variables, *case.args, **case.kwargs)
    assert bool(model.program.float_ops) == (name in IN_FLOAT)
    args = case.args
    if any(d < 0 for d in model.tensors[model.inputs[0]].shape):
        args = [jnp.concatenate([a, 0.7 * a, a[:1]]) for a in args]
    want = evaluate(variables, *args)
    assert jax.tree.structure(model(*args)) == jax.tree.structure(want)
    assert_same(model(*args), want)
    codes = model.quantize(*args)
    results = model.run_codes(*codes) if isinstance(codes, list) else model.run_codes(codes)
    assert_same(model.dequantize(results), want)
    arrays = [(name, a) for op in model.ops for name, a in op.arrays.items()]
    of_channels = ("multiplier", "scale", "shift")
    assert not any(a.dtype == np.float32 and a.ndim > 1 for n, a in arrays if n not in of_channels)

    model.save(tmp_path / "model")
    loaded = sq.IntegerModel.load(tmp_path / "model")
    assert str(loaded) == str(model)
    if any(isinstance(op, FloatOp) for op in model.ops):  # a function was written
        assert_same(loaded(*args), want)
    else:
        assert_same_programs(loaded.program, model.program)


def assert_same_programs(got, want):
    """All of two programs is equal, which hold no functions."""
    for a, b in zip(got.ops, want.ops, strict=True):
        assert dataclasses.replace(a, arrays={}) == dataclasses.replace(b, arrays={})
        assert a.arrays.keys() == b.arrays.keys()
    for a, b in zip(got.tensors, want.tensors, strict=True):
        assert dataclasses.replace(a, value=None) == dataclasses.replace(b, value=None)
        assert (a.value is None) == (b.value is None)
    pairs = [(a.arrays, b.arrays) for a, b in zip(got.ops, want.ops, strict=True)]
    pairs += [(a.value, b.value) for a, b in zip(got.tensors, want.tensors, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *map(list, zip(*pairs, strict=True)))
    ends = [(p.inputs, p.outputs, p.structure, p.backend) for p in (got, want)]
    assert ends[0] == ends[1]


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16():
    def model(x):
        return nn.Dense(50, dtype=jnp.bfloat16)(x).astype(jnp.float32)

    qmodel, variables, evaluate = trained(case(model, (64, 6), 2, 1))
    x = jax.random.normal(jax.random.key(3), (64, 6))
    logits = evaluate(variables, x)
    assert_same(sq.convert(qmodel, variables, x)(x), logits)
    assert np.any(np.asarray(logits) != logits.astype(jnp.bfloat16).astype(jnp.float32))
    gradient = jax.grad(lambda v: jnp.sum(qmodel.apply({**variables, "params": v}, x)))
    assert jax.tree.all(jax.tree.map(jnp.any, gradient(variables["params"])))


ALIKE_WIDTHS = ((4, 8, True), (12, 8, False))
"""Others by day have as many bits in one of both, or hold more."""


@pytest.mark.parametrize(
    ("activation_bits", "weight_bits", "symmetric"),
    [
        *[(3, 2, False), (8, 4, False), (8, 8, True), (16, 8, False)],
        *[pytest.param(*widths, marks=pytest.mark.nightly) for widths in ALIKE_WIDTHS],
    ],
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
    grid = grid_of(model.tensors[model.outputs[0]])
    assert (grid.qmin, grid.qmax) == (config.activation.qmin, config.activation.qmax)


@pytest.mark.versions
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


@pytest.mark.versions
def test_a_batch_norm_behind_a_mask():
    """Its batch statistics leave out what is masked; its running ones have no mask."""

    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train=False):
            x = nn.BatchNorm(not train, momentum=0.0)(nn.Dense(6)(x), mask=mask)
            return nn.Dense(3)(nn.relu(x))

    mask = jnp.array([[True], [True], [False], [False]])
    qmodel, variables, _ = observed(Masked(), X, mask)
    mutable = ["batch_stats", "quant_stats"]
    _, kept = qmodel.apply(variables, X, mask, train=True, mutable=mutable)
    late = sq.QuantSpec(quant_delay=9), sq.QuantSpec.weight(quant_delay=9)
    unrounded = sq.SimQAT(sq.SimQATConfig(activation=late[0], weight=late[1])).apply(Masked())
    stats = [
        unrounded.apply(variables, x, mask, train=True, mutable=mutable)[1]["batch_stats"]
        for x in (X, jnp.where(mask, X, 100.0))
    ]
    assert_same(*stats)
    variables |= kept
    model = sq.convert(qmodel, variables, X, mask)
    assert_same(model(X, mask), qmodel.apply(variables, X, mask))
    assert_same(model(X, ~mask), model(X, mask))


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


# Bad input ---------------------------------------------------------------------------------------


def test_average_pooling_of_half_precision():
    def body(x):
        x = nn.avg_pool(nn.Conv(8, (3, 3), dtype=jnp.bfloat16)(x), (2, 2), (2, 2))
        return nn.Conv(3, (1, 1), dtype=jnp.bfloat16)(x)

    qmodel, variables, evaluate = trained(case(body, (8, 8, 8, 4), 0, 0))
    x = jax.random.normal(KEY, (8, 8, 8, 4))
    assert_same(sq.convert(qmodel, variables, x)(x), evaluate(variables, x))


def test_inputs_of_the_wrong_shape_or_type():
    model = converted(case(lambda x: nn.Dense(3)(nn.Dense(4)(x)), (4, 6), 0, 0))
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


class Loss(nn.Module):
    """Returns a loss: a function of codes, summed in float."""

    function: staticmethod

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32)(x))
        mean, log = nn.Dense(4)(x), nn.Dense(4)(x)
        return -0.5 * jnp.mean(jnp.sum(1 + log - mean**2 - self.function(log), axis=-1))


@pytest.mark.parametrize("function", [jnp.square, jnp.exp])
def test_a_loss_is_that_of_evaluation(function):
    """But for its last digit, in one batch of some."""
    batches = jax.random.normal(KEY, (20, 64, 16))
    qmodel, variables, _ = observed(Loss(function), batches[0])
    evaluate = jax.jit(lambda v, x: qmodel.apply(v, x))
    model = sq.convert(qmodel, variables, batches[0])
    for x in batches:
        np.testing.assert_allclose(model(x), evaluate(variables, x), rtol=3e-7, atol=0)


def test_float_parts_are_shown():
    qmodel, variables, _ = observed(Model(lambda x: jax.lax.cumsum(nn.Dense(3)(x), 1)), X)
    text = str(sq.convert(qmodel, variables, X))
    assert "lax.cumsum (float)" in text and "operations, 1 of them in float" in text
    model = Model(lambda x: nn.Dense(2)(nn.Dense(3)(x)))
    qmodel = sq.SimQAT(sq.SimQATConfig(exclude=("Dense_1",))).apply(model)
    variables = qmodel.init(KEY, X)
    variables["params"]["Dense_1"]["bias"] = jnp.arange(3.0)  # held whole: no two are the same
    _, updates = qmodel.apply(variables, X, mutable=["quant_stats"])
    converted = sq.convert(qmodel, {**variables, **updates}, X)
    kinds = [op.kind for op in converted.ops]
    assert kinds == ["lax.dot_general", "lax.add", "quantize", "dense"]
    assert [op.path for op in converted.program.float_ops] == [
        "Dense_1/dot_general",
        "Dense_1/add",
    ]
    excluded = sum(a.nbytes for a in jax.tree.leaves(variables["params"]["Dense_1"]))
    constants = (tensor.value for tensor in converted.tensors)
    assert sum(value.nbytes for value in constants if value is not None) == excluded
    assert converted.nbytes > excluded
