"""What must hold for every supported construct: the table of models is in zoo.py."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilation import optimized
from models import RNGS, by_half, by_night
from zoo import CASES, Case

import simqat_jax as sq

WIDE = sq.SimQATConfig(
    weight=sq.QuantSpec(
        num_bits=16, symmetric=True, per_channel=True, narrow_range=True, observer="batch"
    ),
    activation=sq.QuantSpec(num_bits=16),
)


class Results(NamedTuple):
    """What a call returns, the variables after it, and the gradients of a scalar of the output."""

    output: Any
    variables: Any
    gradients: Any


def with_gradients(step: Callable[[Any], tuple[Any, Any]], variables: Any) -> tuple[Any, Any, Any]:
    """The output of a step, the variables after it, and the gradients of a scalar of the output."""

    def loss(params):
        output, after = step({**variables, "params": params})
        return scalar(output), (output, after)

    gradients, (output, after) = jax.grad(loss, has_aux=True)(variables["params"])
    return output, after, gradients


class Subject:
    """A case, and what several laws need of it, each computed once, in one compiled function."""

    def __init__(self, case: Case):
        self.case = case
        self.model = case.model
        self.qmodel = sq.SimQAT().apply(case.model)

    def init(self, model: Any) -> Any:
        return model.init(RNGS, *self.case.args, **self.case.kwargs)

    def call(self, model: Any, variables: Any) -> Any:
        """The output of one call; what it updates is dropped."""
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
    def floats(self) -> Results:
        """Of the float model."""
        variables = self.init(self.model)
        run = jax.jit(lambda v: with_gradients(lambda v: (self.call(self.model, v), v), v))
        return Results(*run(variables))

    @functools.cached_property
    def variables(self) -> Any:
        return self.init(self.qmodel)

    @functools.cached_property
    def trained(self) -> Any:
        """The variables after one step."""
        return jax.jit(lambda v: self.observed(self.qmodel, v)[1])(self.variables)

    @functools.cached_property
    def evaluated(self) -> Any:
        """The output in evaluation, compiled as users do."""
        self.skip_training()
        run = jax.jit(lambda v: self.call(self.qmodel, v))
        trained = self.trained
        with optimized():
            return run(trained)

    @functools.cached_property
    def gradients(self) -> Any:
        """Those of evaluation."""
        self.skip_training()
        run = jax.jit(lambda v: with_gradients(lambda v: (self.call(self.qmodel, v), v), v))
        return run(self.trained)[2]

    def skip_training(self) -> None:
        """Skip what is about evaluation."""
        if self.case.kwargs.get("train"):
            pytest.skip("a call that takes batch statistics is none of evaluation")

    @functools.cached_property
    def wide(self) -> tuple[Results, Any]:
        """With 16 bits: of a training step, and the output in evaluation after it."""
        qmodel = sq.SimQAT(WIDE).apply(self.model)

        @jax.jit
        def run(floats):
            variables = {**self.init(qmodel), **floats}
            results = Results(*with_gradients(lambda v: self.observed(qmodel, v), variables))
            evaluated = None
            if not self.case.kwargs.get("train"):
                evaluated = self.call(qmodel, {**results.variables, **floats})
            return results, evaluated

        return run(self.floats.variables)


@pytest.fixture(params=by_night(CASES), scope="module")
def subject(request):
    return Subject(CASES[request.param])


def is_half(tree):
    return any(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(tree))


def scalar(tree):
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return sum(jnp.sum(jnp.sin(leaf) * jnp.linspace(1, 2, leaf.size)) for leaf in leaves)


def assert_tree_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 0.1)


def test_variables_are_the_float_models_name_for_name_and_bit_for_bit(subject):
    variables = subject.variables
    plain = {name: tree for name, tree in variables.items() if name != "quant_stats"}
    jax.tree.map(np.testing.assert_array_equal, plain, dict(subject.floats.variables))


def test_one_quantizer_for_each_tensor(subject):
    case, variables = subject.case, subject.variables
    plan = subject.qmodel.plan(variables, *case.args, **case.kwargs)
    roles = [q.role for q in plan.quantizers.values()]
    assert roles.count("activation") == case.activations, str(plan)
    assert roles.count("weight") == case.weights, str(plan)
    names = {q.name for q in plan.quantizers.values() if q.role == "activation"}
    assert names | {"step"} == set(variables["quant_stats"])


@pytest.mark.nightly
def test_evaluation_has_the_same_bits_with_and_without_jit(subject):
    compiled = subject.evaluated
    case, qmodel, trained = subject.case, subject.qmodel, subject.trained
    eager = subject.call(qmodel, trained)
    floats = qmodel.plan(trained, *case.args, **case.kwargs).floats
    pairs = zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True)
    for a, b in pairs:
        rounding = 1e-6 if floats else 0.0
        np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rounding)


@pytest.mark.parametrize("subject", by_half(CASES), indirect=True, scope="module")
def test_evaluation_has_finite_gradients(subject):
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(subject.gradients))


@pytest.mark.parametrize("subject", by_half(CASES, 1), indirect=True, scope="module")
def test_16_bits_train_and_evaluate_as_the_float_model(subject):
    results, evaluated = subject.wide
    want = subject.floats.output
    tolerance = 0.05 if is_half(want) else 2e-3
    assert_tree_close(results.output, want, tolerance)
    if evaluated is not None:
        assert_tree_close(evaluated, want, tolerance)


@pytest.mark.parametrize("subject", by_half(CASES, 1), indirect=True, scope="module")
def test_16_bits_have_the_gradients_of_the_float_model(subject):
    got, want = subject.wide[0].gradients, subject.floats.gradients
    tolerance = 0.2 if is_half(subject.floats.output) else 0.02
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= tolerance * largest
