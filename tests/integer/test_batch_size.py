"""A model that depends on its batch size keeps it; every other one takes any."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from models import ONE_BY_DAY, assert_same, by_turns, export, trained
from zoo import case

import simqat_jax as sq

ROW, TOKENS, IMAGE = (4, 6), (4, 3, 6), (8, 8, 4)


def centered(x):
    h = nn.Dense(5)(x)
    return h - h.mean(0, keepdims=True)


class Vit(nn.Module):
    """A class token in front of the patches and a position table, repeated along the batch."""

    @nn.compact
    def __call__(self, x):
        normal = nn.initializers.normal(1.0)
        token, table = (
            self.param("token", normal, (1, 1, 6)),
            self.param("table", normal, (1, 4, 6)),
        )
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), nn.Dense(6)(x)], 1)
        x = nn.relu(nn.Dense(5)(x + jnp.broadcast_to(table, x.shape)))
        return nn.Dense(3)(x[:, 0])


def class_token(x):
    token = jnp.broadcast_to(jnp.ones((1, 6)), (x.shape[0], 6))
    return nn.Dense(3)(jnp.concatenate([token, nn.Dense(6)(x)], -1))


def rows_above(x):
    rows = jnp.broadcast_to(jnp.linspace(-1, 1, 4), (x.shape[0], 1, x.shape[2], 4))
    return nn.Conv(3, (3, 3))(jnp.concatenate([rows, nn.Conv(4, (3, 3))(x)], 1))


def stacked(x):
    h = nn.Dense(6)(x)
    return jnp.stack([h, jnp.ones_like(h)])


def zeros_behind(x):
    h = nn.Dense(6)(x)
    return nn.Dense(3)(jnp.concatenate([h, np.zeros(h.shape, np.float32)], -1))


def zero_carry(x):
    h = jnp.zeros((x.shape[0], 4))
    for _ in range(2):
        h = nn.relu(nn.Dense(4)(x) + h)
    return h


def queries(x):
    q = jnp.repeat(jnp.linspace(-1, 1, 12).reshape(1, 2, 6), x.shape[0], 0)
    return nn.Dense(3)(nn.Dense(6)(x)[:, :2] * q + jnp.tanh(q))


class Perceiver(nn.Module):
    """Queries attend to the data."""

    @nn.compact
    def __call__(self, x):
        q = jnp.repeat(self.param("q", nn.initializers.normal(1.0), (1, 2, 6)), x.shape[0], 0)
        attention = nn.MultiHeadDotProductAttention(2)
        return nn.Dense(3)(q + attention(nn.LayerNorm()(q), nn.Dense(6)(x)))


class DetrLayer(nn.Module):
    """Queries attend to each other, then to the data."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[0], 2, 6)
        position = jnp.broadcast_to(nn.Embed(2, 6)(jnp.arange(2))[None], shape)
        target = jnp.zeros(shape)
        q = target + position
        target = nn.LayerNorm()(target + nn.MultiHeadDotProductAttention(2)(q, q, target))
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(2)(target + position, nn.Dense(6)(x)))


class Pma(nn.Module):
    """Attention from seeds, its heads by hand."""

    @nn.compact
    def __call__(self, x):
        seeds = self.param("seeds", nn.initializers.normal(1.0), (2, 6))
        seeds = jnp.broadcast_to(seeds, (x.shape[0], 2, 6))
        q, k, v = nn.Dense(6)(seeds), nn.Dense(6)(x), nn.Dense(6)(x)
        q, k, v = (a.reshape(*a.shape[:2], 2, 3).transpose(0, 2, 1, 3) for a in (q, k, v))
        weights = nn.softmax(q @ k.transpose(0, 1, 3, 2) / jnp.sqrt(6.0))
        return nn.Dense(3)((weights @ v).transpose(0, 2, 1, 3).reshape(seeds.shape) + seeds)


def masked(x):
    h = nn.Dense(4)(x)
    mask = jnp.tril(jnp.ones((3, 3), bool))[None].repeat(x.shape[0], 0)
    return nn.softmax(jnp.where(mask, h @ h.transpose(0, 2, 1), -1e9))


def padded_mask(x):
    """A mask of which one column is a constant."""
    h = nn.Dense(4)(x)
    keep = jnp.concatenate([jnp.ones((x.shape[0], 1), bool), x[:, 1:, 0] > 0], 1)
    return nn.softmax(jnp.where(keep[:, None], h @ h.transpose(0, 2, 1), -1e9))


def among_reals(x):
    bounds = jnp.broadcast_to(jnp.linspace(-1, 1, 5), (x.shape[0], 5))
    return nn.Dense(3)(jnp.sort(jnp.concatenate([x / 3, bounds], -1), -1))


def counted(x):
    return nn.Dense(3)(x), jnp.full((x.shape[0], 2), 7), jnp.ones((x.shape[0], 1), bool)


def anchors(x):
    return nn.Dense(3)(x), jnp.broadcast_to(jnp.linspace(0, 1, 4), (x.shape[0], 4))


def numbered(x):
    numbers = jnp.arange(1.0 * x.shape[0])[:, None]
    return nn.Dense(3)(jnp.concatenate([nn.Dense(6)(x), jnp.broadcast_to(numbers, x.shape)], -1))


DEPENDENT = {
    "scaled by it": (lambda x: nn.Dense(3)(nn.Dense(6)(x) * (1.0 / x.shape[0])), ROW),
    "mean over it": (lambda x: nn.Dense(3)(nn.Dense(5)(x).mean(0, keepdims=True)), ROW),
    "mean over all": (lambda x: nn.Dense(6)(x).mean(keepdims=True), ROW),
    "centered": (centered, ROW),
    "unbatched image": (lambda x: nn.Dense(3)(nn.Conv(4, (3, 3))(x).mean((0, 1))), IMAGE),
    "constants that differ along it": (numbered, ROW),
    "a constant counted by it": (lambda x: nn.Dense(3)(x) + jnp.ones_like(x).sum(), ROW),
    "a product of constants that differ": (
        lambda x: nn.Dense(6)(x) + nn.Dense(6)(jnp.cumsum(jnp.ones_like(x), 0)),
        ROW,
    ),
    "halves": (lambda x: jnp.split(nn.Dense(4)(jnp.concatenate([x, -x], 0)), 2), ROW),
    "last example": (lambda x: nn.Dense(3)(nn.Dense(5)(x)[-1]), ROW),
    "float function of it": (lambda x: nn.standardize(nn.Dense(4)(x), axis=0), ROW),
}
FREE = {
    "variance of some": (
        lambda x: nn.Dense(3)(jnp.var(nn.Dense(5)(x), 1, where=x[..., :1] > -1)),
        TOKENS,
    ),
    "edge padding": (
        lambda x: nn.Dense(3)(jnp.pad(nn.Dense(5)(x), ((0, 0), (1, 1)), "edge")),
        ROW,
    ),
    "height": (lambda x: nn.Conv(3, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x))), (8, 8, 3)),
    "mean over positions": (lambda x: nn.Conv(3, (3, 3))(x).mean((1, 2)), (2, 8, 8, 4)),
    "float function": (lambda x: nn.softmax(nn.Dense(4)(x)), ROW),
    "class token and position table": (Vit(), TOKENS),
    "class token": (class_token, ROW),
    "rows above": (rows_above, (4, 5, 5, 3)),
    "stacked with a constant": (stacked, ROW),
    "zeros behind": (zeros_behind, ROW),
    "zero carry": (zero_carry, ROW),
    "learned queries": (queries, TOKENS),
    "a product of constants": (lambda x: nn.Dense(6)(x) + nn.Dense(6)(jnp.ones_like(x)), ROW),
    "attention from queries": (Perceiver(), TOKENS),
    "attention between queries": (DetrLayer(), TOKENS),
    "pooling by attention": (Pma(), TOKENS),
    "a mask in float": (masked, TOKENS),
    "a mask with a constant column": (padded_mask, TOKENS),
    "a constant among real values": (among_reals, ROW),
    "constant output": (anchors, ROW),
    "constant outputs of integers and truth values": (counted, ROW),
}


def converted(body, shape, backend):
    small = case(body, shape, 0, 0)
    qmodel, variables, evaluate = trained(small, sq.SimQATConfig(backend=backend))
    model = sq.convert(qmodel, variables, *small.args)
    return lambda x: evaluate(variables, x), model, small.args[0]


@pytest.mark.parametrize("backend", ONE_BY_DAY)
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


@pytest.mark.parametrize(("name", "backend"), by_turns(FREE, 2))
def test_every_other_model_takes_any(name, backend, tmp_path):
    evaluate, model, x = converted(*FREE[name], backend)
    assert model.tensors[model.inputs[0]].shape == (-1, *x.shape[1:])
    more = jnp.concatenate([x, 0.5 * x, x[:1]])
    assert_same(model(more), evaluate(more))
    path = tmp_path / f"m.{backend}"
    export(model, path)
    file = sq.open_file(path, isolated=False)
    for images in (more, x, x[:1], x[:3]):
        assert_same(file.run([np.asarray(images)]), model(images))


def by_hand(x):
    """Attention with `@`, which leaves out a batch axis of length 1."""
    q, k, v = (nn.Dense(6)(x) for _ in range(3))
    return nn.Dense(2)(nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(6)) @ v)


def squeezed(x):
    """Another result for one example."""
    return jnp.squeeze(nn.Dense(1)(x).mean(1))


def weighted_if_one(x):
    return nn.Dense(2)(nn.Dense(6)(x) * (3 if len(x) == 1 else 2))


@pytest.mark.parametrize(
    ("body", "free"), [(by_hand, True), (squeezed, False), (weighted_if_one, False)]
)
def test_one_example_of_what_computes_otherwise_for_one(body, free):
    evaluate, model, x = converted(body, (1, 3, 6), "tflite")
    assert model.tensors[model.inputs[0]].shape == (-1 if free else 1, 3, 6)
    assert_same(model(x), evaluate(x))
    if free:
        more = jnp.concatenate([x, 0.5 * x, -x])
        assert_same(model(more), evaluate(more))


@pytest.mark.parametrize("backend", ONE_BY_DAY)
@pytest.mark.parametrize(
    "body",
    [Vit(), pytest.param(Perceiver(), marks=pytest.mark.nightly)],
    ids=lambda b: type(b).__name__,
)
def test_a_single_sample_tells_as_much(body, backend, tmp_path):
    """With one example nothing is repeated, and nothing tells constants of examples apart."""
    evaluate, model, x = converted(body, (1, 3, 6), backend)
    assert model.tensors[model.inputs[0]].shape == (-1, 3, 6)
    more = jnp.concatenate([x, 0.5 * x, -x])
    assert_same(model(more), evaluate(more))
    export(model, tmp_path / f"m.{backend}")
    assert sq.verify(model, tmp_path / f"m.{backend}", more).differing == 0
    _, model, x = converted(numbered, (1, 6), backend)
    assert model.tensors[model.inputs[0]].shape == (1, 6)
