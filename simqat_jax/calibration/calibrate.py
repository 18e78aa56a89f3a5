"""Calibrate: take ranges from data, without training."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import VariableDict

from simqat_jax.calibration.batches import Batches, arguments
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.variables import floats
from simqat_jax.ir.plan import Placement, Quantizer
from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.observers import OBSERVERS, Batch, Ema, Learned, LearnedState
from simqat_jax.training.module import Method, QuantizedModule
from simqat_jax.training.ranges import COLLECTION, STEP, STEPS, Stats, initial, parted
from simqat_jax.training.run import run

_NEVER = 2**30
"""A step of training that does not come."""
_NAMED = 3
"""How many batches, and tensors of each, a message names."""


def calibrate(
    qmodule: QuantizedModule,
    variables: VariableDict,
    batches: Batches,
    *,
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> dict[str, Any]:
    """Take the ranges of all quantizers from data; nothing is trained.

    Each batch is one call in evaluation, compiled once for each shape: BatchNorm uses its running
    statistics, parameters and statistics stay, and no training step is counted. What is observed is
    the float model, so that the ranges do not depend on how coarse any grid is. A second call goes
    on where the first one ended.

    The observers `ema` and `batch` forget earlier batches, and calibration data have no order: here
    both take the extremes of all batches, as `minmax` does. Training that goes on from there
    follows its own batches, with the observer as it is configured. Steps of `learned` start anew,
    from the grids of `mse`: with few bits those of the extremes are several times coarser.

    A batch with NaN or Inf in a quantized tensor is left out of all ranges; a warning names it, and
    `nonfinite_ranges` counts such batches.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: those of the float model, trained, with or without `quant_stats`.
      batches: yields the call's arguments: an array, or a tuple of several arguments.
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The variables, with ranges in `quant_stats`, and in `quant_params` the steps to be learned.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables, an array in the place of batches.
      ValueError: no batch, an empty one, NaN or Inf in every one, or a call of training.

    Examples:
      >>> qmodel = SimQAT().apply(nn.Dense(2))
      >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> batches = [jnp.ones((4, 3)), 2 * jnp.ones((4, 3))]
      >>> calibrate(qmodel, variables, batches, progress=False)["quant_stats"]["input"].hi
      Array(2., dtype=float32)
    """
    call, known = EvaluationCall(qmodule, method, kwargs), floats(variables)
    observe = jax.jit(functools.partial(_observe, call))
    placement: Placement | None = None
    stats: Stats = {}
    broken: dict[int, list[str]] = {}
    for number, args in arguments(batches, "calibrate", progress):
        if placement is None:
            placement, stats = _start(call, variables, args)
        stats, nonfinite = observe(known, stats, args)
        broken[number] = [name for name, found in jax.device_get(nonfinite).items() if found]
    _tell(broken)
    assert placement is not None, "no batch is an error"
    ranges, steps = parted(placement, {**stats, **_learned(placement, stats)}, stats[STEP])
    return {**variables, COLLECTION: ranges} | ({STEPS: steps} if steps else {})


def _start(call: EvaluationCall, variables: VariableDict, args: tuple) -> tuple[Placement, Stats]:
    """Return the plan and the first states, in the place of learned steps of what observes."""
    placement, stats = call.start(variables, args)
    observing = _observing(placement).stateful
    return placement, {**stats, **{name: initial(observing[name]) for name in placement.learned}}


def _learned(placement: Placement, stats: Stats) -> dict[str, LearnedState]:
    """Return the states of learned steps that start from what was observed in their place."""
    seen = _observing(placement).stateful
    return {
        name: observer.joined(
            (*seen[name].observer.range(stats[name]), stats[name].nonfinite), observer.init().step
        )
        for name, observer in placement.learned.items()
    }


def _observe(
    call: EvaluationCall, variables: VariableDict, stats: Stats, args: tuple
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Observe a batch; return the new state of the ranges, and which of them had NaN or Inf."""
    captured = call.captured(variables, args)
    placement = _observing(call.planned(captured))
    _, seen = run(placement, captured.inputs, stats, training=True)
    names = list(placement.stateful)
    nonfinite = {name: seen[name].nonfinite > stats[name].nonfinite for name in names}
    left_out = jnp.any(jnp.stack(list(nonfinite.values())))
    kept = {name: stats[name]._replace(nonfinite=seen[name].nonfinite) for name in names}
    new = {
        name: jax.tree.map(functools.partial(jnp.where, left_out), kept[name], seen[name])
        for name in names
    }
    return {**seen, **new, STEP: stats[STEP]}, nonfinite


def _observing(placement: Placement) -> Placement:
    """Return a plan that observes and never quantizes, and gives all batches the same weight."""

    def observing(quantizer: Quantizer) -> Quantizer:
        spec = dataclasses.replace(quantizer.spec, quant_delay=_NEVER)
        kind = OBSERVERS[spec.observer]
        if quantizer.has_state and issubclass(kind, Ema | Batch):
            spec = dataclasses.replace(spec, observer="minmax")
        if issubclass(kind, Learned):
            spec = dataclasses.replace(spec, observer="mse")
        return dataclasses.replace(quantizer, spec=spec)

    return dataclasses.replace(
        placement,
        at={v: observing(q) for v, q in placement.at.items()},
        weights={node: observing(q) for node, q in placement.weights.items()},
        constants={slot: observing(q) for slot, q in placement.constants.items()},
    )


def _tell(nonfinite: Mapping[int, list[str]]) -> None:
    """Warn of batches that were left out; raise ValueError where all of them were.

    Args:
      nonfinite: of each batch the names of the ranges that found NaN or Inf in it.
    """
    broken, count = {number: names for number, names in nonfinite.items() if names}, len(nonfinite)
    if not broken:
        return
    named = [f"batch {number}: {_listed(names)}" for number, names in broken.items()]
    listing = f"{_listed(named, '; ')} (batches are numbered from 0)"
    if len(broken) == count:
        raise ValueError(
            f"calibrate: NaN or Inf in every batch, so that there is nothing to take ranges from. "
            f"{listing}. Look at the data, and at the parameters if it is finite."
        )
    warnings.warn(
        f"calibrate left out {len(broken)} of {count} batches, for NaN or Inf. {listing}.",
        stacklevel=3,
    )


def _listed(names: list[str], by: str = ", ") -> str:
    more = f"{by}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return by.join(names[:_NAMED]) + more
