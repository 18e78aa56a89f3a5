"""A recurrent network on the rows of images."""

from typing import Any

import flax.linen as nn
import jax


class RowLSTM(nn.Module):
    """Classify images of shape (N, H, W, C) into logits of shape (N, num_classes).

    An LSTM reads the rows from the top down, some in each step; its last output is classified.

    Source:
      Le et al., arXiv:1504.00941, read digits so, pixel by pixel.
    """

    num_classes: int = 10
    features: int = 64
    rows: int = 4
    """Read in one step; every step is compiled by itself."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        rows = x.reshape(x.shape[0], x.shape[1] // self.rows, -1)
        outputs: Any = nn.RNN(nn.OptimizedLSTMCell(self.features))(rows)
        return nn.Dense(self.num_classes)(outputs[:, -1])
