"""What quantization makes of a model: share of multiply-adds, error, gradients, codes, state."""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from compilation import optimized
from jax.extend import core

import simqat_jax as sq
from public_models.kinds import Public
from simqat_jax.ir.graph import shape_of
from simqat_jax.ir.program import Context, Program, at_batch

STEPS = 30
"""Batches that a model trains on, without changing parameters, before it is measured."""
EXPORTS = {"onnx": sq.export_onnx, "tflite": sq.export_tflite}
LOOSE = sq.SimQATConfig(strict=False)
"""What cannot be quantized stays float, so that the rest can be measured."""


# Multiply-adds -----------------------------------------------------------------------------------


class MultiplyAdds(NamedTuple):
    """Of convolutions and matrix products of data.

    Attributes:
      kernels: between data and what does not depend on data.
      data: between two tensors of data.
    """

    kernels: int
    data: int

    @property
    def all(self) -> int:
        """Both."""
        return self.kernels + self.data


def multiply_adds(jaxpr: core.Jaxpr, data: Sequence[bool]) -> MultiplyAdds:
    """Count those of a jaxpr.

    Args:
      jaxpr: what is computed.
      data: of each of its inputs, whether it is data.
    """
    totals = [0, 0]
    _count(jaxpr, data, 1, totals)
    return MultiplyAdds(*totals)


def _count(jaxpr: core.Jaxpr, data: Sequence[bool], times: int, totals: list[int]) -> list[bool]:
    """Add up the products of a jaxpr that runs so many times; tell which outputs are data."""
    known = {v for v, is_data in zip(jaxpr.invars, data, strict=True) if is_data}

    def is_data(v: core.Var | core.Literal) -> bool:
        return not isinstance(v, core.Literal) and v in known

    for eqn in jaxpr.eqns:
        inputs, name = list(map(is_data, eqn.invars)), eqn.primitive.name
        results = [any(inputs)] * len(eqn.outvars)
        subs = list(core.jaxprs_in_params(eqn.params))
        if name in ("dot_general", "conv_general_dilated"):
            totals[sum(inputs) == 2] += times * _multiply_adds(eqn) * any(inputs)
        elif name == "scan":
            results = _count_scan(eqn, subs[0], inputs, times, totals)
        elif subs and len(subs[0].invars) == len(inputs):
            results = _count(subs[0], inputs, times, totals)
        known.update(v for v, result in zip(eqn.outvars, results, strict=True) if result)
    return list(map(is_data, jaxpr.outvars))


def _count_scan(
    eqn: core.JaxprEqn, body: core.Jaxpr, inputs: list[bool], times: int, totals: list[int]
) -> list[bool]:
    """Count a loop, whose carry may become data behind its first step."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    for _ in range(carried + 1):
        outputs = _count(body, inputs, 0, totals)
        pairs = zip(inputs[consts : consts + carried], outputs, strict=False)
        inputs[consts : consts + carried] = [a or b for a, b in pairs]
    return _count(body, inputs, times * eqn.params["length"], totals)


def _multiply_adds(eqn: core.JaxprEqn) -> int:
    """The output's elements times the products that each adds up."""
    size, right = shape_of(eqn.outvars[0]).size, shape_of(eqn.invars[1]).shape
    if eqn.primitive.name == "dot_general":
        (_, contracted), _ = eqn.params["dimension_numbers"]
        return size * math.prod(right[axis] for axis in contracted)
    _, *others = eqn.params["dimension_numbers"].rhs_spec  # inputs of a group, then the window
    return size * math.prod(right[axis] for axis in others)


def float_multiply_adds(program: Program, batch: int) -> MultiplyAdds:
    """Count those that an integer model computes on real values."""
    totals = MultiplyAdds(0, 0)
    for op in program.float_ops:
        inputs, outputs = (
            [dataclasses.replace(program.tensors[i], grid=None) for i in ids]
            for ids in (op.inputs, op.outputs)
        )
        shapes = [jax.ShapeDtypeStruct(at_batch(t.shape, batch), t.dtype) for t in inputs]
        run = functools.partial(op.run, Context(inputs, outputs, op.arrays, batch))
        data = [tensor.value is None for tensor in inputs]
        counted = multiply_adds(jax.make_jaxpr(run)(*shapes).jaxpr, data)
        totals = MultiplyAdds(*(a + b for a, b in zip(totals, counted, strict=True)))
    return totals


# A model -----------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A training step: the gradients, and the state that it leaves."""

    gradients: Any
    state: Any


class Measured:
    """A model that has trained on a few batches, and what is to be known of it, each once."""

    def __init__(self, public: Public):
        self.public = public
        self.model = public.module
        self.qmodel = sq.SimQAT(LOOSE).apply(public.module)
        self.batches = list(map(public.batch, jax.random.split(jax.random.key(1), STEPS)))
        self.samples = public.batch(jax.random.key(2))

    @functools.cached_property
    def first(self) -> Any:
        """The float model's first variables, with noise for what is zero, and so has no effect."""
        variables = dict(jax.jit(lambda: self._init(self.model))())
        rng = np.random.default_rng(0)

        def noisy(leaf: jax.Array) -> jax.Array:
            return leaf if jnp.any(leaf) else leaf + 0.1 * rng.normal(size=leaf.shape)

        return {**variables, "params": jax.tree.map(noisy, variables["params"])}

    def _train(self, step: Callable[..., Step], state: Any) -> Step:
        """Train on all batches, parameters as they are, and return the last step."""
        last = Step(None, state)
        for number, batch in enumerate(self.batches):
            last = step(self.first["params"], last.state, batch, jax.random.key(number))
        return last

    def _init(self, model: nn.Module) -> Any:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(3)}
        return model.init(keys, *self.batches[0], **self.public.train)

    def _applied(self, model: Any, params: Any, state: Any, batch: Any, key: Any):
        """Return the output of a training step, and the state that it leaves."""
        output, updates = model.apply(
            {"params": params, **state},
            *batch,
            **self.public.train,
            rngs={"dropout": key},
            mutable=list(state),
        )
        return output, {**state, **updates}

    def _float_step(self, *args: Any) -> Step:
        return Step(None, self._applied(self.model, *args)[1])

    def _step(self, params: Any, *args: Any) -> Step:
        def loss(params):
            output, state = self._applied(self.qmodel, params, *args)
            return scalar(output), state

        return Step(*jax.grad(loss, has_aux=True)(params))

    @property
    def first_state(self) -> Any:
        """All that the float model's first variables hold but parameters."""
        return {k: v for k, v in self.first.items() if k != "params"}

    @functools.cached_property
    def float_state(self) -> Any:
        """What the float model's training leaves of state."""
        if not self.first_state:
            return {}
        return self._train(jax.jit(self._float_step), self.first_state).state

    @functools.cached_property
    def trained(self) -> Step:
        """The last training step of the quantized model."""
        ranges = jax.jit(lambda: self._init(self.qmodel)["quant_stats"])()
        return self._train(jax.jit(self._step), {**self.first_state, "quant_stats": ranges})

    @property
    def variables(self) -> Any:
        """Of the quantized model after its training."""
        return {"params": self.first["params"], **self.trained.state}

    def float_variables(self) -> Any:
        """Those that the float model has as well."""
        return {k: v for k, v in self.variables.items() if k != "quant_stats"}

    @functools.cached_property
    def evaluated(self) -> Any:
        """The quantized model's output in evaluation, compiled as users do."""
        variables = self.variables
        run = jax.jit(lambda v, *x: self.qmodel.apply(v, *x, **self.public.evaluate))
        with optimized():
            return run(variables, *self.samples)

    @functools.cached_property
    def integer(self) -> sq.IntegerModel:
        """The integer model."""
        return sq.convert(self.qmodel, self.variables, *self.samples, **self.public.evaluate)

    @functools.cached_property
    def integer_output(self) -> Any:
        """What it returns, compiled as users do."""
        model = self.integer
        with optimized():
            return model(*self.samples)

    # What is measured ------------------------------------------------------------------------

    def refusal(self) -> str:
        """Why the default configuration refuses the model; empty where it does not."""
        qmodel = sq.SimQAT().apply(self.model)
        try:
            qmodel.plan(self.variables, *self.samples, **self.public.evaluate)
        except ValueError as error:
            return str(error)
        return ""

    @functools.cached_property
    def multiply_adds(self) -> tuple[MultiplyAdds, MultiplyAdds]:
        """Of the float model, and those that the integer model still computes on real values."""
        leaves, tree = jax.tree.flatten(self.float_variables())

        def call(leaves, samples):
            variables = jax.tree.unflatten(tree, leaves)
            return self.model.apply(variables, *samples, **self.public.evaluate)

        closed = jax.make_jaxpr(call)(leaves, self.samples)
        data = [False] * len(leaves) + [True] * len(self.samples)
        left = float_multiply_adds(self.integer.program, self.samples[0].shape[0])
        return multiply_adds(closed.jaxpr, data), left

    def share(self) -> float:
        """The share of all multiply-adds that are computed on integers."""
        total, left = self.multiply_adds
        return 1 - left.all / total.all

    def kernels_left(self) -> float:
        """The share of products with a kernel that are computed on real values."""
        total, left = self.multiply_adds
        return left.kernels / total.kernels

    def error(self) -> float:
        """The largest relative error to the float model of an array that is returned."""
        run = jax.jit(lambda v, *x: self.model.apply(v, *x, **self.public.evaluate))
        want = run(self.float_variables(), *self.samples)
        return max(map(relative_error, jax.tree.leaves(self.evaluated), jax.tree.leaves(want)))

    def without_gradient(self) -> list[str]:
        """The kernels whose gradient is zero or not finite in a training step."""
        return [
            jax.tree_util.keystr(path)
            for path, gradient in jax.tree.leaves_with_path(self.trained.gradients)
            if gradient.ndim > 1 and not (np.any(gradient) and np.isfinite(gradient).all())
        ]

    def differing_codes(self) -> int:
        """How many numbers differ between evaluation and the integer model.

        Numbers on no grid, such as a loss, may differ as float sums in another order do.
        """
        got, want = jax.tree.leaves(self.integer_output), jax.tree.leaves(self.evaluated)
        program = self.integer.program
        grids = [program.tensors[i].grid for i in program.outputs]
        tolerances = [
            0.0 if grid is not None else 1e-6 * np.abs(w).max()
            for grid, w in zip(grids, want, strict=True)
        ]
        return sum(
            int((np.abs(np.asarray(a) - np.asarray(b)) > tolerance).sum())
            for a, b, tolerance in zip(got, want, tolerances, strict=True)
        )

    def file(self, backend: str) -> sq.Verification:
        """Write the model for a runtime, run the file, and compare it with the integer model."""
        given = {"backend": backend, **self.public.evaluate}
        model = sq.convert(self.qmodel, self.variables, *self.samples, **given)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model.{backend}"
            EXPORTS[backend](model, path)
            return sq.verify(model, path, *self.samples)

    def state_error(self) -> float:
        """The largest relative error to the float model of the state that a module keeps."""
        got = {k: v for k, v in self.trained.state.items() if k != "quant_stats"}
        pairs = zip(_by_module(got), _by_module(self.float_state), strict=True)
        return max((relative_error(a, b) for a, b in pairs), default=0.0)


def _by_module(state: Any) -> list[np.ndarray]:
    """Return the state of each module as one vector."""
    vectors: dict[Any, list[np.ndarray]] = {}
    for path, value in jax.tree.leaves_with_path(state):
        vectors.setdefault(path[:-1], []).append(np.asarray(value).ravel())
    return list(map(np.concatenate, vectors.values()))


def scalar(tree: Any) -> jax.Array:
    """Return a number that depends on each element of each array in its own way."""
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return jnp.sum(jnp.stack([jnp.sum(jnp.sin(x) * jnp.linspace(1, 2, x.size)) for x in leaves]))


def relative_error(got: Any, want: Any) -> float:
    """Return `||got - want|| / ||want||`; NaN counts as infinite."""
    got, want = np.asarray(got, float), np.asarray(want, float)
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-6)
    return float(np.nan_to_num(error, nan=np.inf))
