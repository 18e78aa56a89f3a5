"""Calls with arguments of other kinds: each error names the argument, the value and the remedy."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq

KEY, X = jax.random.key(0), jnp.ones((2, 4))
QMODEL = sq.SimQAT().apply(nn.Dense(3))


@pytest.mark.parametrize(
    ("rngs", "got"),
    [
        (0, "got 0"),
        (None, "got None"),
        (X, "got an array of shape"),
        ([KEY], r"got \["),
        (np.zeros(2, np.float32), "got an array"),
        ({"params": 0}, "got 0 for 'params'"),
        ({"params": KEY, "dropout": X}, "got an array .* for 'dropout'"),
        ({0: KEY}, "for 0"),
        ({"params": {"kernel": X}}, "for 'params'"),
    ],
)
def test_what_is_no_key(rngs, got):
    message = f"rngs must be a random key, or .*{got}.*Write init"
    for call in (QMODEL.init, QMODEL.init_with_output):
        with pytest.raises(TypeError, match=message):
            call(rngs, X)
    if rngs is not None:
        with pytest.raises(TypeError, match=f"rngs must be a random key, or .*{got}.*Write rngs="):
            QMODEL.plan({}, X, rngs=rngs)
        with pytest.raises(TypeError, match=f"rngs must be a random key, or .*{got}.*Write rngs="):
            QMODEL.apply({}, X, rngs=rngs)


def test_several_keys():
    for rngs in (jax.random.split(KEY), {"params": KEY, "dropout": jax.random.split(KEY)}):
        with pytest.raises(ValueError, match=r"one key .* got 2 .*jax.vmap"):
            QMODEL.init(rngs, X)


def test_keys_of_any_kind():
    want = QMODEL.init(KEY, X)
    keys = jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0))
    for rngs in (*keys, {"params": KEY}, {"params": keys[0], "dropout": keys[1]}):
        jax.tree.map(np.testing.assert_array_equal, QMODEL.init(rngs, X), want)
    mapped: Any = jax.vmap(QMODEL.init, (0, None))(jax.random.split(KEY), X)
    assert mapped["params"]["kernel"].shape == (2, 4, 3)


def test_other_arguments():
    variables = QMODEL.init(KEY, X)
    calls = (
        (lambda **given: QMODEL.init(KEY, X, **given)),
        (lambda **given: QMODEL.apply(variables, X, **given)),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"method must be .*got 3"):
            call(method=3)
        with pytest.raises(ValueError, match=r"method must be one of Dense, .*got 'no_such'"):
            call(method="no_such")
        for mutable in (3, [1], None):
            with pytest.raises(TypeError, match=r"mutable must be .*Write mutable="):
                call(mutable=mutable)
    with pytest.raises(TypeError, match=r"method must be .*got 3"):
        QMODEL.plan(variables, X, method=3)
    with pytest.raises(ValueError, match="method must be one of Dense"):
        QMODEL.plan(variables, X, method="no_such")


def test_a_saved_train_state_is_no_variables():
    saved = {**QMODEL.init(KEY, X), "step": 3, "opt_state": [None]}
    message = r"collections .* 'step' is 3\. Of a saved TrainState pass .*saved\['params'\]"
    for call in (QMODEL.apply, QMODEL.plan, QMODEL.check):
        with pytest.raises(TypeError, match=message):
            call(saved, X)
    for function in (sq.convert, sq.oscillation_damping):
        with pytest.raises(TypeError, match=message):
            function(QMODEL, saved, X)
    for function, model in ((sq.calibrate, QMODEL), (sq.post_training_quantize, nn.Dense(3))):
        with pytest.raises(TypeError, match=message):
            function(model, saved, [X], progress=False)


def test_descriptions_of_arrays():
    variables = QMODEL.init(KEY, X)
    described = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    for call, first in ((QMODEL.init, KEY), (QMODEL.apply, variables)):
        with pytest.raises(TypeError, match=r"takes arrays, got ShapeDtypeStruct.*jnp.zeros"):
            call(first, described)
        jax.eval_shape(call, first, described)


def test_collections_of_any_kind():
    variables = QMODEL.init(KEY, X)
    for mutable in ("quant_stats", {"quant_stats": None}.keys(), nn.DenyList("params"), True):
        _, updates = jax.eval_shape(lambda m=mutable: QMODEL.apply(variables, X, mutable=m))
        assert "quant_stats" in updates


def test_what_was_meant_by_a_model_in_the_place_of_a_config():
    with pytest.raises(TypeError, match=r"got Dense\(.*Write SimQAT\(\)\.apply\(model\)"):
        sq.SimQAT(nn.Dense(3))


def test_what_was_meant_by_swapped_arguments(tmp_path):
    variables = QMODEL.init(KEY, X)
    with pytest.raises(TypeError, match="in front of the arguments"):
        QMODEL.apply(X, variables)
    with pytest.raises(TypeError, match=r"write convert\(qmodel, variables, x\)"):
        sq.convert(variables, QMODEL, X)
    with pytest.raises(TypeError, match=r"write convert\(qmodel, variables, x\)"):
        sq.convert(QMODEL, X, variables)
    for name in ("export_tflite", "export_onnx"):
        export = getattr(sq, name)
        with pytest.raises(TypeError, match=r"Convert it first: model = convert\("):
            export(QMODEL, tmp_path / "model")
        with pytest.raises(TypeError, match=rf"The model comes first: {name}\(model, path\)"):
            export(tmp_path / "model", QMODEL)
    with pytest.raises(TypeError, match=r"The model comes first: verify\(model, path, x\)"):
        sq.verify(tmp_path / "model", QMODEL, X)
    with pytest.raises(TypeError, match=r"all variables .*is no range"):
        sq.nonfinite_ranges(variables)


def test_bytes_where_ranges_are_those_of_real_values():
    variables = sq.calibrate(QMODEL, QMODEL.init(KEY, X), [X], progress=False)
    images = np.zeros((2, 4), np.uint8)
    with pytest.raises(ValueError, match=r"input of type uint8: .*x\.astype\('float32'\) / 255"):
        QMODEL.apply(variables, images)
    with pytest.raises(ValueError, match=r"got uint8\. Pass real values.* / 255"):
        sq.convert(QMODEL, variables, X)(images)
