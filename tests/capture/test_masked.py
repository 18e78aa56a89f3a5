"""What masks leave out is zero, and the rest keeps its codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_files_agree, by_half, observed
from steps import planned
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.compound import Masked
from simqat_jax.ir.graph import Contraction

IDS = jnp.array([[3, 1, 4, 1, 0, 0], [2, 7, 1, 8, 2, 8], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
LAST_THREE = np.repeat([[[0.0], [1.0]]], 3, 1).astype(np.float32)


def behind(of_words):
    """A layer behind what is made of words, given where they are."""
    return Model(lambda ids: nn.Dense(4)(of_words(nn.Dense(5)(nn.Embed(9, 8)(ids)), ids > 0)))


FORMS = {
    "multiplied": lambda x, m: x * m[..., None],
    "from the left": lambda x, m: m[..., None].astype(jnp.float32) * x,
    "the others": lambda x, m: x * (1.0 - m.astype(jnp.float32))[..., None],
    "two masks": lambda x, m: x * (m.astype(jnp.float32) * jnp.flip(m, 1))[..., None],
    "where": lambda x, m: jnp.where(m[..., None], x, 0.0),
    "where not": lambda x, m: jnp.where(m[..., None], 0.0, x),
    "summed": lambda x, m: jnp.where(m[..., None], x, 0).sum(1),
    "highest": lambda x, m: (nn.relu(x) * m[..., None]).max(1),
    "weighted": lambda x, m: jnp.einsum("blc,bl->bc", x, m.astype(jnp.float32)),
    "weighted, in front": lambda x, m: jnp.einsum("bl,blc->bc", m.astype(jnp.float32), x),
    "weighted, turned": lambda x, m: jnp.einsum(
        "lbc,bl->bc", x.transpose(1, 0, 2), m.astype(jnp.float32)
    ),
    "weighted heads": lambda x, m: jnp.einsum(
        "bhlc,bl->bhc", jnp.stack([x, -x], 1), m.astype(jnp.float32)
    ),
    "weighted rows": lambda x, m: (m.astype(jnp.float32)[:, None] @ x)[:, 0],
    "known": lambda x, m: x * LAST_THREE,
}


@pytest.mark.parametrize("name", by_half(FORMS))
def test_what_is_left_keeps_its_codes(name, tmp_path):
    """Also one example of a batch, an example of no words, and one of nothing but words."""
    model = behind(FORMS[name])
    qmodel, variables, _ = observed(model, IDS, config=sq.SimQATConfig(float_parts="refuse"))
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(qmodel.apply(variables, IDS[1:2]), y[1:2])
    assert_files_agree(qmodel, variables, tmp_path, IDS)


LEFT = IDS[:3]
EXTREMES = {
    "a low number": lambda x, m: jnp.where(m[..., None], x, -1e9).max(1),
    "infinity": lambda x, m: jnp.where(m[..., None], x, -jnp.inf).max(1),
    "added": lambda x, m: (x + (1 - m[..., None].astype(jnp.float32)) * -1e4).max(1),
    "taken off": lambda x, m: (x - (1 - m[..., None].astype(jnp.float32)) * 1e5).max(1),
    "where": lambda x, m: jnp.max(x, 1, where=m[..., None], initial=-1e9),
    "lowest": lambda x, m: jnp.where(m[..., None], x, 1e9).min(1),
    "turned": lambda x, m: jnp.where(m[..., None], x, -1e9).transpose(0, 2, 1).max(-1),
    "windows": lambda x, m: nn.max_pool(jnp.where(m[..., None], x, -1e9), (5,), (1,))[:, 0],
}


@pytest.mark.parametrize("name", by_half(EXTREMES, 1))
def test_extremes_of_what_is_left_are_integers(name, tmp_path):
    """On a grid that reaches to -1e9 they would all be one code."""
    model = behind(EXTREMES[name])
    config = sq.SimQATConfig(float_parts="refuse")
    qmodel, variables, _ = observed(model, LEFT, config=config)
    y = jax.jit(qmodel.apply)(variables, LEFT)
    floats = model.apply({"params": variables["params"]}, LEFT)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    assert_files_agree(qmodel, variables, tmp_path, LEFT)
    assert_files_agree(qmodel, variables, tmp_path, IDS)


def test_the_highest_of_nothing_is_the_lowest_code():
    """It is -1e9 in the float model."""
    model = Model(lambda ids: EXTREMES["a low number"](nn.Dense(5)(nn.Embed(9, 8)(ids)), ids > 0))
    qmodel, variables, _ = observed(model, IDS)
    y = qmodel.apply(variables, IDS)
    lowest = qmodel.plan(variables, IDS).quantizers["Dense_0/output"].lo
    np.testing.assert_allclose(y[3], lowest, rtol=0.01)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, IDS)(IDS), y)


class Token(nn.Module):
    """Words that are left out become one that is learned."""

    @nn.compact
    def __call__(self, ids):
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 5))
        return nn.Dense(4)(jnp.where((ids > 0)[..., None], nn.Dense(5)(nn.Embed(9, 8)(ids)), token))


def recurrent(x, m):
    """States stay where there is no word."""
    state, layer = jnp.zeros((len(x), 5)), nn.Dense(5)
    for t in range(6):
        state = jnp.where(m[:, t, None], nn.tanh(layer(x[:, t] + state)), state)
    return state


CHOICES = {
    "a number": behind(lambda x, m: jnp.where(m[..., None], x, 0.5)),
    "a learned token": Token(),
    "two layers": behind(lambda x, m: jnp.where(m[..., None], x, nn.Dense(5)(x))),
    "a recurrence": behind(recurrent),
    "known places": behind(lambda x, m: jnp.where(LAST_THREE > 0, x, nn.relu(x))),
}


@pytest.mark.parametrize("name", by_half(CHOICES))
def test_choices_between_tensors_are_those_between_codes(name, tmp_path):
    model = CHOICES[name]
    qmodel, variables, _ = observed(model, IDS, config=sq.SimQATConfig(float_parts="refuse"))
    assert not qmodel.plan(variables, IDS).floats
    y = jax.jit(qmodel.apply)(variables, IDS)
    floats = model.apply({"params": variables["params"]}, IDS)
    assert jnp.linalg.norm(y - floats) < 0.05 * jnp.linalg.norm(floats)
    np.testing.assert_array_equal(sq.convert(qmodel, variables, IDS)(IDS), y)
    assert_files_agree(qmodel, variables, tmp_path, IDS)


def masked(body, *shapes):
    """How many masks leave something out in a model."""
    return sum(isinstance(step.node, Masked) for step in planned(body, *shapes).steps)


def test_only_what_is_made_of_inputs_masks():
    """What compares what a layer computed is a function of it; weights of many are a product."""
    shape = (2, 5, 4)
    assert masked(lambda x, m: nn.Dense(3)(x) * (m > 0), shape, (2, 5, 1)) == 1
    assert masked(lambda x: nn.relu(nn.Dense(3)(x)) * (nn.Dense(3)(x) > 0), shape) == 0
    assert masked(lambda x: jnp.where((y := nn.Dense(3)(x)) > 0, y, 0), shape) == 0
    assert masked(lambda x, m: nn.Dense(3)(x) * jnp.where(m > 0, 2.0, 0.0), shape, (2, 5, 1)) == 0
    assert masked(lambda x, m: nn.Dense(3)(x) * m, shape, (2, 5, 1)) == 0


def test_weights_of_several_sums_stay_a_product():
    def body(x, m):
        return jnp.einsum("blc,bkl->bkc", nn.Dense(3)(x), (m > 0).astype(jnp.float32))

    steps = planned(body, (2, 5, 4), (2, 3, 5)).steps
    assert not any(isinstance(step.node, Masked | Contraction) for step in steps)


def test_gradients_are_those_of_the_product():
    model = behind(FORMS["multiplied"])
    qmodel, variables, _ = observed(model, IDS)

    def loss(apply, params):
        rest = {k: v for k, v in variables.items() if k != "params"}
        return jnp.square(apply({"params": params, **rest}, IDS)).sum()

    got = jax.grad(lambda p: loss(qmodel.apply, p))(variables["params"])
    want = jax.grad(lambda p: loss(lambda v, x: model.apply({"params": v["params"]}, x), p))(
        variables["params"]
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.linalg.norm(a - b) < 0.1 * jnp.linalg.norm(b) + 1e-6
