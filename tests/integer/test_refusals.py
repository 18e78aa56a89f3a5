"""Float parts that are not wanted: all at once, by kind, with a remedy for where they stand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import observed
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (4, 5, 8))
MASK = jnp.arange(8) < 6  # statistics of some elements have no exact form


def body(x):
    x = nn.Dense(8)((x - 0.5) / 0.3)
    for k in range(4):
        x = nn.Dense(8)(nn.LayerNorm(name=f"norm_{k}")(x, mask=MASK))
    return jnp.cumsum(x, -1)


def refused(function):
    config = sq.SimQATConfig(float_parts="refuse")
    qmodel, variables, _ = observed(Model(function), X, config=config)
    with pytest.raises(ValueError) as error:
        sq.convert(qmodel, variables, X)
    return str(error.value)


def test_all_float_parts_are_listed():
    text = refused(body)
    lines = text.splitlines()
    assert len(lines) < 20 and max(map(len, lines)) < 300
    assert "operations have no exact form in integers" in lines[0]
    assert "LayerNorm 4x, computed in float, between layers: norm_0, norm_1, norm_2 and 1" in text
    assert "computed in float, in front of the layers: the model" in text
    assert "computed in float, behind the layers: the model" in text
    assert text.count('float_parts="allow"') == 3


def test_the_remedies_work():
    assert "compute it on the input" in refused(lambda x: nn.Dense(3)(x / 255.0))
    for config, factor in (({"float_parts": "refuse"}, 1.0), ({}, 255.0)):
        model = Model(lambda x, factor=factor: nn.Dense(3)(x if factor == 1 else x / factor))
        qmodel, variables, _ = observed(model, X, config=sq.SimQATConfig(**config))
        paths = [op.path for op in sq.convert(qmodel, variables, X).program.float_ops]
        assert paths == ([] if factor == 1 else ["div"])


def test_what_only_moves_values_is_no_float_part():
    config = sq.SimQATConfig(float_parts="refuse")
    moves = Model(lambda x: nn.Dense(3)(x.reshape(x.shape[0], -1)[:, ::2]))
    qmodel, variables, _ = observed(moves, X, config=config)
    assert not sq.convert(qmodel, variables, X).program.float_ops
