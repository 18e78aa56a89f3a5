"""EfficientNet-Lite0: EfficientNet without squeeze and excitation, with ReLU6, for integers.

Source:
  Tan and Le, arXiv:1905.11946. "Lite" is the variant that its authors published for integer
  hardware; dropout and stochastic depth of its training are left out.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Layer = Callable[..., Callable[..., jax.Array]]
"""Makes a layer."""


class MBConv(nn.Module):
    """1x1 to widen, depthwise, 1x1 to narrow; plus the input where shapes fit."""

    features: int
    kernel: int
    strides: int
    expansion: int
    conv: Layer
    norm: Layer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = x.shape[-1] * self.expansion
        y = x
        if self.expansion > 1:
            y = self.conv(hidden, (1, 1), name="expand")(y)
            y = nn.relu6(self.norm(name="norm_expand")(y))
        y = self.conv(
            hidden,
            (self.kernel, self.kernel),
            self.strides,
            feature_group_count=hidden,
            name="depthwise",
        )(y)
        y = nn.relu6(self.norm(name="norm_depthwise")(y))
        y = self.conv(self.features, (1, 1), name="project")(y)
        y = self.norm(name="norm_project")(y)
        return x + y if x.shape == y.shape else y


GROUPS = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
"""Expansion, kernel size, features, number of blocks and stride of the first, for each group."""


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0, for images of 224x224.

    Attributes:
      num_classes: logits.
      dtype: of the computation; parameters and statistics are float32.
      groups: expansion, kernel size, features, number of blocks and stride of the first of each
        group.
    """

    num_classes: int = 1000
    dtype: DTypeLike = jnp.float32
    groups: tuple[tuple[int, int, int, int, int], ...] = GROUPS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, padding="SAME", dtype=self.dtype)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.99,
            epsilon=1e-3,
            dtype=self.dtype,
        )
        x = nn.relu6(norm(name="norm_stem")(conv(32, (3, 3), 2, name="stem")(x)))
        number = 0
        for expansion, kernel, features, blocks, strides in self.groups:
            for index in range(blocks):
                step = strides if index == 0 else 1
                block = MBConv(
                    features, kernel, step, expansion, conv=conv, norm=norm, name=f"block_{number}"
                )
                x = block(x)
                number += 1
        x = nn.relu6(norm(name="norm_head")(conv(1280, (1, 1), name="head")(x)))
        x = x.mean(axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
        return x.astype(jnp.float32)
