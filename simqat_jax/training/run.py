"""Run a planned model: simulated quantization in training, exact codes in evaluation."""

from collections.abc import Callable, Mapping, Sequence

import jax

from simqat_jax.ir.plan import Placement
from simqat_jax.training.evaluation import Evaluation
from simqat_jax.training.ranges import Stats
from simqat_jax.training.simulation import Simulation
from simqat_jax.training.values import Seen, Value

Look = Callable[[Mapping[int, jax.Array]], list[jax.Array]]
"""Looks at values, by their tensors."""


def look_at_nothing(values: Mapping[int, jax.Array]) -> list[jax.Array]:
    """Return nothing."""
    del values
    return []


def run(
    placement: Placement,
    inputs: Sequence[jax.Array],
    stats: Stats,
    *,
    training: bool,
    look: Look = look_at_nothing,
) -> tuple[list[jax.Array], Stats]:
    """Run the model on the values of its inputs.

    Args:
      placement: the model and its quantizers.
      inputs: one value per tensor of `placement.graph.inputs`.
      stats: the state of each of `placement.stateful`, and "step": training steps so far.
      training: observe ranges and simulate; otherwise use the ranges, unchanged, and compute what
        an integer implementation computes.
      look: takes the real values of the tensors that the plan makes, and returns some more.

    Returns:
      The values of `placement.graph.outputs`, then what `look` returned; and the new `stats`.
    """
    this = (Simulation if training else Evaluation)(placement, stats)
    raw = dict(zip(placement.graph.inputs, inputs, strict=True))
    env, seen = {v: Value(x) for v, x in raw.items()}, Seen()
    for v in placement.graph.inputs:
        if v in placement.at:
            env[v] = this.put_on_grid(placement.at[v], env[v].real, seen)
    this.steps(placement.steps, env, seen)
    env.update({v: Value(x) for v, x in raw.items()})  # a model's own input leaves as it came
    outputs = this.results(env, look({v: value.real for v, value in env.items()}))
    if not training:
        return outputs, stats
    states = {name: observation.state for name, observation in seen.items()}
    return outputs, {**stats, **states, "step": stats["step"] + 1}
