"""What must hold for every supported construct: the table of models is in zoo.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import CASES

import simqat_jax as sq

RNGS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
WIDE = sq.SimQATConfig(
    weight=sq.QuantSpec(
        num_bits=16, symmetric=True, per_channel=True, narrow_range=True, observer="batch"
    ),
    activation=sq.QuantSpec(num_bits=16),
)


@pytest.fixture(params=CASES, scope="module")
def case(request):
    return CASES[request.param]


def observed(qmodel, case, variables):
    """One training step: the output, and the variables with what it changed."""
    mutable = [name for name in variables if name != "params"]
    y, updates = qmodel.apply(variables, *case.args, **case.kwargs, rngs=RNGS, mutable=mutable)
    return y, {**variables, **updates}


def call(model, case, variables, x=None):
    args = case.args if x is None else x
    if case.kwargs.get("train"):
        return model.apply(variables, *args, **case.kwargs, mutable=["batch_stats"])[0]
    return model.apply(variables, *args, **case.kwargs, rngs=RNGS)


def scalar(tree):
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.sin(leaf) * jnp.linspace(1, 2, leaf.size)) for leaf in leaves)


def assert_tree_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 0.1)


def test_every_construct(case):
    model = case.model
    half = any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(call_shape(case)))
    floats = model.init(RNGS, *case.args, **case.kwargs)
    qmodel = sq.SimQAT().apply(model)
    variables = qmodel.init(RNGS, *case.args, **case.kwargs)

    # The float model's own variables, name for name and bit for bit.
    stats = variables["quant_stats"]
    plain = {name: tree for name, tree in variables.items() if name != "quant_stats"}
    jax.tree.map(np.testing.assert_array_equal, plain, dict(floats))

    # One quantizer for each tensor.
    plan = qmodel.plan(variables, *case.args, **case.kwargs)
    roles = [q.role for q in plan.quantizers.values()]
    assert roles.count("activation") == case.activations, str(plan)
    assert roles.count("weight") == case.weights, str(plan)
    assert {q.name for q in plan.quantizers.values() if q.role == "activation"} | {"step"} == set(
        stats
    )

    # Evaluation: on the grid, the same bits with jit, with a gradient; it changes nothing.
    _, trained = observed(qmodel, case, variables)
    eager = call(qmodel, case, trained)
    jitted = jax.jit(lambda v, x: call(qmodel, case, v, x))(trained, case.args)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        rounding = 1e-6 if plan.floats else 0.0
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rounding)
    grads = jax.grad(lambda p: scalar(call(qmodel, case, {**trained, "params": p})))(
        trained["params"]
    )
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))

    # With 16 bits simulation, evaluation and gradients are those of the float model.
    wide = sq.SimQAT(WIDE).apply(model)
    fresh = {**wide.init(RNGS, *case.args, **case.kwargs), **floats}
    want = call(model, case, floats)
    got, trained = observed(wide, case, fresh)
    assert_tree_close(got, want, 0.05 if half else 2e-3)
    if not case.kwargs.get("train"):
        trained = {**trained, **floats}
        assert_tree_close(call(wide, case, trained), want, 0.05 if half else 2e-3)
    want_grads = jax.grad(lambda p: scalar(call(model, case, {**floats, "params": p})))(
        floats["params"]
    )

    def trained_loss(params):
        return scalar(observed(wide, case, {**fresh, "params": params})[0])

    got_grads = jax.grad(trained_loss)(floats["params"])
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grads))
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        assert np.abs(a - b).max() <= (0.2 if half else 0.02) * largest


def call_shape(case):
    return jax.eval_shape(lambda: case.model.init_with_output(RNGS, *case.args, **case.kwargs)[0])
