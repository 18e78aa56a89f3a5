"""Sums divided by how much a mask leaves in: means of codes, of any function of a count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_files_agree, by_half, observed
from zoo import Model

import simqat_jax as sq

IDS = jnp.array([[3, 1, 4, 1, 0, 0], [2, 7, 1, 8, 2, 8], [1, 0, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0]])


def behind(of_words):
    """A layer behind a mean of words, given where they are."""
    return Model(lambda ids: nn.Dense(4)(of_words(nn.Dense(5)(nn.Embed(9, 8)(ids)), ids > 0)))


def kept(x, m):
    return x * m[..., None]


def number(m):
    return m.astype(jnp.float32).sum(1, keepdims=True)


def widened(x, m):
    """As sentences are pooled: the mask is repeated along the features."""
    wide = jnp.broadcast_to(m[..., None], x.shape).astype(x.dtype)
    return (x * wide).sum(1) / jnp.clip(wide.sum(1), 1e-9, None)


MEANS = {
    "a count": lambda x, m: kept(x, m).sum(1) / number(m),
    "whole numbers": lambda x, m: kept(x, m).sum(1) / m.sum(1)[:, None],
    "at least one": lambda x, m: kept(x, m).sum(1) / jnp.maximum(number(m), 1),
    "a little more": lambda x, m: kept(x, m).sum(1) / (number(m) + 1e-3),
    "one for none": lambda x, m: kept(x, m).sum(1) / jnp.where(m.sum(1) == 0, 1, m.sum(1))[:, None],
    "widened": widened,
    "where": lambda x, m: jnp.mean(x, 1, where=m[..., None]),
    "kept axes": lambda x, m: kept(x, m).sum(1, keepdims=True) / number(m)[..., None],
    "the inverse": lambda x, m: kept(x, m).sum(1) * (1 / number(m)),
    "a root": lambda x, m: kept(x, m).sum(1) / jnp.sqrt(number(m)),
    "weighted": lambda x, m: jnp.einsum("blc,bl->bc", x, m.astype(jnp.float32)) / number(m),
    "behind a clamp": lambda x, m: nn.relu(kept(x, m).sum(1) / number(m)),
    "of lengths": lambda x, m: (
        jnp.where((w := jnp.arange(6)[None] < m.sum(1)[:, None])[..., None], x, 0).sum(1)
        / w.sum(1, keepdims=True)
    ),
    "neighbours": lambda x, m: (
        ((a := m[:, :, None] & m[:, None]).astype(jnp.float32) @ x) / (a.sum(2, keepdims=True) + 1)
    ).sum(1),
    "of both axes": lambda x, m: kept(x, m).sum((1, 2))[:, None] / (5 * number(m)),
}


@pytest.mark.parametrize("name", by_half(MEANS, 1))
def test_means_of_what_a_mask_leaves_are_integers(name, tmp_path):
    model = behind(MEANS[name])
    config = sq.SimQATConfig(float_parts="refuse", activation=sq.QuantSpec(observer="minmax"))
    qmodel, variables, _ = observed(model, IDS, config=config)
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(qmodel.apply(variables, IDS[:1]), y[:1])
    assert_files_agree(qmodel, variables, tmp_path, IDS)


def test_the_mean_of_nothing_is_zero(tmp_path):
    """It is NaN in the float model; codes have none."""
    model = behind(MEANS["a count"])
    qmodel, variables, _ = observed(model, IDS)
    nothing = jnp.zeros_like(IDS)
    assert jnp.isnan(model.apply({"params": variables["params"]}, nothing)).all()
    np.testing.assert_array_equal(qmodel.apply(variables, nothing), 0)
    assert_files_agree(qmodel, variables, tmp_path, nothing)


OTHERS = {
    "another mask counts": lambda x, m: kept(x, m).sum(1) / number(~m + 0),
    "counts along the batch": lambda x, m: kept(x, m).sum(1) / m.sum(),
    "counts plus what is learned": lambda x, m: (
        kept(x, m).sum(1) / (number(m) + jnp.abs(nn.Dense(1)(x[:, 0])))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_divisors_give_what_the_model_gives(name):
    model = behind(OTHERS[name])
    ids = jnp.concatenate([IDS[:1], IDS[2:]])
    qmodel, variables, _ = observed(model, ids)
    y = qmodel.apply(variables, ids)
    floats = model.apply({"params": variables["params"]}, ids)
    assert jnp.linalg.norm(y - floats) < 0.1 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, ids)(ids), y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32])
def test_a_mask_of_numbers_is_compared_first(dtype, tmp_path):
    """What numbers are, nobody knows: their mean is a float part. That of truth values is none."""

    def body(ids, mask, compared):
        m = mask > 0 if compared else mask
        return nn.Dense(4)(kept(nn.Embed(9, 5)(ids), m).sum(1) / m.sum(1, keepdims=True))

    mask = (IDS > 0).astype(dtype)
    config = sq.SimQATConfig(float_parts="refuse")
    qmodel, variables, _ = observed(Model(lambda *args: body(*args, False)), IDS, mask)
    assert sq.convert(qmodel, variables, IDS, mask).program.float_ops
    qmodel = sq.SimQAT(config).apply(Model(lambda *args: body(*args, False)))
    with pytest.raises(ValueError, match="float_parts"):
        sq.convert(qmodel, variables, IDS, mask)
    qmodel, variables, _ = observed(Model(lambda *args: body(*args, True)), IDS, mask)
    floats = [op.kind for op in sq.convert(qmodel, variables, IDS, mask).program.float_ops]
    assert floats == (["lax.gt"] if dtype == jnp.float32 else [])
    assert_files_agree(qmodel, variables, tmp_path, IDS, mask)
