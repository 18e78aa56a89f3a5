"""The collections `quant_stats` and `quant_params`: what evaluating a model needs of them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from simqat_jax.ir.plan import Placement, Quantizer
from simqat_jax.numerics.arguments import check_mapping
from simqat_jax.numerics.observers import Range

COLLECTION = "quant_stats"
STEPS = "quant_params"
"""The collection of learned steps, by the names of their quantizers."""
OWN = (COLLECTION, STEPS)
"""The collections that the float model has not."""
STEP = "step"
"""The entry that counts training steps."""
_COLLECTION = "Pass the collection variables['quant_stats']."
_OBSERVE = (
    "Train with mutable=['batch_stats', 'quant_stats'], or calibrate(qmodel, variables, batches), "
    "and evaluate with the quant_stats that come back."
)
_BROKEN = "Take the quant_stats of an earlier checkpoint, or of init, and calibrate again."
Stats = Mapping[str, Any]
"""The state of each quantizer with one, by name, and "step": training steps so far."""


def ranges_and_steps(variables: Mapping[str, Any]) -> tuple[Stats, Stats]:
    """Return the collections that the float model has not, empty where there are none."""
    return variables.get(COLLECTION, {}), variables.get(STEPS, {})


def initial(quantizer: Quantizer | None) -> Any:
    """Return the first state of a quantizer; of None: of the count of training steps."""
    return jnp.zeros((), jnp.int32) if quantizer is None else quantizer.observer.init()


def restored(placement: Placement, stats: Stats, steps: Stats) -> dict[str, Any]:
    """Return what `stats` and learned `steps` hold of what a model needs, in order.

    Their types are restored, and each learned step is joined with the range that it starts from.
    """
    learned = placement.learned
    known = {
        name: learned[name].joined(stats[name], steps[name])
        if name in learned
        else quantizer.observer.restore(stats[name])
        for name, quantizer in placement.stateful.items()
        if stats.get(name) is not None and (name not in learned or name in steps)
    }
    return {STEP: stats[STEP], **known} if stats.get(STEP) is not None else known


def parted(
    placement: Placement, stats: Stats, trained: ArrayLike
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Return what `quant_stats` and `quant_params` hold of joined states.

    Args:
      placement: the planned model.
      stats: after a call, or several.
      trained: how many training steps there were before.
    """
    pairs = {name: o.parted(stats[name], trained) for name, o in placement.learned.items()}
    ranges = {name: range_ for name, (range_, _) in pairs.items()}
    return {**stats, **ranges}, {name: step for name, (_, step) in pairs.items()}


def check(placement: Placement, stats: Stats, steps: Stats) -> dict[str, Any]:
    """Return the ranges that a model evaluates with.

    Args:
      placement: the planned model.
      stats: the collection.
      steps: the collection of learned steps.

    Raises:
      TypeError: `stats` or `steps` is no dictionary.
      ValueError: a range is missing or, where values are at hand (outside of jit), empty or not
        finite; training counted more operations of one kind than this call has.
    """
    check_mapping("quant_stats", stats, "Pass the collection that init and apply return.")
    _check_numbers(placement, stats)
    _check_folds(placement, stats)
    known = restored(placement, stats, steps)
    _check_learned(placement, steps, known.get(STEP, 0))
    missing = [name for name in (*placement.stateful, STEP) if name not in known]
    if missing:
        raise ValueError(
            f"the variables hold no quant_stats for {', '.join(missing)}. Pass the quant_stats "
            "of this model's init (called with the same kind of arguments), or make the "
            "collection mutable in a call of the same method: apply(..., mutable=['quant_stats'])."
            f"{_integers(placement)}"
        )
    early = {n: o.for_evaluation(known[n], known[STEP]) for n, o in placement.learned.items()}
    known = {**known, **early}
    ends = {name: q.observer.range(known[name]) for name, q in placement.stateful.items()}
    concrete = {name: pair for name, pair in ends.items() if _is_concrete(pair[0])}
    empty = [name for name, (lo, hi) in concrete.items() if _is_empty(lo, hi)]
    if empty:
        raise ValueError(
            f"the ranges of {', '.join(empty)} were never observed, so evaluation has no grid for "
            f"them. {_OBSERVE}"
        )
    broken = [name for name, pair in concrete.items() if not _is_finite(pair)]
    if broken:
        raise ValueError(f"the ranges of {', '.join(broken)} hold NaN or Inf. {_BROKEN}")
    return known


def _integers(placement: Placement) -> str:
    """Say what may be meant where a call has inputs of integers."""
    graph = placement.graph
    types = {str(graph.avals[v].dtype) for v in graph.arguments}
    whole = sorted(t for t in types if not jnp.issubdtype(jnp.dtype(t), jnp.floating))
    if not whole:
        return ""
    return (
        f" This call has an input of type {', '.join(whole)}: where init had real values, pass "
        "those, x.astype('float32') / 255 for bytes scaled to [0, 1]."
    )


def check_all(variables: Mapping[str, Any], delay: int) -> None:
    """Check every range and learned step that variables hold, whatever call needs it.

    Args:
      variables: all of a model.
      delay: of the learned step that starts last.

    Raises:
      TypeError: variables that are traced; a collection that holds anything but ranges.
      ValueError: no ranges; one that was never observed, or is not finite; a step of 0.
    """
    stats, steps = ranges_and_steps(variables)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((stats, steps))):
        raise TypeError("check looks at values, and these are traced: call it outside of jit.")
    check_mapping(COLLECTION, stats, _COLLECTION)
    ends = {name: _ends(name, state) for name, state in _states(stats)}
    if not ends:
        raise ValueError(f"the variables hold no quant_stats. {_OBSERVE}")
    empty = [name for name, pair in ends.items() if _is_empty(*pair)]
    if empty:
        raise ValueError(f"the ranges of {', '.join(empty)} were never observed. {_OBSERVE}")
    broken = [name for name, pair in ends.items() if not _is_finite(pair)]
    if broken:
        raise ValueError(f"the ranges of {', '.join(broken)} hold NaN or Inf. {_BROKEN}")
    unset = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, step in jax.tree.leaves_with_path(steps)
        if not _is_step(step, early=bool(delay) and int(stats.get(STEP, delay + 1)) <= delay)
    ]
    if unset:
        raise ValueError(
            f"the learned steps of {', '.join(unset)} are 0: they were never set. {_OBSERVE}"
        )


def _is_step(step: ArrayLike, *, early: bool) -> bool:
    """Whether there is a learned step, or need not be one yet, `early`."""
    return early or bool(np.all(np.asarray(step)))


def _is_concrete(value: object) -> bool:
    return not isinstance(value, Tracer)


def _is_empty(lo: ArrayLike, hi: ArrayLike) -> bool:
    return bool(np.any(np.asarray(lo) > np.asarray(hi)))


def _is_finite(pair: Range) -> bool:
    return all(bool(np.all(np.isfinite(np.asarray(end)))) for end in pair)


def check_steps(placement: Placement, steps: Stats) -> None:
    """Raise ValueError if a learned step is missing."""
    check_mapping(STEPS, steps, "Pass the collection that init and apply return.")
    missing = [name for name in placement.learned if name not in steps]
    if missing:
        raise ValueError(
            f"the variables hold no {STEPS} for {', '.join(missing)}. Pass those of this model's "
            f"init, or set them from data with apply(..., mutable=['{COLLECTION}', '{STEPS}'])."
        )


def _check_learned(placement: Placement, steps: Stats, trained: ArrayLike) -> None:
    """Raise ValueError if a learned step is missing or, where values are at hand, 0."""
    check_steps(placement, steps)
    if not _is_concrete(trained):
        return
    known = {name: o for name, o in placement.learned.items() if _is_concrete(steps[name])}
    count = int(np.asarray(trained))  # not an array, which is unknown while a call is traced
    early = {name: bool(observer.is_early(count)) for name, observer in known.items()}
    unset = [name for name in known if not _is_step(steps[name], early=early[name])]
    if unset:
        raise ValueError(
            f"the learned steps of {', '.join(unset)} are 0: they were never set. Set them by "
            f"calibrate, or with apply(..., mutable=['{COLLECTION}', '{STEPS}']), before training, "
            "or once their quant_delay has passed."
        )


def _check_numbers(placement: Placement, stats: Stats) -> None:
    """Raise ValueError if training counted more operations of one kind than this call has.

    The first add of a module in training need not be its first add here.
    """
    kinds = {_unnumbered(name) for name in placement.numbered}
    extra = [k for k in stats if k not in placement.stateful and _unnumbered(k) in kinds]
    if extra:
        raise ValueError(
            f"quant_stats holds {', '.join(extra)}, and this call makes fewer operations of that "
            "kind, so that their ranges cannot be told apart. Put what only training computes "
            "into a module of its own, or make the same operations in training and evaluation."
        )


def _check_folds(placement: Placement, stats: Stats) -> None:
    """Raise ValueError if training did not fold a BatchNorm that this call folds.

    The layer in front of it had another result then, under the name that its fold has here.
    """
    norms = [step.norm.layer.path for step in placement.steps if step.norm is not None]
    names = ["/".join((*path, "output")) for path in norms]
    apart = [name for name in names if name in stats and name not in placement.stateful]
    if apart:
        raise ValueError(
            f"quant_stats holds {', '.join(apart)}: where these ranges were taken, more than the "
            "BatchNorm read the layer in front of it, so that it was not folded, and here it is. "
            "Let the same layers read it in both calls, or take ranges anew from init's "
            "quant_stats."
        )


def _unnumbered(name: str) -> str:
    return re.sub(r"_\d+(?=/output$)", "", name)


def nonfinite_ranges(quant_stats: Stats) -> dict[str, int]:
    """Name the tensors that held NaN or Inf.

    Args:
      quant_stats: the collection, after training steps; of a model inside another one as well.

    Returns:
      For each such tensor the number of steps in which it did. Those batches did not enter its
      range.

    Raises:
      TypeError: no collection, or an entry that is no range.

    Examples:
      >>> nonfinite_ranges({"input": init_range()})
      {}
    """
    check_mapping("quant_stats", quant_stats, _COLLECTION)
    if COLLECTION in quant_stats:
        raise TypeError(
            f"a dictionary of all variables ({', '.join(quant_stats)}) is no range. {_COLLECTION}"
        )
    counts = {name: int(np.asarray(_nonfinite(name, s))) for name, s in _states(quant_stats)}
    return {name: count for name, count in counts.items() if count}


def _states(stats: Stats, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each state, whatever its observer, and however it was restored."""
    for name, value in stats.items():
        if isinstance(value, Mapping) and "nonfinite" not in value:
            yield from _states(value, f"{path}{name}/")
        elif name != STEP:
            yield path + name, value


def _ends(name: str, state: Any) -> Range:
    """Return the range in a state; the first two fields of what an observer stores are its ends."""
    if isinstance(state, Mapping):
        return state["lo"], state["hi"]
    _nonfinite(name, state)
    return state[0], state[1]


def _nonfinite(name: str, state: object) -> ArrayLike:
    if isinstance(state, Mapping):
        return state["nonfinite"]
    if isinstance(state, Sequence) and not isinstance(state, str) and len(state) > 1:
        return getattr(state, "nonfinite", state[-1])
    kind = type(state).__name__
    raise TypeError(f"{name}: a {kind} is no range. {_COLLECTION}")
