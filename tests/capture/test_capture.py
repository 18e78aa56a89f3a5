"""Capture: what a call of a model becomes as a graph, and what capture leaves untouched."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.ad_checkpoint import checkpoint_name
from models import assert_same, observed
from zoo import Model

import simqat_jax as sq

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))


def rows(model, *args, config=None, **kwargs):
    """Return the plan's rows as (path, op) by way of shapes alone."""
    qmodel = sq.SimQAT(config).apply(model)
    variables = jax.eval_shape(lambda: qmodel.init(KEY, *args, **kwargs))
    plan = qmodel.plan(variables, *args, **kwargs)
    return [(row.path, row.op.split("(")[0]) for row in plan.rows], plan


def between(function):
    """A function between two layers, as a model."""
    return Model(lambda x: nn.Dense(2)(function(nn.Dense(6)(x))))


def compared(model, *args):
    """Observe one batch; return the model, its variables, its output, the float model's."""
    qmodel, variables, y = observed(model, *args)
    return qmodel, variables, y, jax.jit(model.apply)({"params": variables["params"]}, *args)


# Modules and their paths -------------------------------------------------------------------------


@jax.jit
def jitted_function(x):
    return x + jnp.tanh(x[..., ::-1])


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jitted_function(nn.Dense(6)(x))


class Middle(nn.Module):
    cls: type

    @nn.compact
    def __call__(self, x):
        return self.cls(name="i")(x)


class Lifted(nn.Module):
    """Several instances of one lifted class, at different depths."""

    lift: staticmethod

    @nn.compact
    def __call__(self, x):
        cls = self.lift(Inner)
        x = cls(name="b")(cls(name="a")(x))
        return Middle(cls, name="d")(Middle(cls, name="c")(x)) + x


@pytest.mark.versions
@pytest.mark.parametrize("lift", [lambda cls: cls, nn.jit, nn.remat])
def test_instances_of_one_class_keep_their_own_paths(lift):
    found, plan = rows(Lifted(lift), X)
    ops = ("Dense_0", "rev", "tanh", "add")
    inside = [f"{module}/{op}" for module in ("a", "b", "c/i", "d/i") for op in ops]
    assert [path for path, _ in found] == [*inside, "add"]
    outputs = {f"{path}/output" for path in (*inside, "add") if not path.endswith("rev")}
    assert outputs <= set(plan.quantizers)
    _, plan = rows(Lifted(lift), X, config=sq.SimQATConfig(exclude=("a", "c")))
    weights = [name for name, q in plan.quantizers.items() if q.role == "weight"]
    assert weights == ["b/Dense_0/kernel", "d/i/Dense_0/kernel"]


@pytest.mark.versions
def test_traces_of_the_float_model_are_not_reused():
    cls = nn.jit(Inner)
    model = Model(lambda x: nn.Dense(2)(cls(name="a")(x)))
    variables = model.init(KEY, X)
    before = model.apply(variables, X)
    _, _, y, floats = compared(model, X)
    # Compiled as one or operation by operation, floats differ in their last bits; a quantized trace
    # would differ by about 1e-2.
    np.testing.assert_allclose(floats, before, rtol=1e-5, atol=1e-6)
    assert 0 < jnp.abs(y - floats).max() < 0.05
    np.testing.assert_array_equal(model.apply(variables, X), before)


def test_subclasses_that_call_super_are_layers():
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2.0 * super().__call__(x)

    found, plan = rows(Model(lambda x: Scaled(3)(x)), X)
    assert [op for _, op in found] == ["Dense", "mul"]
    assert "Scaled_0/kernel" in plan.quantizers


def test_methods_other_than_call():
    class Coder(nn.Module):
        def setup(self):
            self.encoder, self.decoder = nn.Dense(3), nn.Dense(6)

        def encode(self, x):
            return nn.relu(self.encoder(x))

        def __call__(self, x):
            return self.decoder(self.encode(x))

    assert [path for path, _ in rows(Coder(), X)[0]] == ["encoder", "decoder"]


# Calls -------------------------------------------------------------------------------------------


class Call(nn.Module):
    """A model with every kind of argument."""

    @nn.compact
    def __call__(self, batch, factor=1.0, extra=None, *, train=False, names=("a",)):
        y = nn.Dense(3)(batch[names[0]]) * factor
        if extra is not None:
            y = y + nn.Dense(3, name="extra")(extra)
        return {"y": y, "train": train, "none": None}


def test_arguments_of_every_kind():
    qmodel = sq.SimQAT().apply(Call())
    batch = {"a": X, "count": jnp.arange(3)}
    variables = qmodel.init(KEY, batch, 0.5, extra=X, train=True)
    assert {"input/0/a", "input/extra"} <= set(variables["quant_stats"])
    out, updates = qmodel.apply(
        freeze(variables), batch, factor=0.5, extra=X, train=True, mutable=["quant_stats"]
    )
    assert out["train"] is True and out["none"] is None
    want = Call().apply({"params": variables["params"]}, batch, 0.5, extra=X)["y"]
    assert jnp.abs(out["y"] - want).max() < 0.05
    variables = {**variables, **updates}
    bound = qmodel.bind(variables)
    np.testing.assert_array_equal(
        bound(batch, 0.5, extra=X)["y"], qmodel.apply(variables, batch, 0.5, extra=X)["y"]
    )


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, y):
        return nn.Dense(3)(x) + nn.Dense(3)(y)


def test_another_way_to_call_is_an_error_and_takes_no_other_range():
    qmodel = sq.SimQAT().apply(TwoInputs())
    variables = qmodel.init(KEY, X, X)
    with pytest.raises(ValueError, match="no quant_stats for input/y"):
        qmodel.apply(variables, X, y=X)


def test_debug_print_survives(capfd):
    def body(x):
        y = nn.Dense(3)(x)
        jax.debug.print("shape {}", y.shape[0])
        return nn.Dense(2)(y)

    qmodel, variables, y, floats = compared(Model(body), X)
    jax.effects_barrier()
    capfd.readouterr()
    jax.block_until_ready(qmodel.apply(variables, X))
    jax.effects_barrier()
    assert capfd.readouterr().out.count("shape 4") == 1
    assert jnp.abs(y - floats).max() < 0.05


# Functions ---------------------------------------------------------------------------------------


@jax.custom_jvp
def second(x, y):
    del x
    return y


second.defjvp(lambda primals, tangents: (primals[1], tangents[1]))


@jax.custom_jvp
def zero(x):
    del x
    return jnp.float32(0.5)


zero.defjvp(lambda primals, tangents: (jnp.float32(0.5), jnp.float32(0)))


@jax.custom_jvp
def pair(x):
    return jnp.tanh(x), jnp.sin(x)


pair.defjvp(lambda primals, tangents: (pair(*primals), (tangents[0], tangents[0])))


@jax.custom_jvp
def by_place(x):
    return x * jnp.arange(6.0).reshape(1, 6)


by_place.defjvp(lambda primals, tangents: (by_place(*primals), by_place(*tangents)))


A_KEY = jax.random.key(11)
"""A constant of models."""


@jax.custom_vjp
def reverse_gradient(x):
    return x


reverse_gradient.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@pytest.mark.versions
@pytest.mark.parametrize(
    "function",
    [
        lambda x: second(x, x * x),
        lambda x: second(x * x, x),
        lambda x: x + zero(x.sum()),
        lambda x: sum(map(jnp.sin, pair(x))),
        lambda x: pair(x)[1],
        by_place,
        lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
        lambda x: jax.vmap(lambda row: nn.relu(row) * 2)(x),
        lambda x: jax.grad(lambda t: jnp.sum(jnp.tanh(t) ** 2))(x),
        lambda x: jnp.where(jnp.arange(6) % 2 == 0, x, 0.0),
        lambda x: x / (1 + nn.softplus(-x)),
        lambda x: checkpoint_name(nn.relu(x), "div"),
        lambda x: jnp.sort(x, axis=-1),
        lambda x: jax.lax.stop_gradient(nn.relu(x)),
        lambda x: jnp.abs(jnp.exp(1j * x) + (0.3 + 1j) * x),
        lambda x: jnp.fft.irfft(jnp.fft.rfft(x) * 0.5j, 6),
        lambda x: x + jax.random.normal(A_KEY, (1, 6)),
    ],
)
def test_functions_compute_what_they_compute(function):
    qmodel, variables, y, floats = compared(between(function), X)
    scale = float(jnp.abs(floats).max())
    assert jnp.abs(y - floats).max() < 0.05 * scale
    evaluated = qmodel.apply(variables, X)
    assert jnp.abs(evaluated - floats).max() < 0.05 * scale
    assert_same(sq.convert(qmodel, variables, X)(X), evaluated)


def test_custom_gradients_are_kept():
    for function, sign in ((lambda x: x, 1), (reverse_gradient, -1)):
        qmodel, variables, _, _ = compared(between(function), X)

        def loss(params, qmodel=qmodel, variables=variables):
            return jnp.sum(qmodel.apply({**variables, "params": params}, X))

        grad = jax.grad(loss)(variables["params"])["Dense_1"]["bias"]
        want = variables["params"]["Dense_0"]["kernel"].sum(-1) * len(X)
        np.testing.assert_allclose(grad, sign * want, rtol=0.1, atol=0.1)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: x * nn.sigmoid(x), "elementwise"),
        (lambda x: x * nn.relu6(x + 3) / 6, "elementwise"),
        (lambda x: nn.relu6(x + 3) / 6, "elementwise"),
        (lambda x: 0.5 * x * (1 + jax.lax.erf(x / 2**0.5)), "elementwise"),
        (nn.silu, "silu"),
        (nn.hard_swish, "hard_swish"),
        (nn.leaky_relu, "leaky_relu"),
        (nn.softplus, "softplus"),
        (jnp.abs, "abs"),
        (lambda x: jnp.maximum(x, 0.1 * x), "elementwise"),
        (lambda x: jnp.minimum(jnp.exp(x), x * x), "elementwise"),
        (lambda x: jnp.where(x > 1, 1.0, jnp.where(x < -1, -1.0, x)), "elementwise"),
    ],
)
def test_one_function_of_one_tensor_is_one_node(function, op):
    found, plan = rows(between(function), X)
    assert [op for _, op in found] == ["Dense", op, "Dense"]
    assert plan.rows[1].note == "table lookup"


@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (nn.relu, "relu"),
        (nn.relu6, "clip(0, 6)"),
        (lambda x: jnp.maximum(x, 0), "relu"),
        (lambda x: jnp.maximum(0.0, x), "relu"),
        (lambda x: jnp.clip(x, -1, 1), "clip(-1, 1)"),
        (lambda x: jnp.minimum(nn.relu(x), 4), "clip(0, 4)"),
        (lambda x: jax.lax.clamp(-2.0, x, 2.0), "clip(-2, 2)"),
    ],
)
def test_a_clamp_is_fused(function, fused):
    _, plan = rows(between(function), X)
    assert len(plan.rows) == 2
    assert plan.rows[0].op.endswith(f" + {fused}")
    qmodel, variables, _, floats = compared(Model(lambda x: function(nn.Dense(6)(3 * x))), X)
    y = jnp.asarray(qmodel.apply(variables, X))
    assert jnp.abs(y - floats).max() < 0.1
    bounds = jnp.array([floats.min(), floats.max()])
    assert y.min() >= bounds[0] - 0.05 and y.max() <= bounds[1] + 0.05


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.logsumexp(x),
        lambda x: x - x.var(),
        lambda x: x / jnp.linalg.norm(x),
    ],
)
def test_logarithms_and_variances_stay_float(function):
    _, plan = rows(Model(lambda x: function(nn.Dense(6)(x))), X)
    assert plan.floats
    assert set(plan.quantizers) == {"input", "Dense_0/kernel", "Dense_0/output"}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.at[:, jnp.array([0, 9])].get(mode="fill", fill_value=0.123),
        lambda x: jax.lax.optimization_barrier((x, 0.3 * x[:, ::-1]))[1],
    ],
    ids=["fill value", "barrier"],
)
def test_operations_that_leave_the_grid_pass_none_on(function):
    qmodel, variables, y, floats = compared(between(function), X)
    assert qmodel.plan(variables, X).floats
    largest = jnp.abs(floats).max()
    assert jnp.abs(y - floats).max() < 0.03 * largest
    assert jnp.abs(qmodel.apply(variables, X) - floats).max() < 0.03 * largest


# Out of reach ------------------------------------------------------------------------------------


class Branched(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(6)(x)
        branches = [lambda m, x, k=k: nn.Dense(2, name="layer")(x) * k for k in (1.0, 2.0)]
        return nn.cond(y.sum() > 0, *branches, self, y)


class Looped(nn.Module):
    @nn.compact
    def __call__(self, x):
        def step(module, x):
            del module
            return nn.Dense(6, name="layer")(x)

        step(self, x)
        return nn.Dense(2)(nn.while_loop(lambda m, x: x.sum() > 0, step, self, x))


@pytest.mark.versions
@pytest.mark.parametrize(
    ("model", "inside"),
    [
        (Branched(), "cond"),
        (Looped(), "while"),
    ],
)
def test_layers_inside_transformations(model, inside):
    with pytest.raises(ValueError, match=rf"layer.*called inside `{inside}`[\s\S]*exclude="):
        sq.SimQAT().apply(model).init(KEY, X)
