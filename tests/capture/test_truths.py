"""Masks that are numbers: what attention does with them are selections by truth values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPORTS, by_half, observed
from zoo import Model

import simqat_jax as sq

IDS = jnp.array([[3, 1, 4, 1, 0, 0], [2, 7, 1, 8, 2, 8], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
FUTURE = np.triu(np.full((1, 1, 6, 6), -1e4, np.float32), 1)
CAUSAL = jnp.tril(jnp.ones((6, 6), bool))


def distances():
    """Biases of two heads that are learned for each distance."""
    table = nn.Embed(11, 2)(np.arange(6)[:, None] - np.arange(6) + 5)
    return table.transpose(2, 0, 1)[None]


def pairs(x):
    """Biases of two heads that are computed of the data."""
    return jnp.einsum("bih,bjh->bhij", nn.Dense(2)(x), nn.Dense(2)(x))


def scored(of_scores):
    """Attention of two heads whose scores a function changes, given where words are, and these."""

    def function(ids):
        x = nn.Embed(9, 8)(ids)
        q, k = nn.DenseGeneral((2, 4))(x), nn.DenseGeneral((2, 4))(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        weights = nn.softmax(of_scores(scores, (ids > 0), x))
        return nn.DenseGeneral(3, axis=(-1, -2))(jnp.einsum("bhqk,bkhd->bqhd", weights, q))

    return Model(function)


def as_numbers(words):
    return words.astype(jnp.float32)[:, None, None]


def low(words):
    return (1.0 - as_numbers(words)) * -1e9


def product(words):
    m = words.astype(jnp.float32)
    return (m[:, :, None] * m[:, None])[:, None]


MASKED = {
    "a product": lambda w, m, x: jnp.where(product(m) == 0, -1e9, w),
    "what is left": lambda w, m, x: jnp.where(1 - product(m) > 0.5, -1e9, w),
    "half precision": lambda w, m, x: jnp.where(as_numbers(m).astype(jnp.bfloat16) != 0, w, -1e9),
    "low numbers": lambda w, m, x: w + low(m),
    "of whole numbers": lambda w, m, x: w + (1 - m.astype(jnp.int32)[:, None, None]) * -1e9,
    "taken off": lambda w, m, x: w + (as_numbers(m) - 1) * 1e9,
    "chosen": lambda w, m, x: w + jnp.where(m[:, None, None], 0, jnp.finfo(jnp.float32).min / 2),
    "of ten thousand": lambda w, m, x: w + (1 - as_numbers(m)) * -1e4,
    "two of ten thousand": lambda w, m, x: (w + jnp.where(m[:, None, None], 0, -1e4)) + FUTURE,
    "two of low numbers": lambda w, m, x: w + (jnp.where(CAUSAL, 0.0, -1e9)[None, None] + low(m)),
    "beside learned biases": lambda w, m, x: w + (distances() + low(m)),
    "beside biases of data": lambda w, m, x: w + (pairs(x) + low(m)),
    "in front of biases of data": lambda w, m, x: (w + low(m)) + pairs(x),
}


def flax_mask(ids):
    words = ids > 0
    mask = nn.combine_masks(nn.make_causal_mask(ids), nn.make_attention_mask(words, words))
    return nn.MultiHeadDotProductAttention(2)(nn.Embed(9, 8)(ids), mask=mask)


MODELS = {"Flax's own": Model(flax_mask), **{name: scored(f) for name, f in MASKED.items()}}


@pytest.mark.parametrize("name", by_half(MODELS))
def test_masks_of_numbers_leave_no_float_part(name, tmp_path):
    config = sq.SimQATConfig(float_parts="refuse", activation=sq.QuantSpec(observer="minmax"))
    model = MODELS[name]
    qmodel, variables, _ = observed(model, IDS, config=config)
    integer = sq.convert(qmodel, variables, IDS)
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(integer(IDS), y)
    np.testing.assert_array_equal(integer(IDS[:3]), y[:3])
    EXPORTS["tflite"](integer, tmp_path / "model.tflite")
    assert sq.verify(integer, tmp_path / "model.tflite", IDS).differing == 0


NONE = {
    "two thresholds": lambda w, m: jnp.where(0.5 * as_numbers(m) + 1.0 > 2.0, -1e9, w),
    "near levels": lambda w, m: w + (as_numbers(m) + 0.5) * -2.0,
    "high numbers": lambda w, m: w + as_numbers(m) * 1e9,
}


@pytest.mark.parametrize("name", NONE)
def test_numbers_that_are_no_mask_give_what_the_model_gives(name):
    model = scored(lambda w, m, x: NONE[name](w, m))
    qmodel, variables, _ = observed(model, IDS)
    y = qmodel.apply(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.1 * jnp.linalg.norm(floats)
