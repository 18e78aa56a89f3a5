"""One small model for each construct that the library supports, with inputs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its call, and what its plan counts.

    Attributes:
      model: the float model.
      args: positional arguments of the call.
      kwargs: keyword arguments.
      activations: number of activation quantizers.
      weights: number of weight quantizers.
    """

    model: nn.Module
    args: tuple
    activations: int
    weights: int
    kwargs: dict = dataclasses.field(default_factory=dict)


class Model(nn.Module):
    """A model from a function of its input, for models that need no more."""

    body: Callable[..., Any]

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.body(*args, **kwargs)


def case(body: Callable[..., Any], shape: Any, activations: int, weights: int, **kwargs) -> Case:
    """Make a case of `body` on normal inputs: one shape, or a list of shapes."""
    shapes = shape if isinstance(shape, list) else [shape]
    keys = jax.random.split(jax.random.key(7), len(shapes))
    args = tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return Case(Model(body), args, activations, weights, kwargs)


IMAGE, ROW = (2, 8, 8, 4), (3, 6)


class Setup(nn.Module):
    """Setup style, a list of layers in a loop, the last one called twice."""

    def setup(self):
        self.layers = [nn.Dense(6) for _ in range(3)]

    def __call__(self, x):
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    """A nested module."""

    features: int = 4

    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Conv(self.features, (3, 3))(x))


def squeeze_excite(x):
    x = nn.Conv(4, (3, 3))(x)
    s = nn.relu(nn.Dense(2)(x.mean(axis=(1, 2))))
    return x * nn.sigmoid(nn.Dense(4)(s))[:, None, None, :]


def dense_net(x):
    x = Block(4)(x)
    for _ in range(2):
        x = jnp.concatenate([x, Block(2)(x)], axis=-1)
    return nn.Conv(2, (1, 1))(x)


def residual(x):
    x = Block(4)(x)
    return nn.relu(x + nn.Conv(4, (1, 1))(nn.relu(nn.Conv(4, (3, 3))(x))))


def maxima(x):
    """Of two tensors, and of one and a constant, which bounds some channels alone."""
    y = jnp.maximum(nn.Dense(4)(x), nn.relu(nn.Dense(4)(x)))
    return nn.Dense(3)(jnp.minimum(y, jnp.array([[-1.0, jnp.inf, 0.3, 1.0]])))


def positions(x):
    """Where a sum is lowest, and where it is highest in a row of ties."""
    y = nn.Dense(5)(x) + nn.Dense(5)(x)
    clipped = nn.relu(-y)
    return {"least": jnp.argmin(y, -1), "most": jnp.argmax(clipped, -1), "z": nn.Dense(2)(clipped)}


def lengths(x):
    """An L2 norm, the statistics of a pooling, and lengths."""
    x = nn.Dense(4)(x)
    y = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 0.5)
    pooled = nn.Dense(3)(jnp.concatenate([x.mean(1), jnp.std(y, 1)], -1))
    return {"pooled": pooled, "length": jnp.sqrt((x * x).sum(-1) + 0.1)}


def pre_activation(x):
    x = nn.Conv(4, (3, 3))(x)
    y = nn.Conv(4, (3, 3))(nn.relu(nn.BatchNorm(use_running_average=True)(x)))
    return x + y


def picked(x):
    """Pairs, of neighbouring axes and of others, and a grid of places."""
    z = nn.Dense(36)(x).reshape(-1, 3, 4, 3)
    rows, columns = jnp.tril_indices(3, -1)
    parts = z[:, rows, columns], z[:, rows, :, columns].swapaxes(0, 1), z[:, jnp.array([[2, 0]])]
    return nn.Dense(3)(jnp.concatenate([part.reshape(x.shape[0], -1) for part in parts], -1))


def two_heads(x):
    x = nn.relu(nn.Dense(5)(x))
    return {"a": nn.Dense(2)(x), "b": (nn.Dense(3)(x), x)}


def attention(x):
    return nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(nn.Dense(8)(x)))


class LearnedScalar(nn.Module):
    """A factor that is trained."""

    @nn.compact
    def __call__(self, x):
        return x * self.param("alpha", nn.initializers.constant(0.7), ())


def batch_norm(x, train):
    x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3), use_bias=False)(x))
    return nn.Dense(3)(nn.relu(x).mean(axis=(1, 2)))


def dropout(x, deterministic):
    x = nn.Dropout(0.5)(nn.relu(nn.Dense(6)(x)), deterministic=deterministic)
    return nn.Dense(3)(x)


def activation(function):
    return lambda x: nn.Dense(3)(function(nn.Dense(6)(x)))


def between_convs(function):
    return lambda x: nn.Conv(3, (1, 1))(function(Block(4)(x)))


def conv(**kwargs):
    return lambda x: nn.Conv(4, **{"kernel_size": (3, 3), **kwargs})(x)


class Layer(nn.Module):
    """A step of a scan over layers."""

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(6)(x)), None


def scan_over_layers(x):
    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    return nn.Dense(3)(scan(name="layers")(x, None)[0])


CASES: dict[str, Case] = {
    "setup": Case(Setup(), (jax.random.normal(jax.random.key(0), ROW),), 5, 3),
    "nested": case(lambda x: Block(3)(Block(4)(x)), IMAGE, 3, 2),
    "two heads": case(two_heads, ROW, 4, 3),
    "two inputs": case(lambda x, y: nn.Dense(4)(x) + nn.Dense(4)(y), [ROW, (3, 2)], 5, 2),
    "conv 1d": case(lambda x: nn.Conv(4, (3,))(x), (2, 9, 3), 2, 1),
    "conv 3d": case(lambda x: nn.Conv(4, (3, 3, 3))(x), (2, 5, 5, 5, 2), 2, 1),
    "strided": case(conv(strides=2), IMAGE, 2, 1),
    "dilated": case(conv(kernel_dilation=2), IMAGE, 2, 1),
    "transposed input": case(conv(input_dilation=2, padding=1), IMAGE, 2, 1),
    "grouped": case(conv(feature_group_count=2), IMAGE, 2, 1),
    "depthwise": case(conv(feature_group_count=4), IMAGE, 2, 1),
    "no bias": case(conv(use_bias=False), IMAGE, 2, 1),
    "padding VALID": case(conv(padding="VALID"), IMAGE, 2, 1),
    "padding CIRCULAR": case(conv(padding="CIRCULAR"), IMAGE, 2, 1),
    "padding REFLECT": case(conv(padding="REFLECT"), IMAGE, 2, 1),
    "padding CAUSAL": case(lambda x: nn.Conv(4, (3,), padding="CAUSAL")(x), (2, 9, 3), 2, 1),
    "padding int": case(conv(padding=2), IMAGE, 2, 1),
    "padding pairs": case(conv(padding=((0, 1), (2, 0))), IMAGE, 2, 1),
    "masked": case(
        conv(mask=jnp.tril(jnp.ones((3, 3)))[:, :, None, None] * jnp.ones((1, 1, 4, 4))),
        IMAGE,
        2,
        1,
    ),
    "unbatched": case(conv(), (8, 8, 4), 2, 1),
    "dense general": case(lambda x: nn.DenseGeneral((2, 3), axis=(-2, -1))(x), (2, 3, 4), 2, 1),
    "relu": case(activation(nn.relu), ROW, 3, 2),
    "relu6": case(activation(nn.relu6), ROW, 3, 2),
    "maximum": case(activation(lambda x: jnp.maximum(x, 0)), ROW, 3, 2),
    "clip": case(activation(lambda x: jnp.clip(x, -1, 1)), ROW, 3, 2),
    **{
        f.__name__: case(activation(f), ROW, 4, 2)
        for f in (nn.leaky_relu, nn.sigmoid, nn.tanh, nn.silu, nn.gelu, nn.hard_sigmoid, nn.elu)
    },
    "hard_swish": case(activation(nn.hard_swish), ROW, 4, 2),
    "exact gelu": case(activation(lambda x: nn.gelu(x, approximate=False)), ROW, 4, 2),
    "own swish": case(activation(lambda x: x * jax.nn.sigmoid(x)), ROW, 4, 2),
    "own where": case(activation(lambda x: jnp.where(x > 0, x, 0.1 * x)), ROW, 4, 2),
    "prelu": case(activation(lambda x: nn.PReLU()(x)), ROW, 4, 2),
    "scaled": case(activation(lambda x: x * 0.5), ROW, 4, 2),
    "learned scalar": case(activation(lambda x: LearnedScalar()(x)), ROW, 4, 2),
    "max_pool": case(between_convs(lambda x: nn.max_pool(x, (2, 2), (2, 2))), IMAGE, 3, 2),
    "padded max_pool": case(
        between_convs(lambda x: nn.max_pool(x, (3, 3), (2, 2), padding="SAME")), IMAGE, 3, 2
    ),
    "avg_pool": case(between_convs(lambda x: nn.avg_pool(x, (2, 2), (2, 2))), IMAGE, 4, 2),
    "avg_pool without padding": case(
        between_convs(
            lambda x: nn.avg_pool(x, (3, 3), (1, 1), padding="SAME", count_include_pad=False)
        ),
        IMAGE,
        4,
        2,
    ),
    "mean": case(lambda x: nn.Dense(3)(Block(4)(x).mean(axis=(1, 2))), IMAGE, 4, 2),
    "sum": case(lambda x: nn.Dense(3)(Block(4)(x).sum(axis=(1, 2))), IMAGE, 4, 2),
    "max": case(lambda x: nn.Dense(3)(Block(4)(x).max(axis=(1, 2))), IMAGE, 3, 2),
    "residual": case(residual, IMAGE, 5, 3),
    "subtract": case(lambda x: nn.Dense(4)(x) - nn.Dense(4)(x), ROW, 4, 2),
    "multiply": case(lambda x: nn.Dense(4)(x) * nn.Dense(4)(x), ROW, 4, 2),
    "maximum of two": case(maxima, ROW, 3, 3),
    "argmax": case(positions, ROW, 6, 3),
    "pre-activation": case(pre_activation, IMAGE, 5, 2),
    "squeeze and excite": case(squeeze_excite, IMAGE, 7, 3),
    "densenet": case(dense_net, IMAGE, 3, 4),
    "concat with itself": case(
        lambda x: (lambda y: jnp.concatenate([y, y], -1))(nn.Dense(3)(x)), ROW, 2, 1
    ),
    "stack": case(lambda x: jnp.stack([nn.Dense(3)(x), nn.Dense(3)(x)]), ROW, 2, 2),
    "moves": case(
        between_convs(
            lambda x: jnp.pad(
                jnp.flip(x.transpose(0, 2, 1, 3)[:, 1:, ::2], 1), ((0, 0), (1, 0), (0, 0), (0, 0))
            )
        ),
        IMAGE,
        3,
        2,
    ),
    "upsampling": case(
        between_convs(
            lambda x: jax.image.resize(x, (x.shape[0], 16, 12, 4), "nearest")[
                ..., jnp.array([1, 0, 3, 3])
            ]
        ),
        IMAGE,
        3,
        2,
    ),
    "picked along two axes": case(picked, ROW, 3, 2),
    "split": case(lambda x: [nn.Dense(2)(p) for p in jnp.split(nn.Dense(6)(x), 2, -1)], ROW, 4, 3),
    "flatten": case(lambda x: nn.Dense(3)(Block(4)(x).reshape(2, -1)), IMAGE, 3, 2),
    "constant per channel": case(
        lambda x: nn.Dense(4)(x) * jnp.arange(1.0, 5.0).reshape(1, 4), ROW, 3, 1
    ),
    "preprocessing": case(lambda x: nn.Dense(4)(x / 255.0 - 0.5), ROW, 2, 1),
    "attention": case(attention, (2, 5, 6), 10, 5),
    "softmax": case(lambda x: nn.softmax(nn.Dense(4)(x)), ROW, 3, 1),
    "log_softmax": case(lambda x: nn.log_softmax(nn.Dense(4)(x)), ROW, 3, 1),
    "lengths and deviations": case(lengths, (2, 5, 6), 6, 2),
    "batch norm eval": case(batch_norm, IMAGE, 4, 2, train=False),
    "batch norm train": case(batch_norm, IMAGE, 4, 2, train=True),
    "dropout eval": case(dropout, ROW, 3, 2, deterministic=True),
    "dropout train": case(dropout, ROW, 3, 2, deterministic=False),
    "remat": case(lambda x: nn.remat(Block)(4)(nn.remat(Block)(4)(x)), IMAGE, 3, 2),
    "scan over layers": case(scan_over_layers, ROW, 4, 3),
    "scan over time": case(lambda x: nn.Dense(3)(nn.RNN(nn.SimpleCell(3))(x)), (2, 3, 4), 6, 3),
    "jit": case(lambda x: nn.jit(Block)(4)(nn.jit(Block)(4)(x)), IMAGE, 3, 2),
    "weight norm": case(lambda x: nn.WeightNorm(nn.Dense(4))(x), ROW, 2, 1),
    "bfloat16": case(
        lambda x: nn.Dense(3, dtype=jnp.bfloat16)(
            nn.relu(nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)).mean(axis=(1, 2))
        ),
        IMAGE,
        4,
        2,
    ),
}

ALIKE = (
    *("nested", "two inputs", "masked", "no bias", "padding VALID", "maximum", "learned scalar"),
    *("tanh", "silu", "gelu", "hard_sigmoid", "elu", "hard_swish", "own swish", "own where"),
    *("exact gelu", "prelu", "leaky_relu", "scaled", "dropout eval", "remat", "jit", "setup"),
    *("weight norm", "pre-activation", "concat with itself", "relu", "flatten"),
    *("strided", "dilated", "padding int", "padding pairs", "subtract", "multiply"),
    *("padding CAUSAL", "padding REFLECT", "dense general", "scan over layers", "split", "stack"),
    *("max_pool", "mean", "sum", "relu6", "sigmoid"),
)
"""Cases whose operations other cases hold, in models alike, or tests of single operations."""
