"""Residual networks: ResNet-18 and -50 (ImageNet or CIFAR stem) and ResNet-20 for CIFAR.

Source:
  He et al., arXiv:1512.03385. The stride of a bottleneck is on its 3x3 convolution.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Layer = Callable[..., Callable[..., jax.Array]]
"""Makes a layer, or a block of them."""


class Block(nn.Module):
    """What both blocks share: how they are made, and the shortcut.

    Attributes:
      features: of the inner convolutions.
      strides: of the first 3x3 convolution and of the shortcut.
      conv: makes a convolution.
      norm: makes a BatchNorm.
    """

    features: int
    strides: int
    conv: Layer
    norm: Layer

    @nn.nowrap
    def around(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return ReLU of `x + y`, with a 1x1 convolution of `x` where their shapes differ."""
        if x.shape != y.shape:
            x = self.conv(y.shape[-1], (1, 1), self.strides, name="conv_shortcut")(x)
            x = self.norm(name="norm_shortcut")(x)
        return nn.relu(x + y)


class BasicBlock(Block):
    """Two 3x3 convolutions and the shortcut around them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(self.features, (3, 3))(y))
        return self.around(x, y)


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolution, four times as wide at the end, and the shortcut."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.features, (1, 1))(y))
        return self.around(x, y)


class ResNet(nn.Module):
    """A residual network.

    Attributes:
      stage_sizes: blocks in each stage; from one to the next width doubles and the image halves.
      block: BasicBlock or BottleneckBlock.
      width: features of the first stage.
      num_classes: logits.
      cifar_stem: a 3x3 convolution instead of 7x7 with stride 2 and a max pool.
      dtype: of the computation; parameters and statistics are float32.
    """

    stage_sizes: Sequence[int]
    block: Layer
    width: int = 64
    num_classes: int = 10
    cifar_stem: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        conv = functools.partial(
            nn.Conv,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        if self.cifar_stem:
            x = nn.relu(norm(name="norm_stem")(conv(self.width, (3, 3), name="conv_stem")(x)))
        else:
            x = conv(self.width, (7, 7), 2, padding=3, name="conv_stem")(x)
            x = nn.relu(norm(name="norm_stem")(x))
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))  # type: ignore[arg-type]
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.width * 2**stage, strides, conv=conv, norm=norm)(x)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


ResNet20 = functools.partial(ResNet, stage_sizes=(3, 3, 3), block=BasicBlock, width=16)
ResNet18 = functools.partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet50 = functools.partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BottleneckBlock)
