"""Evaluation as one compiled program, also where the caller uses no jit."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence

import jax

from simqat_jax.capture.state import Beside
from simqat_jax.ir.fingerprint import UnknownError, fingerprint
from simqat_jax.ir.plan import Placement
from simqat_jax.training.ranges import Stats
from simqat_jax.training.run import run

_KEPT = 64
"""Calls whose programs are kept; of another one the oldest makes room."""

_Program = Callable[[Sequence[jax.Array], Stats], list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class _Key:
    """A planned call, equal to others that compute the same."""

    fingerprint: Hashable
    placement: Placement = dataclasses.field(compare=False)
    seen: Beside = dataclasses.field(compare=False)


def evaluate(
    placement: Placement,
    inputs: Sequence[jax.Array],
    stats: Stats,
    seen: Beside,
    about: object,
) -> list[jax.Array]:
    """Evaluate a planned call; calls that compute the same share one compiled program.

    The model is captured anew in every call, so that nothing is assumed of it: what it computes is
    compared with what has been compiled.

    Args:
      placement: the planned model.
      inputs: one value per tensor of `placement.graph.inputs`.
      stats: the ranges.
      seen: what to return as well.
      about: what else the call depends on: configuration, the model's attributes.

    Returns:
      The values of `placement.graph.outputs`, then those of `seen`.
    """
    try:
        program = _kept(_Key(fingerprint((placement.graph, seen, about)), placement, seen))
    except UnknownError:  # inside of a transformation that the model's constants are part of
        program = _compiled(placement, seen)
    return program(inputs, stats)


def _compiled(placement: Placement, seen: Beside) -> _Program:
    def evaluation(inputs: Sequence[jax.Array], stats: Stats) -> list[jax.Array]:
        return run(placement, inputs, stats, training=False, look=seen.values)[0]

    return jax.jit(evaluation)


@functools.lru_cache(maxsize=_KEPT)
def _kept(key: _Key) -> _Program:
    return _compiled(key.placement, key.seen)
