"""The four networks of MLPerf Tiny, with names that follow those of their Keras layers.

Their dense layers return logits; the published files put a softmax behind the three classifiers.

Source:
  Banbury et al., arXiv:2106.07597, and the reference models at github.com/mlcommons/tiny.
"""

import functools

import flax.linen as nn
import jax

_BatchNorm = functools.partial(nn.BatchNorm, momentum=0.99, epsilon=1e-3)
"""As Keras makes it."""


class ResNet8(nn.Module):
    """Three residual blocks for images of 32x32, pixels from 0 to 255.

    Attributes:
      num_classes: logits.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(16, (3, 3))(x)))
        for features, strides in ((16, 1), (32, 2), (64, 2)):
            y = nn.relu(norm()(nn.Conv(features, (3, 3), strides)(x)))
            y = norm()(nn.Conv(features, (3, 3))(y))
            if strides > 1:
                x = nn.Conv(features, (1, 1), strides)(x)
            x = nn.relu(x + y)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class MobileNetV1(nn.Module):
    """MobileNetV1 of width 0.25 for images of 96x96, pixels from 0 to 1: a person or none.

    Attributes:
      num_classes: logits.
      blocks: features and strides of each pair of a depthwise and a pointwise convolution.

    Source:
      Howard et al., arXiv:1704.04861.
    """

    num_classes: int = 2
    blocks: tuple[tuple[int, int], ...] = (
        *((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2)),
        *((128, 1),) * 5,
        *((256, 2), (256, 1)),
    )

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(_BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), 2)(x)))
        for index, (features, strides) in enumerate(self.blocks):
            x = nn.relu(norm()(_depthwise(x.shape[-1], strides, index)(x)))
            x = nn.relu(norm()(nn.Conv(features, (1, 1))(x)))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class DSCNN(nn.Module):
    """Depthwise separable convolutions on 49 frames of 10 MFCCs, shape (N, 49, 10, 1): keywords.

    BatchNorm is in the kernels, as in the files that are published.

    Attributes:
      num_classes: logits.

    Source:
      Zhang et al., arXiv:1711.07128.
    """

    num_classes: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(64, (10, 4), 2)(x))
        for index in range(4):
            x = nn.relu(_depthwise(64, 1, index)(x))
            x = nn.relu(nn.Conv(64, (1, 1))(x))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class DenseAutoencoder(nn.Module):
    """An autoencoder of 640 numbers, five frames of 128 mel bands: anomalous sounds.

    Attributes:
      features: of input and output.
    """

    features: int = 640

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for features in (*(128,) * 4, 8, *(128,) * 4):
            x = nn.Dense(features)(x)
            x = nn.relu(_BatchNorm(use_running_average=not train)(x))
        return nn.Dense(self.features)(x)


def _depthwise(channels: int, strides: int, index: int) -> nn.Conv:
    name = f"depthwise_{index}"
    return nn.Conv(channels, (3, 3), strides, feature_group_count=channels, name=name)
