"""Image classifiers of convolutions: ResNet, RegNet, VGG, MobileNetV3, EfficientNet, BiT ..."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from public_models.kinds import Public, images, with_deterministic, with_train

ModuleDef = Any
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "truncated_normal")


class BottleneckBlock(nn.Module):
    """Three convolutions and a projected shortcut."""

    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable = nn.relu
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.conv(self.filters, (1, 1))(x)
        y = self.norm()(y)
        y = self.act(y)
        y = self.conv(self.filters, (3, 3), self.strides)(y)
        y = self.norm()(y)
        y = self.act(y)
        y = self.conv(self.filters * 2, (1, 1))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if residual.shape != y.shape:
            residual = self.conv(self.filters * 2, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)
        return self.act(residual + y)


class ResNet(nn.Module):
    """Version 1.5, with the last scale of a block zero at first."""

    stage_sizes: Sequence[int] = (1, 1)
    num_filters: int = 8
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5
        )
        x = conv(self.num_filters, (3, 3), name="conv_init")(x)
        x = norm(name="bn_init")(x)
        x = nn.relu(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = BottleneckBlock(self.num_filters * 2**i, conv, norm, strides=strides)(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes)(x)


class SqueezeExcite(nn.Module):
    """A gate for each channel, from 1x1 convolutions of the means."""

    reduced: int
    act: Callable = nn.relu
    gate: Callable = nn.sigmoid

    @nn.compact
    def __call__(self, x):
        s = x.mean(axis=(1, 2), keepdims=True)
        s = self.act(nn.Conv(self.reduced, (1, 1), name="reduce")(s))
        s = self.gate(nn.Conv(x.shape[-1], (1, 1), name="expand")(s))
        return x * s


class RegNetBlock(nn.Module):
    """1x1, grouped 3x3, squeeze-and-excitation, 1x1."""

    width: int
    group_width: int = 4
    stride: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        y = nn.relu(norm(nn.Conv(self.width, (1, 1), use_bias=False)(x)))
        y = nn.Conv(
            self.width,
            (3, 3),
            self.stride,
            padding=1,
            feature_group_count=self.width // self.group_width,
            use_bias=False,
        )(y)
        y = SqueezeExcite(max(1, x.shape[-1] // 4))(nn.relu(norm(y)))
        y = norm(nn.Conv(self.width, (1, 1), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm(nn.Conv(self.width, (1, 1), self.stride, use_bias=False)(x))
        return nn.relu(x + y)


class RegNet(nn.Module):
    """RegNetY."""

    widths: Sequence[int] = (8, 16)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(8, (3, 3), 2, padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for i, width in enumerate(self.widths):
            x = RegNetBlock(width, stride=1 + (i > 0))(x, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


class VGG(nn.Module):
    """Layers from a list, with dropout between dense layers."""

    cfg: Sequence[int | str] = (8, "M", 16, "M")
    num_classes: int = 10

    def setup(self):
        self.convs = [nn.Conv(c, (3, 3), padding="SAME") for c in self.cfg if c != "M"]
        self.fc1 = nn.Dense(32)
        self.fc2 = nn.Dense(self.num_classes)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x, train: bool = False):
        convs = iter(self.convs)
        for c in self.cfg:
            x = nn.max_pool(x, (2, 2), (2, 2)) if c == "M" else nn.relu(next(convs)(x))
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(self.fc1(x))
        x = self.dropout(x, deterministic=not train)
        return self.fc2(x)


class OwnBatchNorm(nn.Module):
    """Written by hand, with running statistics in `batch_stats`."""

    momentum: float = 0.9
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x, training: bool):
        features = x.shape[-1]
        ra_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros((features,)))
        ra_var = self.variable("batch_stats", "var", lambda: jnp.ones((features,)))
        gamma = self.param("gamma", nn.initializers.ones, (features,))
        beta = self.param("beta", nn.initializers.zeros, (features,))
        if training:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axes)
            var = jnp.mean(jnp.square(x), axes) - jnp.square(mean)
            if not self.is_initializing():
                ra_mean.value = self.momentum * ra_mean.value + (1 - self.momentum) * mean
                ra_var.value = self.momentum * ra_var.value + (1 - self.momentum) * var
        else:
            mean, var = ra_mean.value, ra_var.value
        shape = (1,) * (x.ndim - 1) + (features,)
        inv = lax.rsqrt(var + self.epsilon) * gamma
        return (x - mean.reshape(shape)) * inv.reshape(shape) + beta.reshape(shape)


def h_sigmoid(x):
    return nn.relu6(x + 3.0) / 6.0


def h_swish(x):
    return x * h_sigmoid(x)


class InvertedResidual(nn.Module):
    """Expansion, depthwise, gate, projection."""

    expanded: int
    features: int
    stride: int
    use_se: bool
    act: Callable

    @nn.compact
    def __call__(self, x, training):
        y = nn.Conv(self.expanded, (1, 1), use_bias=False)(x)
        y = self.act(OwnBatchNorm()(y, training))
        y = nn.Conv(
            self.expanded,
            (3, 3),
            (self.stride, self.stride),
            feature_group_count=self.expanded,
            use_bias=False,
        )(y)
        y = OwnBatchNorm()(y, training)
        if self.use_se:
            y = SqueezeExcite(4, gate=h_sigmoid)(y)
        y = self.act(y)
        y = OwnBatchNorm()(nn.Conv(self.features, (1, 1), use_bias=False)(y), training)
        return x + y if x.shape == y.shape else y


class MobileNetV3(nn.Module):
    """With a BatchNorm of its own."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, training: bool = False):
        x = nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)
        x = h_swish(OwnBatchNorm()(x, training))
        x = InvertedResidual(16, 8, 1, False, nn.relu)(x, training)
        x = InvertedResidual(16, 12, 2, True, h_swish)(x, training)
        x = nn.Conv(24, (1, 1), use_bias=False)(x)
        x = h_swish(OwnBatchNorm()(x, training))
        x = x.mean(axis=(1, 2))
        x = h_swish(nn.Dense(32)(x))
        return nn.Dense(self.num_classes)(x)


class StochasticDepth(nn.Module):
    """Drop whole examples of a branch."""

    rate: float

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        binary = jnp.floor(keep + jax.random.uniform(self.make_rng("dropout"), shape))
        return x / keep * binary


class MBConv(nn.Module):
    """EfficientNet's block."""

    features: int
    expand_ratio: int
    strides: int
    kernel: int = 3
    drop_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, train: bool):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-3
        )
        filters = inputs.shape[-1] * self.expand_ratio
        x = inputs
        if self.expand_ratio != 1:
            x = nn.Conv(filters, (1, 1), use_bias=False, kernel_init=he_normal)(x)
            x = nn.swish(norm()(x))
        x = nn.Conv(
            filters,
            (self.kernel, self.kernel),
            (self.strides, self.strides),
            feature_group_count=filters,
            use_bias=False,
            kernel_init=he_normal,
        )(x)
        x = nn.swish(norm()(x))
        x = SqueezeExcite(max(1, inputs.shape[-1] // 4), act=nn.swish)(x)
        x = norm()(nn.Conv(self.features, (1, 1), use_bias=False, kernel_init=he_normal)(x))
        if self.strides == 1 and inputs.shape[-1] == self.features:
            x = StochasticDepth(self.drop_rate)(x, train) + inputs
        return x


class EfficientNet(nn.Module):
    """Squeeze-and-excitation, swish, depthwise convolutions."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.swish(norm()(nn.Conv(8, (3, 3), (2, 2), use_bias=False)(x)))
        x = MBConv(8, 1, 1)(x, train)
        x = MBConv(12, 3, 2, 5)(x, train)
        x = MBConv(12, 2, 1)(x, train)
        x = nn.swish(norm()(nn.Conv(24, (1, 1), use_bias=False)(x)))
        x = x.mean((1, 2))
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class StdConv(nn.Conv):
    """A convolution whose kernel is standardised."""

    def param(self, name, *args, **kwargs):
        param = super().param(name, *args, **kwargs)
        if name == "kernel":
            param = param - jnp.mean(param, axis=[0, 1, 2])
            param = param / (jnp.std(param, axis=[0, 1, 2]) + 1e-5)
        return param


class PreActivationUnit(nn.Module):
    """GroupNorm, relu, then a standardised convolution, twice."""

    features: int
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        x = nn.relu(nn.GroupNorm(4, name="gn1")(x))
        if x.shape[-1] != self.features or self.strides != (1, 1):
            residual = StdConv(
                self.features, (1, 1), self.strides, use_bias=False, name="conv_proj"
            )(x)
        x = StdConv(self.features, (3, 3), self.strides, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.GroupNorm(4, name="gn2")(x))
        x = StdConv(self.features, (3, 3), use_bias=False, name="conv2")(x)
        return x + residual


class BiT(nn.Module):
    """Weight standardisation and GroupNorm."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        del train
        x = StdConv(8, (3, 3), use_bias=False, name="conv_root")(x)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = PreActivationUnit(8)(x)
        x = PreActivationUnit(16, (2, 2))(x)
        x = nn.relu(nn.GroupNorm(4, name="norm-pre-head")(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, name="conv_head")(x)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, LayerNorm, two dense layers, a scale for each channel."""

    dim: int
    drop_path: float = 0.1
    layer_scale_init_value: float = 0.1

    @nn.compact
    def __call__(self, inputs, deterministic: bool):
        x = nn.Conv(self.dim, (7, 7), feature_group_count=self.dim, name="dwconv")(inputs)
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        x = nn.DenseGeneral(4 * self.dim, name="pwconv1")(x)
        x = nn.gelu(x)
        x = nn.DenseGeneral(self.dim, name="pwconv2")(x)
        init = nn.initializers.constant(self.layer_scale_init_value)
        gamma = self.param("gamma", init, (self.dim,))
        x = gamma[None, None, None, :] * x
        return inputs + StochasticDepth(self.drop_path)(x, not deterministic)


class ConvNeXt(nn.Module):
    """Patches by a strided convolution, blocks, downsampling between stages."""

    dims: Sequence[int] = (8, 12)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, deterministic: bool = True):
        for i, dim in enumerate(self.dims):
            if i == 0:
                x = nn.Conv(dim, (4, 4), strides=4, padding="VALID")(x)
                x = nn.LayerNorm(epsilon=1e-6)(x)
            else:
                x = nn.LayerNorm(epsilon=1e-6)(x)
                x = nn.Conv(dim, (2, 2), strides=2, padding="VALID")(x)
            x = ConvNeXtBlock(dim)(x, deterministic)
        x = nn.LayerNorm(name="norm")(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


class ConvMixer(nn.Module):
    """Patches, then depthwise convolutions with a residual and 1x1 convolutions."""

    dim: int = 16
    depth: int = 2
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train: bool = False):
        def act_norm(x):
            x = nn.gelu(x)
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = act_norm(nn.Conv(self.dim, (2, 2), strides=2)(x))
        for _ in range(self.depth):
            y = nn.Conv(self.dim, (5, 5), feature_group_count=self.dim)(x)
            x = x + act_norm(y)
            x = act_norm(nn.Conv(self.dim, (1, 1))(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


MODELS = {
    "ResNet": with_train(ResNet(), images(16)),
    "RegNet": with_train(RegNet(), images(16)),
    "VGG": with_train(VGG(), images(8)),
    "MobileNetV3": Public(
        module=MobileNetV3(),
        batch=images(16),
        train={"training": True},
        evaluate={"training": False},
    ),
    "EfficientNet": with_train(EfficientNet(), images(16)),
    "BiT": with_train(BiT(), images(16)),
    "ConvNeXt": with_deterministic(ConvNeXt(), images(16)),
    "ConvMixer": with_train(ConvMixer(), images(16)),
}
