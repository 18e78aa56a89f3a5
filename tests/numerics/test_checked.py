"""What is wrong in a call of the numerics is said by name; what is right costs no correctness."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.numerics import affine, observers

SPEC, STATE = sq.QuantSpec(), sq.init_range()
X = jnp.linspace(-1, 1, 12).reshape(4, 3)
NORM = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
STATS = {"mean": jnp.zeros(3), "var": jnp.ones(3)}

CALLS = {
    sq.quant_params: {"lo": -1.0, "hi": 1.0, "spec": SPEC},
    sq.quantize: {"x": X, "scale": 0.1, "zero_point": 3, "spec": SPEC, "channel_axis": -1},
    sq.dequantize: {"codes": np.arange(6), "scale": 0.1, "zero_point": 3, "channel_axis": -1},
    sq.fake_quant: {"x": X, "lo": -1.0, "hi": 1.0, "spec": SPEC, "channel_axis": -1},
    sq.init_range: {"num_channels": 3, "nonnegative": False},
    sq.observe: {"state": STATE, "x": X, "spec": SPEC, "channel_axis": -1},
    sq.observed: {"state": STATE},
    sq.update_range: {"state": STATE, "lo": -1.0, "hi": 1.0, "spec": SPEC},
    sq.fold_batch_norm: {
        "kernel": jnp.ones((2, 3)),
        "bias": jnp.ones(3),
        "bn_params": NORM,
        "bn_stats": STATS,
        "epsilon": 1e-3,
    },
    sq.Grid: {"scale": 0.1, "zero_point": 3, "qmin": 0, "qmax": 255},
    sq.nonfinite_ranges: {"quant_stats": {"input": STATE}},
}
"""Each function, and arguments that are right."""

OF_NO_USE = [
    None,
    "text",
    object(),
    {"a": 1},
    np.array(["a"]),
    1j,
    sq.QuantSpec,
    jax.random.key(0),
    [[1], [2, 3]],
]
"""What is an argument of none of them, but None for some and a dictionary for others."""
OPTIONAL = {"num_channels", "channel_axis", "bias"}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_arguments_of_the_wrong_type_are_named(function):
    good = CALLS[function]
    function(**good)
    for name in good:
        for value in OF_NO_USE:
            if (value is None and name in OPTIONAL) or (isinstance(value, dict) and "_" in name):
                continue
            with pytest.raises(TypeError, match=rf"\b{name}\b.*got "):
                function(**good | {name: value})


DETAILS = [
    (sq.quantize, {"scale": 0.0}, ValueError, "scale must be finite and above 0.* got 0:"),
    (sq.quantize, {"scale": -0.1}, ValueError, "got -0.1: .*quant_params makes one"),
    (sq.quantize, {"scale": np.nan}, ValueError, "got nan"),
    (sq.quantize, {"scale": np.float64(1e300)}, ValueError, "got inf"),
    (sq.quantize, {"scale": 1e-42}, ValueError, "or more in float32"),
    (sq.quantize, {"scale": np.array([1, 1, 0])}, ValueError, "got 0:"),
    (sq.quantize, {"zero_point": 0.5}, TypeError, "zero_point must hold codes"),
    (sq.quantize, {"zero_point": 256}, ValueError, "zero_point must be a code, 0 to 255, got 256"),
    (sq.quantize, {"channel_axis": 1.0}, TypeError, "channel_axis must be the number of an axis"),
    (sq.quantize, {"channel_axis": True}, TypeError, "channel_axis must be the number of an axis"),
    (sq.dequantize, {"codes": np.array([0.5])}, TypeError, "codes must hold codes"),
    (sq.dequantize, {"scale": np.inf}, ValueError, "scale must be finite"),
    (sq.fake_quant, {"x": [0, 1]}, TypeError, "x must hold numbers of a floating-point type"),
    (sq.fake_quant, {"lo": 2.0}, ValueError, "lo must not be above hi, got lo 2 and hi 1"),
    (sq.fake_quant, {"hi": np.nan}, ValueError, "lo and hi must be finite, got lo -1 and hi nan"),
    (sq.quant_params, {"lo": 2.0}, ValueError, "lo must not be above hi"),
    (sq.quant_params, {"lo": -np.inf}, ValueError, "lo and hi must be finite, got lo -inf"),
    (sq.quant_params, {"hi": np.inf}, ValueError, "as observe does"),
    (sq.update_range, {"lo": 3.0}, ValueError, "lo must not be above hi, got lo 3 and hi 1"),
    (sq.update_range, {"lo": np.zeros(2)}, ValueError, r"lo of shape \(2,\)"),
    (sq.update_range, {"state": STATE._asdict()}, TypeError, r"RangeState\(\*\*state\)"),
    (sq.observe, {"x": np.zeros((0, 3))}, ValueError, "x is an empty array"),
    (sq.init_range, {"num_channels": 0}, ValueError, "num_channels .* 1 or more"),
    (sq.init_range, {"num_channels": 2.0}, TypeError, "num_channels must be a whole number"),
    (sq.init_range, {"nonnegative": 1}, TypeError, "nonnegative must be True or False"),
    (sq.fold_batch_norm, {"kernel": 2.0}, ValueError, "kernel must have output channels"),
    (sq.fold_batch_norm, {"bias": np.ones(2)}, ValueError, r"'bias of the layer' has shape \(2,\)"),
    (sq.fold_batch_norm, {"bn_params": {"gamma": np.ones(3)}}, ValueError, "bn_params .*'gamma'"),
    (sq.fold_batch_norm, {"bn_stats": {"mean": np.ones(3)}}, ValueError, "holds no 'var'"),
    (sq.fold_batch_norm, {"bn_stats": STATS | {"var": -np.ones(3)}}, ValueError, "'var'.* 0 or"),
    (sq.fold_batch_norm, {"epsilon": -1e-3}, ValueError, "epsilon must be 0 or more, got -0.001"),
    (sq.fold_batch_norm, {"epsilon": np.ones(3)}, ValueError, "epsilon must be a single number"),
    (sq.Grid, {"scale": 0.0}, ValueError, "scale must be finite"),
    (sq.Grid, {"zero_point": 300}, ValueError, "zero_point must be a code, 0 to 255"),
    (sq.Grid, {"qmax": 0}, ValueError, "qmin must be below qmax.* got qmin 0 and qmax 0"),
    (sq.Grid, {"qmax": 10**30}, ValueError, "at most 16 bits"),
    (sq.Grid, {"qmin": 0.0}, TypeError, "qmin must be a whole number"),
]


@pytest.mark.parametrize("function, wrong, kind, message", DETAILS)
def test_values_that_are_wrong_are_named_with_a_remedy(function, wrong, kind, message):
    with pytest.raises(kind, match=message):
        function(**CALLS[function] | wrong)


def test_the_empty_range_and_batches_without_numbers_are_no_mistakes():
    assert sq.quant_params(np.inf, -np.inf, SPEC).scale == 1
    assert sq.quant_params(0.0, -np.inf, SPEC).scale == 1
    assert sq.update_range(STATE, np.nan, np.inf, SPEC).nonfinite == 1
    assert not np.any(sq.fake_quant(X, np.inf, -np.inf, SPEC) != sq.fake_quant(X, 0.0, 0.0, SPEC))


def test_traced_values_pass_and_types_are_still_checked():
    """No concrete value is there to check; what comes out is what it was."""
    scale, zero_point = jax.jit(lambda lo, hi: sq.quant_params(lo, hi, SPEC))(2.0, 1.0)
    codes = jax.jit(lambda x, s, z: sq.quantize(x, s, z, SPEC))(X, 0.0, 999)
    assert codes.shape == X.shape and scale.shape == zero_point.shape == ()
    gradient = jax.grad(lambda x, lo: sq.fake_quant(x, lo, 1.0, SPEC).sum())(X, -1.0)
    np.testing.assert_array_equal(gradient, jnp.ones_like(X))
    jax.jit(sq.update_range, static_argnums=3)(STATE, 3.0, 1.0, SPEC)
    jax.jit(lambda scale: sq.Grid(scale, 3, 0, 255).quantize(X))(0.1)
    jax.jit(lambda a: sq.quantize(X, [a, a, a], [0, 0, 0], SPEC))(0.1)
    with pytest.raises(TypeError, match="spec must be a QuantSpec"):
        jax.jit(lambda x: sq.fake_quant(x, -1.0, 1.0, "int8"))(X)


def test_compiled_functions_hold_no_checks():
    """As they are computed without them: a training step pays nothing."""
    for checked, plain in (
        (sq.fake_quant, affine.fake_quant),
        (sq.observe, lambda x, lo, hi: observers.observe(STATE, x, SPEC)),
    ):
        if checked is sq.observe:
            checked = lambda x, lo, hi: sq.observe(STATE, x, SPEC)  # noqa: E731
        else:
            checked, plain = (functools.partial(f, spec=SPEC) for f in (checked, plain))
        texts = [str(jax.make_jaxpr(f)(X, -1.0, 1.0)) for f in (checked, plain)]
        assert texts[0] == texts[1]


def test_messages_stay_short():
    big = np.zeros((1000, 1000), complex)
    with pytest.raises(TypeError) as caught:
        sq.quantize(big, 0.1, 3, SPEC)
    assert re.search(r"got an array of shape \(1000, 1000\) and type complex128", str(caught.value))
    with pytest.raises(TypeError) as caught:
        sq.observed("a" * 10_000)
    assert len(str(caught.value)) < 250
