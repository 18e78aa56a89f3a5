"""Vision Transformer and MLP-Mixer."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class MLP(nn.Module):
    """Two dense layers with GELU between; the features of (..., C) stay as many."""

    hidden: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(features, dtype=self.dtype)(x)


class EncoderBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a shortcut."""

    heads: int
    hidden: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MLP(self.hidden, dtype=self.dtype)(y)


class VisionTransformer(nn.Module):
    """Classify images of shape (N, H, W, C) into logits of shape (N, num_classes).

    The defaults are ViT-S.

    Source:
      Dosovitskiy et al., arXiv:2010.11929, section 3.1: a class token, learned positions, LayerNorm
      in front of each part.
    """

    num_classes: int = 1000
    patch: int = 16
    layers: int = 12
    width: int = 384
    heads: int = 6
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train  # No dropout and no batch statistics: both modes are the same.
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
        token = jnp.broadcast_to(token, (x.shape[0], 1, self.width)).astype(x.dtype)
        x = jnp.concatenate([token, x], axis=1)
        shape = (1, *x.shape[1:])
        x = x + self.param("positions", nn.initializers.normal(0.02), shape).astype(x.dtype)
        for _ in range(self.layers):
            x = EncoderBlock(self.heads, 4 * self.width, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)


class MixerBlock(nn.Module):
    """An MLP across patches and one across features, each behind a LayerNorm."""

    across_patches: int
    across_features: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(dtype=self.dtype)(x).swapaxes(1, 2)
        x = x + MLP(self.across_patches, dtype=self.dtype)(y).swapaxes(1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        return x + MLP(self.across_features, dtype=self.dtype)(y)


class MLPMixer(nn.Module):
    """Classify images of shape (N, H, W, C) into logits of shape (N, num_classes).

    The defaults are Mixer-S/16.

    Source:
      Tolstikhin et al., arXiv:2105.01601.
    """

    num_classes: int = 1000
    patch: int = 16
    layers: int = 8
    width: int = 512
    across_patches: int = 256
    across_features: int = 2048
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, window, padding="VALID", dtype=self.dtype)(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.layers):
            x = MixerBlock(self.across_patches, self.across_features, dtype=self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x).astype(jnp.float32)
