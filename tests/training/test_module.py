"""SimQAT as a user meets it: one call, training, delays, and every wrong input."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from models import KEY, TwoLayers, initialized, step

import simqat_jax as sq


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (16, 5))


# Training and evaluation -------------------------------------------------------------------------


@pytest.mark.versions
def test_training_with_train_state_lowers_the_loss(x):
    qmodel, variables = initialized(TwoLayers(), x)
    labels = jnp.argmax(x[:, :3], axis=-1)
    state = TrainState.create(
        apply_fn=qmodel.apply, params=variables["params"], tx=optax.adam(1e-2)
    )

    def one(carry, _):
        state, stats = carry

        def loss_fn(params):
            logits, updates = state.apply_fn(
                {"params": params, "quant_stats": stats}, x, mutable=["quant_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return (state.apply_gradients(grads=grads), updates["quant_stats"]), loss

    (state, stats), losses = jax.lax.scan(one, (state, variables["quant_stats"]), length=60)
    assert losses[-1] < 0.5 * losses[0]
    assert stats["step"] == 60
    logits = qmodel.apply({"params": state.params, "quant_stats": stats}, x)
    assert (jnp.argmax(logits, -1) == labels).mean() > 0.9


def test_jit_equals_eager_in_training(x):
    qmodel, variables = initialized(TwoLayers(), x)
    for _ in range(3):
        eager, after = step(qmodel, variables, x)
        jitted, jit_after = jax.jit(lambda v, x: step(qmodel, v, x))(variables, x)
        np.testing.assert_allclose(eager, jitted, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), after, jit_after)
        variables = after


def test_vmap_over_the_whole(x):
    qmodel, variables = initialized(TwoLayers(), x)
    _, variables = step(qmodel, variables, x)
    xs = jnp.stack([x, 0.5 * x])
    got = jax.vmap(lambda x: qmodel.apply(variables, x))(xs)
    np.testing.assert_array_equal(got, jnp.stack([qmodel.apply(variables, x) for x in xs]))


def integer_dense(codes, x_params, kernel, bias, y_params, relu):
    """A quantized Dense in int64 NumPy."""
    scale = np.abs(kernel).max(0) / np.float32(127)
    w = np.clip(np.rint(kernel / scale), -127, 127).astype(np.int64)
    unit = np.float32(x_params[0]) * scale
    acc = (codes.astype(np.int64) - int(x_params[1])) @ w + np.rint(bias / unit).astype(np.int64)
    y_scale, y_zero = np.float32(y_params[0]), int(y_params[1])
    y = np.rint(acc.astype(np.float32) * (unit / y_scale)).astype(np.int64) + y_zero
    return np.clip(y, y_zero if relu else 0, 255)


def test_evaluation_is_the_integer_computation(x):
    qmodel, variables = initialized(TwoLayers(), x)
    for seed in range(4):
        _, variables = step(qmodel, variables, jax.random.normal(jax.random.key(seed), x.shape))
    stats, params = variables["quant_stats"], jax.tree.map(np.asarray, variables["params"])
    spec = sq.QuantSpec()
    grids = {k: sq.quant_params(s.lo, s.hi, spec) for k, s in stats.items() if k != "step"}
    codes = np.asarray(sq.quantize(x, *grids["input"], spec))
    for name, source, relu in (("Dense_0", "input", True), ("Dense_1", "Dense_0/output", False)):
        layer = params[name]
        target = grids[f"{name}/output"]
        codes = integer_dense(codes, grids[source], layer["kernel"], layer["bias"], target, relu)
    scale, zero_point = map(np.asarray, grids["Dense_1/output"])
    want = (codes - zero_point).astype(np.float32) * scale
    np.testing.assert_array_equal(qmodel.apply(variables, x), want)


def test_evaluation_changes_nothing(x):
    qmodel, variables = initialized(TwoLayers(), x)
    _, variables = step(qmodel, variables, x)
    before = jax.tree.map(np.array, variables)
    _, updates = qmodel.apply(variables, 100 * x, mutable=["batch_stats"])
    assert not updates
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("role", ["activation", "weight"])
def test_delay(role, x):
    specs = {
        "activation": sq.QuantSpec(num_bits=3, quant_delay=2),
        "weight": sq.QuantSpec(
            num_bits=3,
            symmetric=True,
            per_channel=True,
            narrow_range=False,
            observer="batch",
            quant_delay=2,
        ),
    }
    other = "weight" if role == "activation" else "activation"
    fine = sq.QuantSpec(num_bits=16, symmetric=True, observer="batch")
    qmodel, variables = initialized(TwoLayers(), x, **{role: specs[role], other: fine})
    floats = TwoLayers().apply({"params": variables["params"]}, x)
    for done in range(4):
        y, variables = step(qmodel, variables, x)
        close = np.allclose(y, floats, atol=2e-3)
        assert close is (done < 2)
        evaluated = qmodel.apply(variables, x)
        assert np.allclose(evaluated, floats, atol=2e-3) is (done + 1 < 2)
    assert variables["quant_stats"]["input"].hi == x.max()


@pytest.mark.parametrize("observer", ["ema", "minmax"])
def test_weight_observers_keep_state(observer, x):
    spec = sq.QuantSpec(symmetric=True, per_channel=True, narrow_range=True, observer=observer)
    qmodel, variables = initialized(TwoLayers(), x, weight=spec)
    _, variables = step(qmodel, variables, x)
    state, kernel = (
        variables["quant_stats"]["Dense_0/kernel"],
        variables["params"]["Dense_0"]["kernel"],
    )
    np.testing.assert_array_equal(state.hi, kernel.max(0))
    plan = qmodel.plan(variables, x)
    assert plan.quantizers["Dense_0/kernel"].hi == float(kernel.max())
    assert np.isfinite(qmodel.apply(variables, x)).all()


class Coder(nn.Module):
    """Methods of its own, one of them called by the other."""

    def setup(self):
        self.encoder, self.decoder = nn.Dense(6), nn.Dense(5)

    def encode(self, x):
        return nn.relu(self.encoder(x)) * 0.5

    def __call__(self, x):
        return self.decoder(self.encode(x)) * 2.0


@pytest.mark.parametrize(
    "method", ["encode", Coder.encode, Coder().encode, lambda m, x: m.encode(x)]
)
def test_methods_of_the_float_module(method, x):
    qmodel, variables = initialized(Coder(), x)
    assert "encode/mul/output" in variables["quant_stats"]
    _, variables = step(qmodel, variables, x)
    with pytest.raises(ValueError, match=r"no quant_stats for .*/input"):
        qmodel.apply(variables, x, method=method)  # trained through __call__ alone
    _, updates = qmodel.apply(variables, x, method=method, mutable=["quant_stats"])
    variables = {**variables, **updates}
    codes = jnp.asarray(qmodel.apply(variables, x, method=method))
    want = jnp.asarray(Coder().apply({"params": variables["params"]}, x, method=method))
    assert 0 < jnp.abs(codes - want).max() < 0.03 * want.max()
    assert next(row.path for row in qmodel.plan(variables, x, method=method).rows) == "encoder"
    fresh = qmodel.init(KEY, x, method=method)
    jax.tree.map(
        np.testing.assert_array_equal,
        fresh["params"],
        Coder().init(KEY, x, method=method)["params"],
    )
    whole = qmodel.apply(variables, x)
    np.testing.assert_array_equal(qmodel.apply(variables, x, method="__call__"), whole)
    np.testing.assert_array_equal(qmodel.apply(variables, x, method=qmodel.__call__), whole)
    np.testing.assert_array_equal(qmodel.apply(variables, x, method=Coder.__call__), whole)


def test_a_method_that_does_not_exist(x):
    qmodel, variables = initialized(Coder(), x)
    with pytest.raises(ValueError, match=r"method must be one of Coder, .* got 'enc'"):
        qmodel.apply(variables, x, method="enc")


# JAX's modes -------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_without_jit_and_with_strict_promotion(x):
    qmodel, variables = initialized(TwoLayers(), x)
    y, variables = step(qmodel, variables, x)
    want = qmodel.apply(variables, x)
    with jax.disable_jit():
        np.testing.assert_array_equal(qmodel.apply(variables, x), want)
        np.testing.assert_allclose(step(qmodel, variables, x)[0], y, atol=0.05)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(qmodel.apply(variables, x), want)
        step(qmodel, variables, x)


# Composition -------------------------------------------------------------------------------------


class Outer(nn.Module):
    """A float model with a quantization-aware part."""

    def setup(self):
        self.inner = sq.SimQAT().apply(TwoLayers())
        self.head = nn.Dense(2)

    def __call__(self, x):
        return self.head(self.inner(x))


class OuterCompact(nn.Module):
    """The same in compact style."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(sq.SimQAT().apply(TwoLayers(parent=None), name="inner")(x))


@pytest.mark.parametrize("outer", [Outer(), OuterCompact()])
def test_inside_another_module(outer, x):
    variables = outer.init(KEY, x)
    assert set(variables["params"]["inner"]) == {"Dense_0", "Dense_1"}
    assert "input" in variables["quant_stats"]["inner"]
    y, updates = outer.apply(variables, x, mutable=["quant_stats"])
    assert y.shape == (16, 2) and updates["quant_stats"]["inner"]["step"] == 1


def test_sown_intermediates_and_dropout_masks_are_those_of_the_float_model(x):
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4)(x)
            self.sow("intermediates", "hidden", x)
            return nn.Dropout(0.5, deterministic=False)(x)

    rngs = {"params": KEY, "dropout": jax.random.key(3)}
    qmodel = sq.SimQAT().apply(Sown())
    variables = qmodel.init(rngs, x)
    y, updates = qmodel.apply(variables, x, rngs=rngs, mutable=["quant_stats", "intermediates"])
    want = Sown().apply({"params": variables["params"]}, x, rngs=rngs)
    np.testing.assert_array_equal(y == 0, want == 0)
    (hidden,) = updates["intermediates"]["hidden"]
    assert jnp.shape(hidden) == (16, 4)


def test_a_function_that_is_only_named_relu_is_not_taken_for_one(x):
    @jax.jit
    def relu(x):
        return jnp.abs(x)

    class Liar(nn.Module):
        @nn.compact
        def __call__(self, x):
            return relu(nn.Dense(4)(x))

    qmodel, variables = initialized(Liar(), x)
    y, variables = step(qmodel, variables, x)
    want = Liar().apply({"params": variables["params"]}, x)
    assert jnp.abs(y - want).max() < 0.05


def test_float_parts_by_exclusion(x):
    _, variables = initialized(TwoLayers(), x, exclude=("Dense_1",))
    assert set(variables["quant_stats"]) == {"input", "Dense_0/output", "step"}


# Wrong input -------------------------------------------------------------------------------------


class Looped(nn.Module):
    """A Dense in a loop whose length depends on the data."""

    @nn.compact
    def __call__(self, x):
        def body(module, x):
            return nn.Dense(5, name="inner")(x)

        x = body(self, x)
        return nn.Dense(3)(nn.while_loop(lambda _, x: x.sum() > 1e9, body, self, x))


def test_layers_out_of_reach(x):
    model, path = Looped(), "inner"
    with pytest.raises(ValueError, match=rf"{path}.*while[\s\S]*exclude=\('{path}',\)"):
        initialized(model, x)
    qmodel, variables = initialized(model, x, strict=False)
    _, variables = step(qmodel, variables, x)
    assert np.isfinite(qmodel.apply(variables, x)).all()
    assert "while" in str(qmodel.plan(variables, x))
    initialized(model, x, exclude=(path,))


def test_an_empty_batch(x):
    qmodel, variables = initialized(TwoLayers(), x)
    _, variables = step(qmodel, variables, x)
    assert jnp.shape(qmodel.apply(variables, x[:0])) == (0, 3)
    with pytest.raises(ValueError, match=r"input: an empty tensor of shape \(0, 5\)"):
        step(qmodel, variables, x[:0])


def test_a_model_returns_its_own_input_as_it_came(x):
    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(x), x

    qmodel, variables = initialized(Autoencoder(), x)
    (_, trained), updates = qmodel.apply(variables, x, mutable=["quant_stats"])
    _, evaluated = qmodel.apply({**variables, **updates}, x)
    np.testing.assert_array_equal(trained, x)
    np.testing.assert_array_equal(evaluated, x)


def test_integers_into_a_dense():
    x = jnp.arange(10).reshape(2, 5)
    qmodel, variables = initialized(TwoLayers(), x)
    assert "Dense_0/convert/output" in variables["quant_stats"]
    y, _ = step(qmodel, variables, x)
    want = TwoLayers().apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(y, want, atol=0.1)


@pytest.mark.parametrize("variables", [None, [1], 3.0, "params"])
def test_variables_that_are_none(variables, x):
    qmodel = sq.SimQAT().apply(TwoLayers())
    for call in (qmodel.apply, qmodel.plan):
        with pytest.raises(TypeError, match=r"variables must be a dictionary.*what init returned"):
            call(variables, x)
    unnamed: Any = 3
    with pytest.raises(TypeError, match="name must be a string"):
        sq.SimQAT().apply(TwoLayers(), name=unnamed)


def test_applied_twice(x):
    once = sq.SimQAT().apply(TwoLayers())
    with pytest.raises(ValueError, match="applied twice"):
        sq.SimQAT().apply(once)
    with pytest.raises(ValueError, match="applied twice: inner"):
        initialized(Outer(), x)


@pytest.mark.parametrize(
    ("wrong", "end"),
    [
        (TwoLayers, r"TwoLayers'>\. Construct it: TwoLayers\(\.\.\.\)\.$"),
        (abs, "abs>.$"),
        (None, "None.$"),
    ],
)
def test_no_module(wrong, end):
    with pytest.raises(TypeError, match=f"instance of a flax.*{end}"):
        sq.SimQAT().apply(wrong)


def test_bound_module(x):
    bound = TwoLayers().bind(TwoLayers().init(KEY, x))
    with pytest.raises(ValueError, match=r"unbound.*TwoLayers"):
        sq.SimQAT().apply(bound)


def test_no_config():
    with pytest.raises(TypeError, match="SimQATConfig, got 8"):
        sq.SimQAT(8)


def test_nothing_to_quantize(x):
    with pytest.raises(ValueError, match="nothing to quantize"):
        initialized(nn.LayerNorm(), x)
    with pytest.raises(ValueError, match="nothing to quantize"):
        initialized(TwoLayers(), x, exclude=("Dense_*",))


def test_exclusion_that_matches_nothing(x):
    with pytest.raises(ValueError, match=r"'Dense_7'.*Dense_0.*Dense_1"):
        initialized(TwoLayers(), x, exclude=("Dense_7",))


def test_per_channel_activations_without_a_channel_axis():
    spec = sq.QuantSpec(per_channel=True)
    with pytest.raises(ValueError, match=r"input: .*shape \(5,\) has no channel axis"):
        initialized(nn.Dense(3), jnp.ones(5), activation=spec)
    qmodel, variables = initialized(TwoLayers(), jnp.ones((2, 5)), activation=spec)
    assert variables["quant_stats"]["input"].lo.shape == (5,)
    y, variables = step(qmodel, variables, jnp.ones((2, 5)))
    assert jnp.shape(qmodel.apply(variables, jnp.ones((2, 5)))) == y.shape
