"""What must hold for every supported construct: the table of models is in zoo.py."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import optimized
from models import RNGS
from zoo import CASES, Case

import simqat_jax as sq

WIDE = sq.SimQATConfig(
    weight=sq.QuantSpec(
        num_bits=16, symmetric=True, per_channel=True, narrow_range=True, observer="batch"
    ),
    activation=sq.QuantSpec(num_bits=16),
)


class Subject:
    """A case, with what several laws need of it computed once."""

    def __init__(self, case: Case):
        self.case = case
        self.model = case.model
        self.qmodel = sq.SimQAT().apply(case.model)
        self.wide = sq.SimQAT(WIDE).apply(case.model)

    def init(self, model: Any) -> dict[str, Any]:
        return jax.jit(lambda: model.init(RNGS, *self.case.args, **self.case.kwargs))()

    def call(self, model: Any, variables: Any) -> Any:
        """The output in evaluation; of cases in training, in training."""
        args, kwargs = self.case.args, self.case.kwargs
        if kwargs.get("train"):
            return model.apply(variables, *args, **kwargs, mutable=["batch_stats"])[0]
        return model.apply(variables, *args, **kwargs, rngs=RNGS)

    def observed(self, qmodel: Any, variables: Any) -> tuple[Any, dict[str, Any]]:
        """One training step: the output, and the variables with what it changed."""
        mutable = [name for name in variables if name != "params"]
        y, updates = qmodel.apply(
            variables, *self.case.args, **self.case.kwargs, rngs=RNGS, mutable=mutable
        )
        return y, {**variables, **updates}

    @functools.cached_property
    def floats(self) -> dict[str, Any]:
        return self.init(self.model)

    @functools.cached_property
    def variables(self) -> dict[str, Any]:
        return self.init(self.qmodel)

    @functools.cached_property
    def trained(self) -> dict[str, Any]:
        return jax.jit(lambda v: self.observed(self.qmodel, v)[1])(self.variables)

    @functools.cached_property
    def fresh(self) -> dict[str, Any]:
        """Variables with 16 bits that have observed nothing."""
        return {**self.init(self.wide), **self.floats}

    @functools.cached_property
    def step(self) -> tuple[Any, dict[str, Any], Any]:
        """Of a training step with 16 bits: the output, the variables after it, the gradients."""

        def loss(params):
            y, after = self.observed(self.wide, {**self.fresh, "params": params})
            return scalar(y), (y, after)

        grads, (y, after) = jax.jit(jax.grad(loss, has_aux=True))(self.floats["params"])
        return y, after, grads

    @functools.cached_property
    def float_step(self) -> tuple[Any, Any]:
        """Output and gradients of the float model."""

        def loss(params):
            y = self.call(self.model, {**self.floats, "params": params})
            return scalar(y), y

        grads, y = jax.jit(jax.grad(loss, has_aux=True))(self.floats["params"])
        return y, grads

    @functools.cached_property
    def half(self) -> bool:
        return any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(self.float_step[0]))


@pytest.fixture(params=CASES, scope="module")
def subject(request):
    return Subject(CASES[request.param])


def scalar(tree):
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.sin(leaf) * jnp.linspace(1, 2, leaf.size)) for leaf in leaves)


def assert_tree_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 0.1)


def test_variables_are_the_float_models_name_for_name_and_bit_for_bit(subject):
    plain = {name: tree for name, tree in subject.variables.items() if name != "quant_stats"}
    jax.tree.map(np.testing.assert_array_equal, plain, dict(subject.floats))


def test_one_quantizer_for_each_tensor(subject):
    case = subject.case
    plan = subject.qmodel.plan(subject.variables, *case.args, **case.kwargs)
    roles = [q.role for q in plan.quantizers.values()]
    assert roles.count("activation") == case.activations, str(plan)
    assert roles.count("weight") == case.weights, str(plan)
    names = {q.name for q in plan.quantizers.values() if q.role == "activation"}
    assert names | {"step"} == set(subject.variables["quant_stats"])


def test_evaluation_has_the_same_bits_compiled_as_a_whole_and_operation_by_operation(subject):
    case, qmodel, trained = subject.case, subject.qmodel, subject.trained
    eager = subject.call(qmodel, trained)
    with optimized():
        jitted = jax.jit(lambda v: subject.call(qmodel, v))(trained)
    floats = qmodel.plan(trained, *case.args, **case.kwargs).floats
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        rounding = 1e-6 if floats else 0.0
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rounding)


def test_evaluation_has_finite_gradients(subject):
    def loss(params):
        return scalar(subject.call(subject.qmodel, {**subject.trained, "params": params}))

    grads = jax.jit(jax.grad(loss))(subject.trained["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_16_bits_train_and_evaluate_as_the_float_model(subject):
    (y, after, _), (want, _) = subject.step, subject.float_step
    tolerance = 0.05 if subject.half else 2e-3
    assert_tree_close(y, want, tolerance)
    if not subject.case.kwargs.get("train"):
        variables = {**after, **subject.floats}
        got = jax.jit(lambda v: subject.call(subject.wide, v))(variables)
        assert_tree_close(got, want, tolerance)


def test_16_bits_have_the_gradients_of_the_float_model(subject):
    (_, _, grads), (_, want) = subject.step, subject.float_step
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= (0.2 if subject.half else 0.02) * largest
