"""MobileNetV2.

Source:
  Sandler et al., arXiv:1801.04381.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Layer = Callable[..., Callable[..., jax.Array]]
"""Makes a layer."""


class InvertedResidual(nn.Module):
    """1x1 to widen, depthwise 3x3, 1x1 to narrow; plus the input where shapes fit."""

    features: int
    strides: int
    expansion: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = nn.relu6(self.norm()(self.conv(hidden, (1, 1))(y)))
        y = self.conv(hidden, (3, 3), self.strides, feature_group_count=hidden)(y)
        y = nn.relu6(self.norm()(y))
        y = self.norm()(self.conv(self.features, (1, 1))(y))
        return x + y if x.shape == y.shape else y


GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, features, number of blocks and stride of the first, for each group of MobileNetV2."""


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.

    Attributes:
      num_classes: logits.
      cifar_stem: strides of 1 in the stem and the second group, for 32x32 images.
      dtype: of the computation; parameters and statistics are float32.
      groups: expansion, features, number of blocks and stride of the first of each group.
    """

    num_classes: int = 10
    cifar_stem: bool = True
    dtype: DTypeLike = jnp.float32
    groups: tuple[tuple[int, int, int, int], ...] = GROUPS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        first = 1 if self.cifar_stem else 2
        x = nn.relu6(norm()(conv(32, (3, 3), first)(x)))
        for number, (expansion, features, blocks, strides) in enumerate(self.groups):
            for index in range(blocks):
                step = (first if number == 1 else strides) if index == 0 else 1
                x = InvertedResidual(features, step, expansion, conv=conv, norm=norm)(x)
        x = nn.relu6(norm()(conv(1280, (1, 1))(x)))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
