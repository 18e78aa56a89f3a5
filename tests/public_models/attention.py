"""Models of attention, or of what replaced it: ViT, Mixer, BERT, GPT-2, wav2vec2."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from public_models.kinds import Public, images, tokens, with_deterministic, with_train

normal = nn.initializers.normal(0.02)


class MlpBlock(nn.Module):
    """Two dense layers with GELU between them."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(self.mlp_dim)(x)
        y = nn.gelu(y)
        return nn.Dense(x.shape[-1])(y)


class EinsumAttention(nn.Module):
    """Self-attention written by hand: one projection for all three, and einsum."""

    num_heads: int

    @nn.compact
    def __call__(self, x):
        batch, length, dim = x.shape
        qkv = nn.Dense(3 * dim, use_bias=False, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        attn = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (dim // self.num_heads) ** -0.5
        attn = nn.softmax(attn, axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", attn, v).reshape(batch, length, dim)
        return nn.Dense(dim, name="proj")(out)


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP; attention by hand or of Flax."""

    num_heads: int
    by_hand: bool

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.LayerNorm()(x)
        if self.by_hand:
            y = EinsumAttention(self.num_heads)(y)
        else:
            y = nn.MultiHeadDotProductAttention(self.num_heads, deterministic=not train)(y, y)
        x = x + nn.Dropout(0.1, deterministic=not train)(y)
        return x + MlpBlock(2 * x.shape[-1])(nn.LayerNorm()(x))


class ViT(nn.Module):
    """Patches, a class token, position embeddings, encoder blocks."""

    dim: int = 16
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(self.dim, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(x)
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        x = x + self.param("pos_embedding", normal, (1, h * w + 1, c))
        x = EncoderBlock(2, by_hand=True)(x, train)
        x = EncoderBlock(2, by_hand=False)(x, train)
        x = nn.LayerNorm(name="encoder_norm")(x)
        return nn.Dense(self.num_classes, name="head")(x[:, 0])


class MixerBlock(nn.Module):
    """One MLP over patches, one over channels."""

    tokens_mlp_dim: int
    channels_mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        y = jnp.swapaxes(y, 1, 2)
        y = MlpBlock(self.tokens_mlp_dim, name="token_mixing")(y)
        y = jnp.swapaxes(y, 1, 2)
        x = x + y
        y = nn.LayerNorm()(x)
        return x + MlpBlock(self.channels_mlp_dim, name="channel_mixing")(y)


class Mixer(nn.Module):
    """MLP-Mixer."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train
        x = nn.Conv(16, (4, 4), strides=(4, 4), name="stem")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            x = MixerBlock(8, 32)(x)
        x = nn.LayerNorm(name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, name="head")(x)


class BertSelfAttention(nn.Module):
    """Three dense layers, heads split by reshape, a bias that masks padding."""

    hidden_size: int
    num_heads: int

    def setup(self):
        self.query = nn.Dense(self.hidden_size)
        self.key = nn.Dense(self.hidden_size)
        self.value = nn.Dense(self.hidden_size)

    def split(self, x):
        return x.reshape((*x.shape[:2], self.num_heads, self.hidden_size // self.num_heads))

    def __call__(self, x, attention_mask, deterministic: bool):
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.value(x)
        attention_mask = jnp.expand_dims(attention_mask, axis=(-3, -2))
        attention_bias = lax.select(
            attention_mask > 0,
            jnp.full(attention_mask.shape, 0.0).astype(x.dtype),
            jnp.full(attention_mask.shape, jnp.finfo(x.dtype).min).astype(x.dtype),
        )
        weights = nn.dot_product_attention_weights(
            query, key, bias=attention_bias, deterministic=deterministic
        )
        output = jnp.einsum("...hqk,...khd->...qhd", weights, self.split(value))
        return output.reshape((*output.shape[:2], -1))


class BertLayer(nn.Module):
    """Attention and MLP, each with a residual and LayerNorm behind it."""

    hidden_size: int
    num_heads: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x, attention_mask, deterministic: bool):
        y = BertSelfAttention(self.hidden_size, self.num_heads)(x, attention_mask, deterministic)
        y = nn.Dense(self.hidden_size, name="output")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        x = nn.LayerNorm(epsilon=1e-12)(y + x)
        y = nn.gelu(nn.Dense(2 * self.hidden_size, name="intermediate")(x), approximate=False)
        y = nn.Dense(self.hidden_size, name="ffn_output")(y)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        return nn.LayerNorm(epsilon=1e-12)(y + x)


class Bert(nn.Module):
    """A classifier of token sequences, of the first token's pooled output."""

    vocab_size: int = 30
    hidden_size: int = 16

    @nn.compact
    def __call__(self, input_ids, token_type_ids, attention_mask, deterministic: bool = True):
        embed = functools.partial(nn.Embed, features=self.hidden_size, embedding_init=normal)
        position_ids = jnp.broadcast_to(jnp.arange(input_ids.shape[-1]), input_ids.shape)
        x = embed(self.vocab_size, name="word_embeddings")(input_ids.astype("i4"))
        x = x + embed(2, name="token_type_embeddings")(token_type_ids.astype("i4"))
        x = x + embed(16, name="position_embeddings")(position_ids.astype("i4"))
        x = nn.LayerNorm(epsilon=1e-12)(x)
        for _ in range(2):
            x = BertLayer(self.hidden_size)(x, attention_mask, deterministic)
        pooled = nn.tanh(nn.Dense(self.hidden_size, name="pooler")(x[:, 0]))
        return nn.Dense(3, name="classifier")(pooled)


def sentences(key: jax.Array) -> tuple[jax.Array, ...]:
    """Token ids, their segments, and which of them are no padding."""
    ids, ends = jax.random.split(key)
    input_ids = jax.random.randint(ids, (64, 8), 0, 30)
    place = jnp.arange(8)[None]
    attention_mask = (place < jax.random.randint(ends, (64, 1), 4, 9)).astype(jnp.int32)
    return input_ids, jnp.broadcast_to(place // 4, (64, 8)), attention_mask


class Conv1D(nn.Module):
    """GPT-2's dense layer, with its kernel the other way round."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal, (self.features, x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = lax.dot_general(x, kernel.transpose(), (((x.ndim - 1,), (0,)), ((), ())))
        return y + jnp.asarray(bias).reshape((1,) * (y.ndim - 1) + (-1,))


class Linear(nn.Module):
    """`x @ w + b`."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param("w", normal, (x.shape[-1], self.features))
        b = self.param("b", nn.initializers.zeros, (self.features,))
        return x @ w + b


class CausalSelfAttention(nn.Module):
    """Masked attention with one projection for all three."""

    num_heads: int

    @nn.compact
    def __call__(self, x):
        b, t, c = x.shape
        q, k, v = jnp.split(Conv1D(3 * c, name="c_attn")(x), 3, axis=-1)
        q, k, v = (
            y.reshape(b, t, self.num_heads, c // self.num_heads).swapaxes(1, 2) for y in (q, k, v)
        )
        att = (q @ k.swapaxes(-2, -1)) * (1.0 / math.sqrt(k.shape[-1]))
        mask = jnp.tril(jnp.ones((t, t))).reshape((1, 1, t, t))
        att = jnp.where(mask == 0, float("-inf"), att)
        y = nn.softmax(att, axis=-1) @ v
        return Conv1D(c, name="c_proj")(y.swapaxes(1, 2).reshape(b, t, c))


class GPT2(nn.Module):
    """A decoder whose output layer is its embedding table."""

    vocab_size: int = 24
    block_size: int = 8
    n_embd: int = 16

    @nn.compact
    def __call__(self, ids, train: bool = False):
        wte = self.param("wte", nn.initializers.normal(0.1), (self.vocab_size, self.n_embd))
        wpe = self.param("wpe", normal, (self.block_size, self.n_embd))
        x = wte[ids] + wpe[None, : ids.shape[1]]
        x = nn.Dropout(0.1, deterministic=not train)(x)
        for i in range(2):
            x = x + CausalSelfAttention(2, name=f"h_{i}_attn")(nn.LayerNorm()(x))
            y = Linear(4 * self.n_embd, name=f"h_{i}_fc")(nn.LayerNorm()(x))
            x = x + Linear(self.n_embd, name=f"h_{i}_proj")(nn.gelu(y))
        x = nn.LayerNorm(name="ln_f")(x)
        return x @ wte.T


class WeightNormConv(nn.Module):
    """A grouped convolution over time with direction and length of its kernel apart."""

    features: int
    width: int = 4
    groups: int = 2

    @nn.compact
    def __call__(self, x):
        shape = (self.features, x.shape[-1] // self.groups, self.width)
        weight_v = self.param("weight_v", nn.initializers.he_normal(), shape)
        norm = jnp.sqrt(jnp.square(weight_v).sum((0, 1)))[None, None]
        weight_g = self.param("weight_g", lambda _: norm)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        kernel = weight_g * weight_v / jnp.sqrt(jnp.square(weight_v).sum((0, 1)))[None, None]
        y = lax.conv_general_dilated(
            x,
            kernel.transpose(2, 1, 0),
            window_strides=(1,),
            padding=[(self.width // 2, self.width // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return (y + bias)[:, : x.shape[1]]  # an even width makes one step too many


class FeatureEncoder(nn.Module):
    """Strided convolutions over the wave, the first with GroupNorm."""

    dim: int

    @nn.compact
    def __call__(self, wave):
        x = wave[:, :, None]
        x = nn.Conv(self.dim, (8,), strides=(4,), padding="VALID", use_bias=False)(x)
        x = nn.gelu(nn.GroupNorm(num_groups=self.dim, epsilon=1e-5)(x))
        x = nn.Conv(self.dim, (3,), strides=(2,), padding="VALID", use_bias=False)(x)
        return nn.gelu(x)


class Wav2Vec2(nn.Module):
    """Features of a wave, positions by convolution, an encoder layer, a head for each step."""

    dim: int = 16

    @nn.compact
    def __call__(self, wave, deterministic: bool = True):
        x = nn.LayerNorm(name="feature_norm")(FeatureEncoder(8)(wave))
        x = nn.Dense(self.dim, name="feature_projection")(x)
        x = x + nn.gelu(WeightNormConv(self.dim, name="pos_conv_embed")(x))
        x = nn.Dropout(0.1)(nn.LayerNorm()(x), deterministic=deterministic)
        x = nn.LayerNorm()(x + EinsumAttention(2, name="attention")(x))
        x = nn.LayerNorm(name="final_layer_norm")(x + MlpBlock(32, name="feed_forward")(x))
        return nn.Dense(6, name="lm_head")(x)


def waves(key: jax.Array) -> tuple[jax.Array]:
    """Tones with noise."""
    pitch, noise = jax.random.split(key)
    time: Any = jnp.arange(64.0)[None]
    tone = jnp.sin(time * jax.random.uniform(pitch, (16, 1), minval=0.1, maxval=1.5))
    return (tone + 0.3 * jax.random.normal(noise, (16, 64)),)


MODELS: dict[str, Public] = {
    "ViT": with_train(ViT(), images(16)),
    "Mixer": with_train(Mixer(), images(16)),
    "BERT": with_deterministic(Bert(), sentences),
    "GPT-2": with_train(GPT2(), tokens(24, 8)),
    "wav2vec2": with_deterministic(Wav2Vec2(), waves),
}
