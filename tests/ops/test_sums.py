"""Sums and means of codes, against NumPy's on integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import observed
from steps import codes_of, grid, random, step_of
from zoo import Model

import simqat_jax as sq
from simqat_jax.ir.graph import Mean
from simqat_jax.ir.program import grid_of

X, Y = grid(0.05, 77), grid(0.031, 120)


def wanted(sums, divisor):
    multiplier = np.float32(X.scale) / np.float32(np.float32(Y.scale) * np.float32(divisor))
    codes = np.rint(sums.astype(np.float32) * multiplier.astype(np.float32))
    return np.clip(codes + Y.zero_point, 0, 255) - Y.zero_point


@pytest.mark.parametrize(
    ("body", "divisor"),
    [
        (lambda x: x.mean((1, 2)), 30),
        (lambda x: x.sum((1, 2)), 1),
        (lambda x: x.sum((1, 2)) / 7.0, 7),
        (lambda x: x.mean(2), 5),
    ],
)
def test_sums_along_axes(body, divisor):
    step = step_of(Mean, lambda x: body(nn.Dense(3)(x)), (2, 6, 5, 4))
    x = random((2, 6, 5, 3), X)
    axes = tuple((step.node.parts[0] if step.node.parts else step.node).eqn.params["axes"])
    sums = np.asarray(x.codes, int).sum(axes)
    np.testing.assert_array_equal(codes_of(step, [x], Y), wanted(sums, divisor))


@pytest.mark.parametrize("counted", [True, False])
def test_sums_of_windows(counted):
    """Where padding does not count, each has a divisor of its own."""

    def body(x):
        given = {"padding": "SAME", "count_include_pad": counted}
        return nn.avg_pool(nn.Dense(3)(x), (3, 3), (2, 2), **given)

    step, x = step_of(Mean, body, (2, 6, 5, 4)), random((2, 6, 5, 3), X)
    padded = np.zeros((2, 7, 7, 3), int)
    padded[:, :6, 1:6] = np.asarray(x.codes, int)
    inside = np.zeros((7, 7), int)
    inside[:6, 1:6] = 1
    spots = [(slice(i, i + 3), slice(j, j + 3)) for i in (0, 2, 4) for j in (0, 2, 4)]
    sums = np.stack([padded[:, i, j].sum((1, 2)) for i, j in spots], 1).reshape(2, 3, 3, 3)
    counts = np.array([9 if counted else inside[spot].sum() for spot in spots])
    others = [] if counted else [jnp.asarray(counts.reshape(1, 3, 3, 1), jnp.float32)]
    got = codes_of(step, [x], Y, others)
    np.testing.assert_array_equal(got, wanted(sums, counts.reshape(1, 3, 3, 1)))


def test_sums_that_int32_does_not_hold_have_no_codes():
    step = step_of(Mean, lambda x: nn.Dense(3)(x).sum(1), (1, 40000, 4))
    wide = grid(0.05, 77, 16)
    for length, fits in ((2**15, True), (2**15 + 1, False)):
        assert (codes_of(step, [random((1, length, 3), wide)], Y) is not None) == fits
    assert codes_of(step, [None], Y) is None


POOL = {"window_shape": (3, 3), "strides": (2, 2), "padding": "SAME"}
FORMS = {
    "mean": (lambda x: x.mean((1, 2)), 30.0),
    "sum": (lambda x: x.sum((1, 2)), 1.0),
    "divided": (lambda x: x.sum((1, 2)) / jnp.array([[1.0, 2.0, 4.0]]), 0.0),
    "pooled": (lambda x: nn.avg_pool(x, **POOL), 9.0),
    "padding left out": (lambda x: nn.avg_pool(x, **POOL, count_include_pad=False), 0.0),
}


def test_operations_of_the_program_are_those_of_whole_numbers():
    """Their counts tell a file whether one number divides all sums."""

    def body(x):
        return {name: form(x) for name, (form, _) in FORMS.items()} | {"layer": nn.Dense(2)(x)}

    x = jax.random.uniform(jax.random.key(0), (2, 6, 5, 3), minval=-1.0, maxval=2.0)
    qmodel, variables, _ = observed(Model(body), x)
    model = sq.convert(qmodel, variables, x)
    assert not model.program.float_ops
    given = grid_of(model.tensors[model.inputs[0]])
    codes = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3)).astype(np.uint8)
    got, real = model.run_codes(codes), given.dequantize(codes)
    made = {i: op for op in model.ops for i in op.outputs}
    for name, i in zip(model.program.output_names(), model.outputs, strict=True):
        if name in FORMS:
            form, count = FORMS[name]
            on = grid_of(model.tensors[i])
            want = np.clip(np.asarray(form(real), float) / on.scale + on.zero_point, 0, 255)
            np.testing.assert_allclose(got[name], want, atol=0.502, err_msg=name)
            assert made[i].attributes["count"] == count
