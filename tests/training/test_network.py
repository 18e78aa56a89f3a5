"""The quantized module as a user prints it."""

import copy
import pickle
import warnings

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from models import TwoLayers

import simqat_jax as sq

KEY, X = jax.random.key(0), jnp.ones((4, 5))


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name="first")(x))
        return nn.softmax(jnp.cumsum(TwoLayers(name="inner")(nn.relu(x)), 1))


def test_quantizers_by_layer():
    config = sq.SimQATConfig(rules=[sq.Rule(path="inner", weight=sq.QuantSpec(num_bits=4))])
    qmodel = sq.SimQAT(config).apply(Outer())
    before = str(qmodel)
    assert "weights: 8 bits, symmetric, narrow, per channel, batch" in before
    assert "path='inner'" in before and "after init" in before
    qmodel.init(KEY, X)
    lines = str(qmodel).splitlines()
    assert max(map(len, lines)) <= 80
    first, inner = lines.index("  first: Dense 4 + BatchNorm + relu"), lines.index("  inner")
    assert first < inner
    assert lines[first + 1].startswith("    weight: 8 bits, symmetric")
    assert lines[inner + 1 : inner + 3] == [
        "    Dense_0: Dense 8 + relu",
        "      weight: 4 bits, symmetric, narrow, per channel (axis -1, 8), batch",
    ]
    assert any(line.startswith("    float: ") for line in lines)


def test_a_call_tells_the_layers_as_init_does():
    made = sq.SimQAT().apply(TwoLayers())
    variables = made.init(KEY, X)
    called = sq.SimQAT().apply(TwoLayers())
    jax.jit(lambda v, x: called.apply(v, x, mutable=["quant_stats"]))(variables, X)
    assert str(called) == str(made)
    assert made._repr_html_().startswith("<pre>TwoLayers, quantized: bn_fold=&#x27;")


def test_what_makes_variables_without_init_tells_the_layers():
    floats = TwoLayers().init(KEY, X)
    calibrated, planned = (sq.SimQAT().apply(TwoLayers()) for _ in range(2))
    variables = sq.calibrate(calibrated, floats, [X], progress=False)
    with pytest.raises(flax.errors.ScopeParamShapeError):
        planned.plan(variables, X[:, :-1])
    planned.plan(variables, X)
    assert str(calibrated) == str(planned) and "Dense_0: Dense" in str(planned)


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4)(x))))


def test_a_training_call_with_keys_and_a_method_that_is_no_name():
    qmodel = sq.SimQAT().apply(Dropping())
    variables = qmodel.init(KEY, X)
    layers = str(qmodel)
    assert "Dense 4 + relu" in layers
    again = sq.SimQAT().apply(Dropping())
    options = {"rngs": {"dropout": KEY}, "method": lambda m, x: m(x, train=True)}
    again.apply(variables, X, mutable=["quant_stats"], **options)
    assert "Dense 4 + relu" in str(again)
    assert pickle.loads(pickle.dumps(again)) == qmodel


def test_one_line_that_says_what_it_is():
    config = sq.SimQATConfig(weight_bits=4, exclude=["head", "stem"])
    text = repr(sq.SimQAT(config).apply(TwoLayers()))
    assert text == "QuantizedModule(TwoLayers: 4-bit weights, 8-bit activations, 2 exclusions)"


def test_what_applies_it_says_so_too():
    assert repr(sq.SimQAT()) == "SimQAT(8-bit weights, 8-bit activations)"


def test_copies_are_equal():
    qmodel = sq.SimQAT(sq.SimQATConfig(weight_bits=4)).apply(TwoLayers())
    qmodel.init(KEY, X)
    for copied in (copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        assert copied == qmodel and hash(copied) == hash(qmodel)
        copied.init(KEY, X)
        assert str(copied) == str(qmodel)
    assert qmodel != sq.SimQAT().apply(TwoLayers())


def test_tabulate():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = sq.SimQAT().apply(Outer()).tabulate(KEY, X, console_kwargs={"width": 200})
    assert "inner/Dense_1" in text and "quant_stats" in text
