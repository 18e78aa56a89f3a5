"""Range observers: how the range of a quantizer follows its data, one file each."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from simqat_jax.numerics.observers.batch import Batch
from simqat_jax.numerics.observers.ema import Ema
from simqat_jax.numerics.observers.entropy import Entropy
from simqat_jax.numerics.observers.extremes import (
    Extremes,
    OfExtremes,
    RangeState,
    extremes,
    init_range,
    observed,
)
from simqat_jax.numerics.observers.fixed import Fixed
from simqat_jax.numerics.observers.learned import Learned, LearnedState
from simqat_jax.numerics.observers.minmax import MinMax
from simqat_jax.numerics.observers.mse import Mse
from simqat_jax.numerics.observers.observer import AxisName, Observer, Range, Role, State
from simqat_jax.numerics.observers.percentile import Percentile
from simqat_jax.numerics.spec import QuantSpec

OBSERVERS: dict[str, type[Observer]] = {
    "ema": Ema,
    "minmax": MinMax,
    "batch": Batch,
    "percentile": Percentile,
    "mse": Mse,
    "entropy": Entropy,
    "fixed": Fixed,
    "learned": Learned,
}
"""By the name that `QuantSpec.observer` has for them."""

__all__ = [
    "OBSERVERS",
    "AxisName",
    "Learned",
    "LearnedState",
    "Observer",
    "Range",
    "RangeState",
    "Role",
    "State",
    "init_range",
    "observe",
    "observed",
    "update_range",
]


def update_range(state: RangeState, lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> RangeState:
    """Take one batch's extremes into the state, see `checked.update_range`."""
    observer = OBSERVERS[spec.observer](spec)
    if not isinstance(observer, OfExtremes):
        known = ", ".join(name for name, kind in OBSERVERS.items() if issubclass(kind, OfExtremes))
        raise ValueError(
            f"a RangeState follows the extremes of batches ({known}), and observer "
            f"{spec.observer!r} does not: it serves models, as QuantSpec(observer="
            f"{spec.observer!r}) of a SimQATConfig."
        )
    lo, hi = jnp.asarray(lo, jnp.float32), jnp.asarray(hi, jnp.float32)
    if lo.shape != state.lo.shape or hi.shape != state.hi.shape:
        raise ValueError(
            f"lo of shape {lo.shape} and hi of shape {hi.shape} do not fit a range of shape "
            f"{state.lo.shape}."
        )
    return observer.update(state, Extremes(lo, hi))


def observe(
    state: RangeState, x: ArrayLike, spec: QuantSpec, channel_axis: int | None = -1
) -> RangeState:
    """Take the extremes of `x` into the state, see `checked.observe`."""
    x = jnp.asarray(x)
    if x.size == 0:
        raise ValueError(f"x is an empty array of shape {x.shape}: it has no range.")
    if not spec.per_channel:
        channel_axis = None
    elif channel_axis is None or not -x.ndim <= channel_axis < x.ndim:
        raise ValueError(
            f"a per-channel range needs a channel axis: channel_axis is {channel_axis} and x has "
            f"shape {x.shape}."
        )
    return update_range(state, *extremes(x, channel_axis), spec)
