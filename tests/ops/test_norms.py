"""Norms of codes are those of real numbers, to a rounding, where their sums are exact."""

import flax.linen as nn
import numpy as np
import pytest
from single_operations import operation
from steps import codes_of, grid, random, step_of

from simqat_jax.ir.compound import Norm
from simqat_jax.numerics.norms import MOST_ELEMENTS
from simqat_jax.numerics.rounding import ROUNDINGS
from simqat_jax.ops.norms import Normalize

X, Y = grid(0.05, 120), grid(0.03, 131)
RNG = np.random.default_rng(0)
SCALE, BIAS = RNG.normal(1, 0.4, 12).astype(np.float32), RNG.normal(size=12).astype(np.float32)


def layer_norm(x):
    return nn.LayerNorm(epsilon=1e-3)(nn.Dense(12)(x))


def rms_norm(x):
    return nn.RMSNorm(epsilon=1e-3)(nn.Dense(12)(x))


def group_norm(x):
    return nn.GroupNorm(num_groups=4, epsilon=1e-3)(nn.Dense(12)(x))


def no_epsilon(x):
    return nn.LayerNorm(epsilon=0.0)(nn.Dense(12)(x))


def normalized(x, axes, centered):
    mean = x.mean(axes, keepdims=True) if centered else 0
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-3)


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("body", [layer_norm, rms_norm, group_norm])
def test_codes_are_those_of_real_numbers(body, backend):
    step, x = step_of(Norm, body, (2, 5, 4)), random((2, 5, 12), X)
    real = np.asarray(x.codes, float) * X.scale
    if body is group_norm:
        real = normalized(real.reshape(2, 5, 4, 3), (1, 3), True).reshape(2, 5, 12)
    else:
        real = normalized(real, (2,), body is layer_norm)
    others = [SCALE] if body is rms_norm else [SCALE, BIAS]
    want = real * SCALE + (0 if body is rms_norm else BIAS)
    got = codes_of(step, [x], Y, others, backend)
    np.testing.assert_allclose(got, np.clip(want / Y.scale + 131, 0, 255) - 131, atol=0.501)


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
def test_equal_codes_are_the_bias_even_without_epsilon(backend):
    step = step_of(Norm, no_epsilon, (2, 5, 4))
    x = random((2, 5, 1), X)
    x = x._replace(codes=np.broadcast_to(x.codes, (2, 5, 12)))
    got = codes_of(step, [x], Y, [SCALE, BIAS], backend)
    np.testing.assert_array_equal(
        got, np.broadcast_to(np.rint(BIAS / np.float32(Y.scale)), got.shape)
    )


def test_codes_and_lengths_for_which_sums_are_exact():
    step = step_of(Norm, layer_norm, (2, 5, 4))
    given = [SCALE, BIAS]
    assert codes_of(step, [random((2, 5, 12), grid(0.05, 9, 9))], Y, given) is None
    assert codes_of(step, [None], Y, given) is None
    squares = 2**31 // 255**2
    for body, most in ((layer_norm, MOST_ELEMENTS), (rms_norm, squares)):
        step = step_of(Norm, body, (2, 5, 4))
        for length, fits in ((most, True), (most + 1, False)):
            ones = [np.ones(length, np.float32)] * len(step.node.affine)
            got = codes_of(step, [random((1, 1, length), X)], Y, ones)
            assert (got is not None) == fits


@pytest.mark.parametrize("rounding", ROUNDINGS.values(), ids=ROUNDINGS)
def test_a_file_that_names_no_guard_has_none(rounding):
    """As of format 3, before there was one."""
    given = {"axes": (1,), "groups": 0, "centered": True, "epsilon": 0.5, "clamp": (0, 255)}
    op = operation(rounding.norm.kind, (0,), (1,), given)
    assert isinstance(op, Normalize)
    assert op.guard == (0.5, None, None)
