"""Run the steps of a planned call one by one, quantized or in float."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from simqat_jax.ir.graph import BatchNorm, Product
from simqat_jax.ir.plan import Placement, Step
from simqat_jax.numerics.grid import Grid
from simqat_jax.training.evaluation import Evaluation
from simqat_jax.training.ranges import Stats
from simqat_jax.training.simulation import Simulation
from simqat_jax.training.values import Run, Value, Values


class Steps:
    """The steps of a planned call, each compiled by itself.

    Args:
      placement: the call and its quantizers.
      stats: their ranges; None: run the float model.
    """

    def __init__(self, placement: Placement, stats: Stats | None):
        self.placement = placement if stats is not None else _in_float(placement)
        self._run = (_Quantized if stats is not None else Simulation)(self.placement, stats or {})
        self._compiled = functools.cache(self._compile)

    def start(self, inputs: Sequence[jax.Array]) -> Values:
        """Return the tensors that a run starts from: the call's inputs, on their grids."""
        env = {v: Value(x) for v, x in zip(self.placement.graph.inputs, inputs, strict=True)}
        for v in self.placement.graph.inputs:
            if v in self.placement.at:
                env[v] = self._run.put_on_grid(self.placement.at[v], env[v].real, {})
        return env

    def results(self, number: int, env: Values) -> Values:
        """Return the tensors that leave a step."""
        return self._compiled(_results, number)(self._read(number, env))

    def moments(self, number: int, env: Values) -> tuple[jax.Array, jax.Array, Values]:
        """Return mean and variance of each channel of a step's result before its clamp.

        And the tensors that leave it.
        """
        return self._compiled(_moments, number)(self._read(number, env))

    def _read(self, number: int, env: Values) -> Values:
        inputs = (v for node in self.placement.steps[number].nodes for v in node.inputs)
        return {v: env[v] for v in inputs if isinstance(v, int) and v in env}

    def _compile(self, compute: Callable[..., Any], number: int) -> Callable[[Values], Any]:
        return jax.jit(functools.partial(compute, self._run, self.placement.steps[number]))


class _Quantized(Evaluation):
    """Evaluation without its integers: but for rare roundings the same, and half the work."""

    def integer_form(
        self, step: Step, grid: Grid, operands: list[Value], env: Values
    ) -> jax.Array | None:
        """There is none: codes are those of the real result."""
        del step, grid, operands, env


def _in_float(placement: Placement) -> Placement:
    """Return the plan of the float model: it has no quantizers."""
    steps = tuple(dataclasses.replace(s, fold="none", quantized=False) for s in placement.steps)
    nothing: dict[str, Any] = {name: {} for name in ("at", "grids", "weights", "constants")}
    return dataclasses.replace(placement, steps=steps, freeze_bn=None, **nothing)


def _results(run: Run, step: Step, env: Values) -> Values:
    results = dict(env)
    run.step(step, results, {})
    return {v: value for v, value in results.items() if v not in env}


def _moments(run: Run, step: Step, env: Values) -> tuple[jax.Array, jax.Array, Values]:
    _, x = run.simulate(step, run.operands(step, env, {}), dict(env), {})
    x, node = x.astype(jnp.float32), step.norm or step.node
    assert isinstance(node, BatchNorm | Product)
    channels = node.axes if isinstance(node, BatchNorm) else node.channel_axes
    axes = tuple(axis for axis in range(x.ndim) if axis not in channels)
    mean = jnp.mean(x, axis=axes, keepdims=True)
    var = jnp.mean(jnp.square(x - mean), axis=axes)
    return mean.reshape(-1), var.reshape(-1), _results(run, step, env)
