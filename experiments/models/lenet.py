"""LeNet-5 for 32x32 digits."""

import flax.linen as nn
import jax


class LeNet5(nn.Module):
    """Classify images of shape (N, 32, 32, C) into logits of shape (N, num_classes).

    Source:
      LeCun et al., "Gradient-based learning applied to document recognition", 1998, in the
      form of the source system: ReLU, max pooling, convolutions without bias.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train  # No dropout and no batch statistics: both modes are the same.
        x = nn.relu(nn.Conv(6, (5, 5), padding="VALID", use_bias=False)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), padding="VALID", use_bias=False)(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(120)(x))
        x = nn.relu(nn.Dense(84)(x))
        return nn.Dense(self.num_classes)(x)
