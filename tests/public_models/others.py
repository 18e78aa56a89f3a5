"""Models that are no classifiers of images or text: U-Net, VAE, DLRM, PPO, LSTM."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from public_models.kinds import Public, images, rows, tokens, with_train


class DoubleConv(nn.Module):
    """Two convolutions with BatchNorm."""

    features: int

    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return x


class UNet(nn.Module):
    """Down by pooling; up by a transposed convolution and by resizing, with skips."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        a = DoubleConv(6)(x, train)
        b = DoubleConv(8)(nn.max_pool(a, (2, 2), (2, 2)), train)
        x = DoubleConv(12)(nn.max_pool(b, (2, 2), (2, 2)), train)
        n, h, w, c = x.shape
        x = jax.image.resize(x, (n, 2 * h, 2 * w, c), "nearest")
        x = DoubleConv(8)(jnp.concatenate([b, x], axis=-1), train)
        x = nn.ConvTranspose(6, (2, 2), strides=(2, 2))(x)
        x = DoubleConv(6)(jnp.concatenate([a, x], axis=-1), train)
        return nn.Conv(2, (1, 1))(x)


class Encoder(nn.Module):
    """To mean and log-variance."""

    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24, name="fc1")(x))
        mean = nn.Dense(self.latents, name="fc2_mean")(x)
        logvar = nn.Dense(self.latents, name="fc2_logvar")(x)
        return mean, logvar


class Decoder(nn.Module):
    """From latents to logits of pixels."""

    pixels: int

    @nn.compact
    def __call__(self, z):
        z = nn.relu(nn.Dense(24, name="fc1")(z))
        return nn.Dense(self.pixels, name="fc2")(z)


class VAE(nn.Module):
    """Returns the reconstruction and the divergence of its latents."""

    latents: int = 4

    @nn.compact
    def __call__(self, x, train: bool = False):
        mean, logvar = Encoder(self.latents)(x)
        z = mean
        if train:
            std = jnp.exp(0.5 * logvar)
            z = mean + std * jax.random.normal(self.make_rng("dropout"), logvar.shape)
        recon = Decoder(x.shape[-1])(z)
        kl = -0.5 * jnp.sum(1 + logvar - jnp.square(mean) - jnp.exp(logvar), axis=-1)
        return recon, kl.mean()


class DLRM(nn.Module):
    """Dense features and ids in one float array; products of all pairs of embeddings."""

    vocab_sizes: tuple[int, ...] = (50, 300, 20)
    num_dense: int = 5
    embed_dim: int = 8

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train
        bottom, categorical = jnp.split(x, [self.num_dense], axis=-1)
        categorical = jnp.asarray(categorical, dtype=jnp.int32)
        for width in (16, self.embed_dim):
            bottom = nn.relu(nn.Dense(width)(bottom))
        offsets = jnp.cumsum(jnp.asarray((0, *self.vocab_sizes[:-1])))
        init = nn.initializers.uniform(1.0)
        table = self.param("embedding_table", init, (sum(self.vocab_sizes), self.embed_dim))
        embedded = table[categorical + offsets[None]]
        features = jnp.concatenate([bottom[:, None, :], embedded], axis=1)
        xact = jnp.matmul(features, features.transpose((0, 2, 1)))
        i, j = jnp.tril_indices(features.shape[1], k=-1)
        top = jnp.concatenate([bottom, xact[:, i, j]], axis=-1)
        for width in (16, 8):
            top = nn.relu(nn.Dense(width)(top))
        return nn.Dense(1)(top)


def clicks(key: jax.Array) -> tuple[jax.Array]:
    """Logarithms of counts, then ids, in one float array."""
    keys = jax.random.split(key, 4)
    dense = jnp.log1p(jnp.floor(10 * jax.random.exponential(keys[0], (64, 5))))
    ids = [
        jax.random.randint(k, (64, 1), 0, n) for k, n in zip(keys[1:], (50, 300, 20), strict=True)
    ]
    return (jnp.concatenate([dense, *(i.astype(jnp.float32) for i in ids)], axis=1),)


class ActorCritic(nn.Module):
    """Two networks: the mean and deviation of actions, and a value."""

    action_dim: int = 3

    @nn.compact
    def __call__(self, x):
        def layer(features, scale):
            return nn.Dense(
                features,
                kernel_init=nn.initializers.orthogonal(scale),
                bias_init=nn.initializers.constant(0.0),
            )

        actor = nn.tanh(layer(32, 2.0**0.5)(x))
        actor = nn.tanh(layer(32, 2.0**0.5)(actor))
        mean = layer(self.action_dim, 0.01)(actor)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        critic = nn.tanh(layer(32, 2.0**0.5)(x))
        critic = nn.tanh(layer(32, 2.0**0.5)(critic))
        value = layer(1, 1.0)(critic)
        return mean, jnp.exp(log_std), jnp.squeeze(value, axis=-1)


class UnrolledLSTM(nn.Module):
    """A classifier of token sequences, its cell called step by step."""

    vocabulary: int = 20
    hidden: int = 12

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, 8)(ids)
        cell = nn.OptimizedLSTMCell(self.hidden)
        carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        y = x[:, 0]
        for t in range(x.shape[1]):
            carry, y = cell(carry, x[:, t])
        return nn.Dense(4)(y)


class ScannedLSTM(nn.Module):
    """A classifier of token sequences by `nn.RNN`."""

    vocabulary: int = 20
    hidden: int = 12

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, 8)(ids)
        y = nn.RNN(nn.OptimizedLSTMCell(self.hidden))(x)
        return nn.Dense(4)(y[:, -1])


MODELS: dict[str, Public] = {
    "U-Net": with_train(UNet(), images(16)),
    "VAE": with_train(VAE(), rows(20, count=64)),
    "DLRM": with_train(DLRM(), clicks),
    "PPO actor-critic": Public(module=ActorCritic(), batch=rows(6, count=64)),
    "LSTM, unrolled": Public(module=UnrolledLSTM(), batch=tokens(20, 6)),
    "LSTM, nn.RNN": Public(module=ScannedLSTM(), batch=tokens(20, 6)),
}
