"""How a model may be called: keywords, random keys, intermediates, immutable ranges, NNX."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import EXPORTS, assert_same, by_turns

import simqat_jax as sq

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
IMAGE = jax.random.normal(jax.random.key(2), (4, 8, 8, 3))
MASK = jnp.array([1.0, 0.0, 1.0, 1.0])[:, None]


def observed(model, *args, config=None, mutable=("quant_stats", "batch_stats"), **kwargs):
    qmodel = sq.SimQAT(config).apply(model)
    variables = qmodel.init({"params": KEY, "dropout": KEY}, *args, **kwargs)
    _, updates = qmodel.apply(
        variables, *args, **kwargs, rngs={"dropout": KEY}, mutable=list(mutable)
    )
    return qmodel, {**variables, **updates}


# Keywords --------------------------------------------------------------------------------------


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, *, x, mask):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)) * mask)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x, *, z, also=None, train=False):
        x = jnp.concatenate([nn.Dense(4)(x), nn.Dense(4)(z["b"]), nn.Dense(4)(z["a"])], -1)
        return nn.Dense(3)(x) if also is None else nn.Dense(3)(x) + nn.Dense(3)(also)


KEYWORD_CALLS = {
    "all": (Keywords(), (), {"x": X, "mask": MASK * jnp.ones(8)[None]}),
    "of a positional argument": (nn.Dense(3), (), {"inputs": X}),
    "some": (Mixed(), (X,), {"z": {"a": 2 * X, "b": 1 - X}}),
    "some more": (Mixed(), (X,), {"z": {"b": 2 * X, "a": 1 - X}, "also": -X}),
}


@pytest.mark.parametrize(("name", "backend"), by_turns(KEYWORD_CALLS))
def test_arrays_by_keyword(name, backend, tmp_path):
    model, args, kwargs = KEYWORD_CALLS[name]
    qmodel, variables = observed(model, *args, config=sq.SimQATConfig(backend=backend), **kwargs)
    want = qmodel.apply(variables, *args, **kwargs)
    assert "Dense" in str(qmodel.plan(variables, *args, **kwargs)) or name.startswith("of a")
    integer = sq.convert(qmodel, variables, *args, **kwargs)
    integer.save(tmp_path / "model")
    for one in (integer, sq.IntegerModel.load(tmp_path / "model")):
        assert_same(one(*args, **kwargs), want)
        half = jax.tree.map(lambda x: x[:2], (args, kwargs))
        assert_same(one(*half[0], **half[1]), want[:2])
        codes = one.quantize(*args, **kwargs)
        assert_same(one.dequantize(one.run_codes(codes)), want)
    path = tmp_path / f"model.{backend}"
    EXPORTS[backend](integer, path)
    found = sq.verify(integer, path, *jax.tree.leaves((args, kwargs)))
    assert found.codes and not found.differing


@pytest.mark.parametrize(
    "wrong", [{"x": X}, {"x": X, "mask": MASK, "more": X}, {"y": X, "mask": MASK}, {}]
)
def test_other_keywords_are_an_error(wrong):
    model, _, kwargs = KEYWORD_CALLS["all"]
    integer = sq.convert(*observed(model, **kwargs), **kwargs)
    with pytest.raises(ValueError, match="by keyword for mask, x"):
        integer(**wrong)
    with pytest.raises(ValueError, match="by keyword for mask, x"):
        integer(X, MASK)


def test_keywords_of_a_model_that_has_none():
    integer = sq.convert(*observed(nn.Dense(3), X), X)
    with pytest.raises(ValueError, match="no keyword arguments"):
        integer(inputs=X)


# Random keys -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, key=None, extra=None):
        if key is not None:
            x = x + 0.1 * jax.random.normal(key, x.shape)
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    "args, kwargs, where",
    [
        ((X, KEY), {}, "argument 1 "),
        ((X,), {"key": KEY}, "keyword argument key "),
        ((X, None, {"rngs": [KEY]}), {}, "argument 2/rngs/0 "),
        ((X,), {"extra": {"a": jax.random.split(KEY, 4)}}, "keyword argument extra/a "),
    ],
)
def test_a_random_key_as_argument_is_refused_by_name(args, kwargs, where):
    qmodel, variables = observed(Noisy(), *args, **kwargs)
    y: Any = qmodel.apply(variables, *args, **kwargs)
    assert y.shape == (4, 3)
    with pytest.raises(ValueError, match=f"{where}is a random key"):
        sq.convert(qmodel, variables, *args, **kwargs)
    sq.convert(qmodel, variables, X)  # the remedy


class Drawing(nn.Module):
    """Adds noise in training, and returns a loss."""

    in_evaluation: bool = False

    @nn.compact
    def __call__(self, x, key, train=True):
        x = nn.relu(nn.Dense(4)(x))
        if train or self.in_evaluation:
            x = x + 0.1 * jax.random.normal(jax.random.split(key)[1], x.shape)
        x = x + nn.Dense(4)(x)
        return nn.Dense(3)(x), jnp.square(x).mean()


@pytest.mark.parametrize("raw", [True, False])
def test_a_key_as_argument_is_no_array_of_examples(raw):
    """Losses beside it stay float, and evaluation finds the ranges of training."""
    key = jax.random.PRNGKey(0) if raw else KEY
    qmodel, variables = observed(Drawing(), X, key)
    assert not [name for name in variables["quant_stats"] if "mean" in name]
    (y, _) = qmodel.apply(variables, X, key, train=False)
    model = sq.convert(qmodel, variables, X, None, train=False)  # the remedy
    np.testing.assert_array_equal(y, model(X, None)[0])


@pytest.mark.parametrize("in_evaluation", [True, False])
def test_a_key_of_plain_numbers_is_refused_as_others_are(in_evaluation):
    key = jax.random.PRNGKey(0)
    qmodel, variables = observed(Drawing(in_evaluation), X, key)
    with pytest.raises(ValueError, match=r"argument 1 is a random key \(uint32\)"):
        sq.convert(qmodel, variables, X, key, train=False)


def test_a_key_made_of_an_argument_is_in_no_file(tmp_path):
    class Seeded(nn.Module):
        @nn.compact
        def __call__(self, x, seed):
            x = nn.Dense(4)(x) + jax.random.normal(jax.random.key(seed[0]), (4, 4))
            return nn.Dense(3)(x)

    seed = jnp.zeros(4, int)
    qmodel, variables = observed(Seeded(), X, seed)
    model = sq.convert(qmodel, variables, X, seed)
    with pytest.raises(ValueError, match=r"random_seed: random numbers .*key<fry>"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# Intermediates ---------------------------------------------------------------------------------


class Features(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        self.sow("intermediates", "stem", x)
        x = nn.Sequential([nn.Conv(8, (3, 3)), nn.gelu])(x)
        return nn.Dense(3)(x.mean((1, 2)))

    def twice(self, x):
        return self(x) * 2.0


def dense_only(module, method):
    return isinstance(module, nn.Dense) and method == "__call__"


@pytest.mark.parametrize("which", [True, dense_only, lambda m, name: m.name == "Conv_0"])
@pytest.mark.parametrize("method", [None, "twice", Features.twice])
def test_intermediates_are_those_of_float(which, method):
    """Names and structure; and the outputs of the model are what they are without."""
    model = Features()
    qmodel = sq.SimQAT().apply(model)
    variables = qmodel.init(KEY, IMAGE, method=method)
    for _ in range(2):
        _, updates = qmodel.apply(variables, IMAGE, method=method, mutable=["quant_stats"])
        variables = {**variables, **updates}
    options = {"capture_intermediates": which, "mutable": ["intermediates"], "method": method}
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    _, want = model.apply(floats, IMAGE, **options)
    y, got = qmodel.apply(variables, IMAGE, **options)
    assert jax.tree.structure(got) == jax.tree.structure(dict(want))
    assert_same(y, qmodel.apply(variables, IMAGE, method=method))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.abs(a - b).max() < 0.05 * jnp.abs(b).max()
    jitted = jax.jit(lambda v, x: qmodel.apply(v, x, **options))(variables, IMAGE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jitted[1], got
    )


def test_intermediates_of_training_have_a_gradient():
    """As distillation takes them; ranges are observed as without."""
    qmodel = sq.SimQAT().apply(Features())
    variables = qmodel.init(KEY, IMAGE)
    mutable = ["quant_stats", "batch_stats"]

    def loss(params):
        given = {**variables, "params": params}
        _, updates = qmodel.apply(
            given, IMAGE, True, capture_intermediates=True, mutable=[*mutable, "intermediates"]
        )
        hidden = updates["intermediates"]["Conv_1"]["__call__"][0]
        return jnp.square(hidden).sum(), updates

    gradient, updates = jax.grad(loss, has_aux=True)(variables["params"])
    assert jnp.abs(gradient["Conv_1"]["kernel"]).max() > 0
    assert jnp.abs(gradient["Conv_0"]["kernel"]).max() > 0
    _, want = qmodel.apply(variables, IMAGE, True, mutable=mutable)
    assert_same(updates["quant_stats"], want["quant_stats"])


def test_intermediates_make_their_collection_mutable():
    qmodel, variables = observed(Features(), IMAGE)
    y, updates = qmodel.apply(variables, IMAGE, capture_intermediates=True)  # as Flax returns them
    assert set(updates) == {"intermediates"}
    assert_same(y, qmodel.apply(variables, IMAGE))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2)(x, x)


def sowing(next_fun, args, kwargs, context):
    if isinstance(context.module, nn.MultiHeadDotProductAttention):
        kwargs = {**kwargs, "sow_weights": True}
    return next_fun(*args, **kwargs)


def test_an_interceptor_sows_the_attention_weights_of_the_integer_model():
    x = jax.random.normal(KEY, (4, 5, 8))
    qmodel, variables = observed(Attention(), x)
    with nn.intercept_methods(sowing):
        y, updates = qmodel.apply(variables, x, mutable=["intermediates"])
    (weights,) = jax.tree.leaves(updates)
    assert weights.shape == (4, 2, 5, 5)
    program = sq.convert(qmodel, variables, x).program
    (softmax,) = [op for op in program.ops if op.kind == "softmax"]
    outputs = (*program.outputs, *softmax.outputs)
    integer = sq.IntegerModel(dataclasses.replace(program, outputs=outputs, structure=[0, 1]))
    assert_same([y, weights], integer(x))


# Ranges that stand still -----------------------------------------------------------------------


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4)(x)
        mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
        if train:
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0)
        return nn.Dense(3)(x - mean.value[None])


@pytest.mark.parametrize("model, x", [(Features(), IMAGE), (OwnNorm(), X)])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_float_loop_that_leaves_ranges_immutable(model, x, wrap):
    qmodel, variables = observed(model, x)

    def step(mutable):
        return lambda v: qmodel.apply(v, x, train=True, mutable=mutable)

    with pytest.raises(ValueError, match=r"mutable=\['batch_stats', 'quant_stats'\]"):
        wrap(step(["batch_stats"]))(variables)
    _, updates = wrap(step(["batch_stats", "quant_stats"]))(variables)
    assert updates["quant_stats"]["step"] == 2
    wrap(lambda v: qmodel.apply(v, x, mutable=["batch_stats"]))(variables)  # nothing changes


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("cache", "count", jnp.zeros, ())
        count.value = count.value + 1.0
        return nn.Dense(3)(x)


def test_other_state_may_change_in_evaluation():
    """A decoder's cache, for instance."""
    qmodel, variables = observed(Cached(), X, mutable=["quant_stats", "cache"])
    _, updates = qmodel.apply(variables, X, mutable=["cache"])
    assert updates["cache"]["count"] == variables["cache"]["count"] + 1


# NNX -------------------------------------------------------------------------------------------


class OwnNnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 3, rngs=rngs)


@pytest.mark.parametrize(
    "module",
    [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), OwnNnx(nnx.Rngs(0)), nnx.Linear, OwnNnx],
)
def test_an_nnx_module_is_refused(module):
    with pytest.raises(TypeError, match=r"flax.linen alone, and \w+ is one of flax.nnx"):
        sq.SimQAT().apply(module)
