"""What Flax's norms compute, as a Norm needs to know it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn


def norm_form(module: Any, shape: Sequence[int], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of a Norm for a layer of Flax on a tensor of this shape.

    Args:
      module: an `nn.LayerNorm`, `nn.RMSNorm`, `nn.GroupNorm` or `nn.InstanceNorm`.
      shape: of its input.
      names: of its parameters.
    """
    rank = len(shape)
    groups = None
    if isinstance(module, nn.GroupNorm):
        size = module.group_size
        groups = module.num_groups if size is None else shape[-1] // size
        reduced = module.reduction_axes
        axes = range(1, rank) if reduced is None else _axes(reduced, rank)
        # Of the last axis what is in a group, which is the one behind it.
        axes = sorted(a if a != rank - 1 else rank for a in {*axes, rank - 1})
        features = (rank - 1,)
    elif isinstance(module, nn.InstanceNorm):
        features = _axes(module.feature_axes, rank)
        axes = [a for a in range(1, rank) if a not in features]
    else:
        features = _axes(module.feature_axes, rank)
        axes = _axes(module.reduction_axes, rank)
    return {
        "axes": tuple(axes),
        "groups": groups,
        "feature_axes": features,
        "centered": not isinstance(module, nn.RMSNorm),
        "epsilon": float(module.epsilon),
        "affine": names,
    }


def _axes(axes: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return tuple(sorted(a % rank for a in ((axes,) if isinstance(axes, int) else axes)))
