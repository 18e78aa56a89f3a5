"""Softmax, products of two tensors and lookups are one node each, as models write them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import EXPORTS, ONE_BY_DAY, observed
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (4, 6, 8))
IDS = jnp.array([[1, 2, 3, 0], [7, 7, 0, 0]])


def rows(model, x):
    qmodel = sq.SimQAT().apply(model)
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), x))
    return qmodel.plan(variables, x).rows


def attention(scores=lambda w: w, scale=lambda q, k: jnp.einsum("bqd,bkd->bqk", q, k)):
    """Attention of one head, with scores of its own."""

    def call(x):
        q, k, v = (nn.Dense(8)(x) for _ in range(3))
        weights = nn.softmax(scores(scale(q, k)))
        return nn.Dense(2)(jnp.einsum("bqk,bkd->bqd", weights, v))

    return Model(call)


CAUSAL = jnp.tril(jnp.ones((6, 6), bool))[None]
ATTENTION = {
    "plain": attention(),
    "query divided": attention(scale=lambda q, k: jnp.einsum("bqd,bkd->bqk", q / jnp.sqrt(8.0), k)),
    "both scaled": attention(scale=lambda q, k: jnp.einsum("bqd,bkd->bqk", q * 0.5, 0.7 * k)),
    "scores scaled": attention(scale=lambda q, k: (q @ k.swapaxes(1, 2)) * 8**-0.5),
    "causal": attention(lambda w: jnp.where(CAUSAL, w, -1e9)),
    "left out": attention(lambda w: jnp.where(~CAUSAL, jnp.finfo(w.dtype).min, w)),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_two_products_and_a_softmax(name):
    found = [row.kind for row in rows(ATTENTION[name], X)]
    assert [kind for kind in found if kind not in ("dense", "pass")].count("matmul") == 2
    assert found.count("softmax") == 1
    assert not {"mul", "elementwise", "float", "add"}.intersection(found)


def exp_over_sum(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "function",
    [nn.softmax, exp_over_sum, lambda x: (e := jnp.exp(x)) / e.sum(-1, keepdims=True)],
    ids=["nn.softmax", "by hand", "without a maximum"],
)
def test_a_softmax_is_one_node(function):
    found = [row.kind for row in rows(Model(lambda x: function(nn.Dense(4)(x))), X)]
    assert found[1:] == ["softmax"]


def rms(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (nn.softmax, "softmax"),
        (exp_over_sum, "softmax"),
        (nn.log_softmax, "log_softmax"),
        (lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True), "log_softmax"),
        (rms, "norm"),
        (nn.standardize, "norm"),
    ],
)
def test_sums_in_float32_between_half_precision(function, kind, dtype):
    def body(x):
        return nn.Dense(3, dtype=dtype)(function(nn.Dense(4, dtype=dtype)(x)))

    assert [row.kind for row in rows(Model(body), X)] == ["dense", kind, "dense"]


def test_a_sum_along_another_axis_makes_no_softmax():
    """On squares, its shape fits as well."""

    def turned(x):
        e = jnp.exp(x[:, :, :6])
        return e / e.sum(-1)[:, None, :]

    assert "softmax" not in [row.kind for row in rows(Model(lambda x: turned(nn.Dense(8)(x))), X)]


# Masks that are added ---------------------------------------------------------------------------

TOKENS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0], [8, 0, 0, 0, 0, 0], [2] * 6])
ALIBI = -0.5 * jnp.abs(jnp.arange(6.0)[:, None] - jnp.arange(6.0)[None])[None]
FUTURE = np.triu(np.full((1, 6, 6), -1e9, np.float32), 1)


def from_ids(*masked):
    """Attention on tokens; in each layer whole numbers, 0 and 1, mask its scores in a way."""

    def call(ids):
        x, mask = nn.Embed(10, 8)(ids), (ids > 0).astype(jnp.int32)[:, None, :]
        for layer in masked:
            q, k, v = (nn.Dense(8)(x) for _ in range(3))
            x = nn.softmax(layer(q @ k.swapaxes(1, 2), mask)) @ v
        return nn.Dense(2)(x)

    return Model(call)


DISTANCES = np.arange(6)[:, None] - np.arange(6) + 5


def learned():
    """Biases of relative positions, from a table."""
    return nn.Embed(11, 1)(DISTANCES)[None, ..., 0]


ADDED = {
    "of whole numbers": lambda w, m: w + (1.0 - m.astype(w.dtype)) * -10000.0,
    "subtracted": lambda w, m: w - 1e9 * (1.0 - m),
    "divided": lambda w, m: w + (m - 1.0) / 1e-6,
    "converted last": lambda w, m: w + (1 - m) * -10000,
    "selected": lambda w, m: w + jnp.where(m > 0, 0.0, jnp.finfo(w.dtype).min),
    "a constant": lambda w, m: w + FUTURE,
    "infinite": lambda w, m: w + jnp.triu(jnp.full((6, 6), -jnp.inf), 1)[None],
    "a sum of two": lambda w, m: w + (FUTURE + jnp.where(m == 0, -1e9, 0.0)),
    "one behind the other": lambda w, m: (w + FUTURE) - 1e4 * (1 - m),
    "behind a selection": lambda w, m: jnp.where(m == 0, -1e9, w + FUTURE),
    "near for a grid, far for exp": lambda w, m: w + jnp.where(m > 0, -1e4, -1e4 + 900.0),
    "of 100": lambda w, m: w + (1.0 - m) * -100.0,
    "distances in it": lambda w, m: w + jnp.where(CAUSAL, ALIBI, -jnp.inf),
    "distances in a sum": lambda w, m: w + (ALIBI + FUTURE),
    "distances behind it": lambda w, m: jnp.where(CAUSAL, w, -1e9) - jnp.abs(ALIBI),
    "learned ones beside it": lambda w, m: w + (learned() + FUTURE),
    "a number beside both": lambda w, m: w + ((learned() + FUTURE) + 1.0),
    "learned ones in it": lambda w, m: w + jnp.where(CAUSAL, learned(), -1e9),
    "learned ones behind it": lambda w, m: jnp.where(m == 0, -1e9, w) + learned(),
    "selected twice": lambda w, m: jnp.where(CAUSAL, jnp.where(m == 0, -1e9, w), -jnp.inf),
}


@pytest.mark.parametrize("name", ADDED)
def test_numbers_far_apart_are_a_mask(name):
    found = [row.kind for row in rows(from_ids(ADDED[name]), TOKENS)]
    assert found.count("softmax") == 1
    assert found.count("matmul") == 2


@pytest.mark.parametrize(
    "biased",
    [
        lambda w, m: w + jnp.where(m > 0, 0.0, -1.0),
        lambda w, m: w + jnp.where(m > 0, -1e4, -1e4 + 80.0),
        lambda w, m: w + (1.0 - m) * -50.0,
        lambda w, m: w + 40 * ALIBI,
        lambda w, m: w - 1e9 * jnp.exp(1.0 * m),
        lambda w, m: w + 1e9 * (m * jnp.tanh(w)),
        lambda w, m: w + (1e6 * jnp.sin(1.0 * m)).astype(jnp.int32),
        lambda w, m: w + (100 * m).astype(bool).astype(w.dtype),
        lambda w, m: w + (100 * m).astype(jnp.int8).astype(w.dtype),
        lambda w, m: w - 1e9 * (m.swapaxes(1, 2) * 1.0) @ (m * 1.0),
        lambda w, m: w + (learned() - 1e9 * m.swapaxes(1, 2) * jnp.tanh(1.0 * m)),
    ],
    ids=[
        "of one",
        "near",
        "of 50",
        "distances that reach far",
        "an exponential",
        "of scores",
        "cut to integers",
        "truth values",
        "integers that wrap",
        "a product",
        "beside learned ones",
    ],
)
def test_other_numbers_are_none(biased):
    found = [row.kind for row in rows(from_ids(biased), TOKENS)]
    assert "softmax" not in found


LEARNED = {
    "of distances": lambda w: w + ALIBI,
    "distances taken off": lambda w: (w - jnp.abs(ALIBI)) / 2.0,
    "of a table": lambda w: w + learned(),
    "of rows of a table": lambda w: w + nn.Embed(11, 1)(DISTANCES.ravel()).reshape(1, 6, 6),
    "scaled scores": lambda w: learned() + w / 3.0,
    "scores scaled by more than biases may have": lambda w: learned() + w / 128.0,
    "behind a mask": lambda w: jnp.where(CAUSAL, w + learned(), -1e9),
    "two": lambda w: w + learned() + nn.Dense(6)(w),
}


BIASED = (
    LEARNED["behind a mask"],
    LEARNED["of distances"],
    lambda w: w + (learned() + (ALIBI + FUTURE)),
    lambda w: w + jnp.where(CAUSAL, learned(), -jnp.inf),
)


def windows(x, low=-100.0):
    """Attention in two windows, of which one is masked in parts, as shifted windows are."""
    q, k, v = (nn.Dense(8)(x).reshape(-1, 3, 8) for _ in range(3))
    parts = jnp.array([[0, 0, 0], [1, 1, 2]])
    mask = jnp.where(parts[:, None] == parts[..., None], 0.0, low)
    scores = (q @ k.swapaxes(1, 2)).reshape(-1, 2, 3, 3) + mask[None]
    return nn.Dense(2)((nn.softmax(scores.reshape(-1, 3, 3)) @ v).reshape(-1, 6, 8))


@pytest.mark.parametrize("low", [-100.0, -1e4, -jnp.inf])
def test_a_mask_in_front_of_a_reshape(low):
    found = [row.kind for row in rows(Model(lambda x: windows(x, low)), X)]
    assert found.count("softmax") == 1
    assert not {"float", "add"}.intersection(found)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_biases_are_added_to_codes(name):
    found = [row.kind for row in rows(attention(LEARNED[name]), X)]
    assert found.count("softmax") == 1
    assert "add" in found
    assert "float" not in found


@pytest.mark.parametrize("backend", ONE_BY_DAY)
def test_biases_have_the_codes_of_evaluation_and_files(backend, tmp_path):
    """Learned ones and distances, with masks and without, for any number of examples."""
    config = sq.SimQATConfig(backend=backend, activation=sq.QuantSpec(observer="minmax"))
    model = Model(lambda x: [layer(x) for layer in (*map(attention, BIASED), windows)])
    qmodel, variables, _ = observed(model, X, config=config)
    y = jnp.stack(jax.jit(qmodel.apply)(variables, X))
    floats = jnp.stack(jax.jit(model.apply)({"params": variables["params"]}, X))
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    integer = sq.convert(qmodel, variables, X)
    assert not integer.program.float_ops
    np.testing.assert_array_equal(jnp.stack(integer(X)), y)
    np.testing.assert_array_equal(jnp.stack(integer(X[:3])), y[:, :3])
    path = tmp_path / f"model.{backend}"
    EXPORTS[backend](integer, path)
    assert sq.verify(integer, path, X).differing == 0


@pytest.mark.parametrize("backend", ONE_BY_DAY)
def test_added_masks_have_the_codes_of_evaluation_and_files(backend, tmp_path):
    """Also of a sentence of nothing but padding, and their numbers are in no range."""
    config = sq.SimQATConfig(backend=backend, activation=sq.QuantSpec(observer="minmax"))
    masks = [ADDED[name] for name in ("of whole numbers", "one behind the other")]
    model, ids = from_ids(*masks), TOKENS.at[3].set(0)
    qmodel, variables, _ = observed(model, ids, config=config)
    y = jax.jit(qmodel.apply)(variables, ids)
    floats = jnp.asarray(model.apply({"params": variables["params"]}, ids))[:3]
    assert jnp.linalg.norm(y[:3] - floats) < 0.05 * jnp.linalg.norm(floats)
    integer = sq.convert(qmodel, variables, ids)
    np.testing.assert_array_equal(integer(ids), y)
    path = tmp_path / f"model.{backend}"
    EXPORTS[backend](integer, path)
    found = sq.verify(integer, path, ids)
    assert (found.codes, found.differing) == (y.size, 0)
    assert not any("exp" in part for part in found.float_parts)


def test_an_added_mask_of_nothing():
    """Beside -1e4 a score has digits, beside -1e9 none, as in float."""

    def call(x):
        return [
            attention(lambda w, lowest=lowest: w + jnp.full((1, 6, 6), lowest))(x)
            for lowest in (-1e4, -1e9)
        ]

    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    qmodel, variables, _ = observed(Model(call), X, config=config)
    floats = Model(call).apply({"params": variables["params"]}, X)
    pairs = zip(qmodel.apply(variables, X), floats, strict=True)
    for y, want in (map(jnp.asarray, pair) for pair in pairs):
        assert jnp.linalg.norm(y - want) < 0.05 * jnp.linalg.norm(want)


def test_masked_scores_that_are_returned_keep_a_softmax_float():
    """They hold -1e9, beside which a grid has no digits."""

    def call(x):
        scores = jnp.where(CAUSAL, nn.Dense(6)(x), -1e9)
        return nn.softmax(scores), scores

    assert "softmax" not in [row.kind for row in rows(Model(call), X)]


@pytest.mark.parametrize("name", ["query divided", "causal", "left out"])
def test_attention_keeps_its_function_and_its_codes(name):
    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    model = ATTENTION[name]
    qmodel, variables, _ = observed(model, X, config=config)
    floats = model.apply({"params": variables["params"]}, X)
    y = jax.jit(qmodel.apply)(variables, X)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    integer = sq.convert(qmodel, variables, X)
    np.testing.assert_array_equal(integer(X), y)
    assert not integer.program.float_ops


def test_a_mask_of_nothing_is_a_mean():
    """As in float: all numbers are the lowest one."""
    mask = jnp.zeros((1, 6, 6), bool)
    model = attention(lambda w: jnp.where(mask, w, -1e9))
    config = sq.SimQATConfig(activation=sq.QuantSpec(observer="minmax"))
    qmodel, variables, _ = observed(model, X, config=config)
    y = jnp.asarray(qmodel.apply(variables, X))
    floats = jnp.asarray(model.apply({"params": variables["params"]}, X))
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)


class Tied(nn.Module):
    """A table that is looked up in, and multiplied with."""

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(9, 8)
        return table.attend(nn.Dense(8)(table(ids)))


def test_a_lookup_has_codes_from_ids():
    qmodel, variables, _ = observed(Tied(), IDS)
    assert [row.kind for row in rows(Tied(), IDS)].count("lookup") == 1
    y = jax.jit(qmodel.apply)(variables, IDS)
    integer = sq.convert(qmodel, variables, IDS)
    np.testing.assert_array_equal(integer(IDS), y)
    gradient = jax.grad(
        lambda p: jnp.sum(jnp.asarray(qmodel.apply({**variables, "params": p}, IDS)))
    )
    assert jnp.any(gradient(variables["params"])["Embed_0"]["embedding"][7])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.einsum("bd,bk->dk", x, x[:, :3]) + x.sum(),
        lambda x: nn.softmax(x, axis=0),
        lambda x: -0.5 * (x @ x.T),
        lambda x: nn.LayerNorm(reduction_axes=0)(x),
    ],
    ids=["products", "softmax", "negative", "norm"],
)
def test_what_mixes_examples_has_the_codes_of_evaluation(function):
    """Over the batch, or scaled by a number below zero."""
    model = Model(lambda x: nn.Dense(3)(function(nn.Dense(8)(x))))
    qmodel, variables, _ = observed(model, X[:, 0])
    y = jax.jit(qmodel.apply)(variables, X[:, 0])
    np.testing.assert_array_equal(sq.convert(qmodel, variables, X[:, 0])(X[:, 0]), y)


def test_a_number_between_two_products_belongs_to_one():
    def linear(x):
        q, k, v = (nn.Dense(8)(x) for _ in range(3))
        return nn.Dense(2)(((q @ k.swapaxes(1, 2)) / 2.0) @ (v * 0.5))

    qmodel, variables, _ = observed(Model(linear), X)
    y = jax.jit(qmodel.apply)(variables, X)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, X)(X), y)


def test_a_maximum_along_another_axis_stays():
    def other(x):
        e = jnp.exp(x - x.max(1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    model = Model(lambda x: other(nn.Dense(8)(x)))
    qmodel, variables, _ = observed(model, X)
    floats = jnp.asarray(model.apply({"params": variables["params"]}, X))
    assert jnp.abs(jnp.asarray(qmodel.apply(variables, X)) - floats).max() < 0.05


@pytest.mark.parametrize("mode", ["clip", "fill", None])
def test_ids_beyond_the_table(mode):
    """As in evaluation, so in the integer model."""

    class Table(nn.Module):
        @nn.compact
        def __call__(self, ids):
            t = self.param("t", nn.initializers.normal(1.0), (4, 8))
            return nn.Dense(2)(t[ids] if mode is None else jnp.take(t, ids, axis=0, mode=mode))

    qmodel, variables, _ = observed(Table(), jnp.array([[0, 1, 2, 3]]))
    integer = sq.convert(qmodel, variables, jnp.array([[0, 1, 2, 3]]))
    ids = jnp.array([[0, 5, 99, -1], [-9, -4, 4, 2]])
    np.testing.assert_array_equal(integer(ids), jax.jit(qmodel.apply)(variables, ids))


# Position tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_of", [4, 5])
def test_a_sequence_longer_than_its_position_table_is_an_error(rows_of):
    def positioned(ids):
        return nn.Dense(3)(
            nn.Embed(10, 8)(ids) + nn.Embed(rows_of, 8)(np.arange(ids.shape[1]))[None]
        )

    message = rf"Embed_1/gather: it picks row 5 of a table of {rows_of} rows.* sequence shorter"
    with pytest.raises(ValueError, match=message):
        rows(Model(positioned), TOKENS)
    assert rows(Model(positioned), TOKENS[:, :rows_of])


def test_rows_beyond_a_table_that_are_selected_away_are_no_error():
    def guarded(ids):
        inside = np.arange(6)[:, None] < 4
        positions = jnp.where(inside, nn.Embed(4, 8)(np.arange(6)), 0)
        return nn.Dense(3)(nn.Embed(10, 8)(ids) + positions[None])

    assert rows(Model(guarded), TOKENS)


# Products of one example ------------------------------------------------------------------------

SCALED = {
    "divided": lambda q, k: q @ k / 2.0,
    "multiplied": lambda q, k: (q @ k) * 0.3,
    "rows divided": lambda q, k: (q / 2.0) @ k,
    "columns multiplied": lambda q, k: q @ (k * 0.3),
}


@pytest.mark.parametrize("name", SCALED)
def test_products_of_one_example_have_the_ranges_of_several(name):
    """`jnp.matmul` leaves out a batch axis of length 1."""

    def attending(x):
        q, k, v = (nn.Dense(8)(x) for _ in range(3))
        return nn.Dense(3)(nn.softmax(SCALED[name](q, k.swapaxes(1, 2))) @ v)

    qmodel, variables, _ = observed(Model(attending), X)
    integer = sq.convert(qmodel, variables, X)
    np.testing.assert_array_equal(qmodel.apply(variables, X[:1]), integer(X[:1]))
    np.testing.assert_array_equal(qmodel.apply(variables, X)[:1], integer(X[:1]))
