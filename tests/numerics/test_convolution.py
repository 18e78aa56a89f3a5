"""Convolutions of whole numbers: the same sums on every platform."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import simqat_jax as sq
from simqat_jax.numerics.convolution import by_windows, convolve

NUMBERS = {
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
CASES = [
    {"size": (9,), "kernel": (3,), "into": 4, "out": 5},
    {"size": (9, 8), "kernel": (3, 2), "into": 4, "out": 6, "strides": (2, 3)},
    {
        "size": (9, 8),
        "kernel": (3, 3),
        "into": 6,
        "out": 6,
        "groups": 6,
        "padding": ((1, 1), (0, 2)),
    },
    {"size": (9, 8), "kernel": (2, 3), "into": 6, "out": 9, "groups": 3, "rhs_dilation": (2, 3)},
    {"size": (4, 5), "kernel": (3, 3), "into": 2, "out": 3, "lhs_dilation": (2, 3)},
    {"size": (6, 7), "kernel": (3, 3), "into": 2, "out": 3, "padding": ((-1, 2), (3, -2))},
    {"size": (4, 5, 6), "kernel": (2, 1, 3), "into": 2, "out": 4, "groups": 2},
    {"size": (5, 6), "kernel": (2, 3), "into": 3, "out": 4, "numbers": ("CNWH", "OWIH", "WCNH")},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_windows_are_convolutions(case, dtype):
    rank, groups = len(case["size"]), case.get("groups", 1)
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (2, *case["size"], case["into"])).astype(dtype)
    shape = (*case["kernel"], case["into"] // groups, case["out"])
    kernel = rng.integers(-127, 128, shape).astype(dtype)
    plain, names = NUMBERS[rank], case.get("numbers", NUMBERS[rank])
    x, kernel = (
        a.transpose([have.index(axis) for axis in want])
        for a, have, want in zip((x, kernel), plain, names, strict=False)
    )
    params = {
        "window_strides": case.get("strides", (1,) * rank),
        "padding": case.get("padding", ((0, 0),) * rank),
        "lhs_dilation": case.get("lhs_dilation", (1,) * rank),
        "rhs_dilation": case.get("rhs_dilation", (1,) * rank),
        "dimension_numbers": lax.conv_dimension_numbers(x.shape, kernel.shape, names),
        "feature_group_count": groups,
    }
    sums = np.dtype("int32" if dtype == "int8" else dtype)
    options = {"precision": lax.Precision.HIGHEST, "preferred_element_type": sums}
    whole = lax.conv_general_dilated(x, kernel, **params, **options)
    np.testing.assert_array_equal(by_windows(x, kernel, **params, **options), whole)
    np.testing.assert_array_equal(convolve(x, kernel, sums, **params), whole)


def test_gpu_programs_hold_no_convolution_of_codes():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.BatchNorm(not train)(nn.Conv(4, (3, 3), strides=2)(x)))
            x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
            return nn.Dense(3)(x.mean((1, 2)))

    qmodel, x = sq.SimQAT().apply(Net()), jnp.ones((2, 8, 8, 3))
    variables = qmodel.init(jax.random.key(0), x)
    _, ranges = qmodel.apply(variables, x, train=True, mutable=["quant_stats", "batch_stats"])
    variables = {**variables, **ranges}
    model = sq.convert(qmodel, variables, x)

    def convolutions(function, platform):
        lowered = jax.jit(function).trace(x).lower(lowering_platforms=(platform,))
        return len(re.findall(r"stablehlo\.convolution", lowered.as_text()))

    # Evaluation traces the float layers too, whose results nothing uses.
    for function, unused in ((model, 0), (lambda x: qmodel.apply(variables, x), 2)):
        assert convolutions(function, "cpu") == 2 + unused
        assert convolutions(function, "cuda") == unused


@pytest.mark.parametrize(
    ("side", "into", "out", "as_floats"),
    [(32, 1, 1, True), (33, 1, 1, False), (1, 16, 31, True), (1, 16, 32, False)],
)
def test_codes_of_few_channels_are_summed_in_float32_where_that_is_exact(
    side, into, out, as_floats
):
    """On CPU; 32 x 32 products of -128 and -128 are 2^24."""
    x = jnp.full((1, side, side, into), -128, jnp.int8)
    kernel = jnp.full((side, side, into, out), -128, jnp.int8).at[0, 0, 0, 0].set(-127)
    params = {
        "window_strides": (1, 1),
        "padding": ((0, 0), (0, 0)),
        "lhs_dilation": (1, 1),
        "rhs_dilation": (1, 1),
        "dimension_numbers": lax.conv_dimension_numbers(x.shape, kernel.shape, NUMBERS[2]),
        "feature_group_count": 1,
    }
    traced = jax.jit(lambda x, kernel: convolve(x, kernel, np.int32, **params)).trace(x, kernel)
    sums = traced.lower().compile()(x, kernel)
    want = np.full((1, 1, 1, out), side * side * into * 2**14)
    want[..., 0] -= 128
    np.testing.assert_array_equal(sums, want)
    assert ("f32" in str(traced.jaxpr)) == as_floats
