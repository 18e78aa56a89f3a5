"""Ids, lengths and masks among the features of one float array are read as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_same, observed
from zoo import Model

import simqat_jax as sq

FEATURES = jax.random.normal(jax.random.key(0), (8, 4))
IDS = jnp.asarray([3, 250, 17, 999, 512, 1, 77, 640], jnp.float32)[:, None]
MASK = (jnp.arange(8) % 3 > 0).astype(jnp.float32)[:, None]
X = jnp.concatenate([FEATURES, IDS, MASK], 1)


def embedded(ids):
    return nn.Embed(1000, 4, embedding_init=nn.initializers.normal(1.0))(ids.astype(jnp.int32))


def sliced(x):
    return nn.Dense(3)(x[:, :4]) + nn.Dense(3)(embedded(x[:, 4]))


def split(x):
    features, ids, mask = jnp.split(x, (4, 5), axis=1)
    return nn.Dense(3)(features) + nn.Dense(3)(embedded(ids[:, 0])) * (mask > 0)


def scaled_ids(x):
    return nn.Dense(3)(embedded(jnp.round(x[:, 4] * 0.5))) + nn.Dense(3)(x[:, :4])


def compared(x):
    return jnp.where(x[:, 4:5] >= 512, nn.Dense(3)(x[:, :4]), 0.0)


def also_a_feature(x):
    return nn.Dense(3)(x / 100) + nn.Dense(3)(embedded(x[:, 4]))


def read_whole(x):
    known = jnp.where(jnp.isfinite(x), x, 0.0)
    return nn.Dense(3)(known) * (x[:, 5:] == 1)


@pytest.mark.parametrize("body", [sliced, split, scaled_ids, compared, also_a_feature, read_whole])
def test_ids_and_masks_are_not_rounded(body):
    model = Model(body)
    qmodel, variables, y = observed(model, X)
    floats = model.apply({"params": variables["params"]}, X)
    evaluated = jax.jit(qmodel.apply)(variables, X)
    for result in (y, evaluated):
        assert jnp.linalg.norm(result - floats) < 0.03 * jnp.linalg.norm(floats)
    assert_same(sq.convert(qmodel, variables, X)(X), evaluated)


def test_other_inputs_lie_on_grids_as_before():
    _, variables, _ = observed(Model(lambda x: nn.Dense(3)(x[:, :4]) + nn.Dense(3)(x[:, 4:])), X)
    assert "input" in variables["quant_stats"]


def test_a_feature_that_is_compared_as_well_has_a_grid_behind():
    qmodel, variables, _ = observed(Model(lambda x: nn.Dense(3)(x) * (x[:, :1] > 0)), X)
    assert "input" not in variables["quant_stats"]
    notes = [row.note for row in qmodel.plan(variables, X).rows if row.path.endswith("copy")]
    assert len(notes) == 1 and "quantized for an integer operation" in notes[0]
    assert np.isfinite(qmodel.apply(variables, X)).all()


def test_an_input_that_is_printed_is_no_id():
    def body(x):
        jax.debug.print("{}", x[0, 0])
        return nn.Dense(3)(x)

    _, variables, _ = observed(Model(body), X)
    assert "input" in variables["quant_stats"]
