"""BatchNorm folding: arithmetic on kernels and statistics, no Flax.

`sigma = sqrt(var + epsilon)`; channels are the last axis of a kernel and of a convolution's output.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import along_channel, rounded_product, true_divide

BatchNormFold = Literal["none", "one_conv", "two_conv"]


class BatchNormState(NamedTuple):
    """The parameters and running statistics of a BatchNorm, float32, shape (C,).

    Attributes:
      gamma: its scale, 1 where it has none.
      beta: its bias, 0 where it has none.
      mean: running mean of the layer's output.
      sigma: `sqrt(var + epsilon)` of the running variance.
    """

    gamma: jax.Array
    beta: jax.Array
    mean: jax.Array
    sigma: jax.Array


def batch_norm_state(values: Mapping[str, ArrayLike], epsilon: float) -> BatchNormState:
    """Gather a BatchNorm from "scale", "bias" (both optional), "mean" and "var"."""
    mean, var = (jnp.asarray(values[name], jnp.float32) for name in ("mean", "var"))
    return BatchNormState(
        gamma=jnp.asarray(values.get("scale", jnp.ones_like(mean)), jnp.float32),
        beta=jnp.asarray(values.get("bias", jnp.zeros_like(mean)), jnp.float32),
        mean=mean,
        sigma=jnp.sqrt(var + epsilon),
    )


def running_affine(norm: BatchNormState) -> tuple[jax.Array, jax.Array]:
    """Return `(a, b)` with `BN(y) = a * y + b` on running statistics.

    `a = gamma / sigma`, `b = beta - mean * a`.
    """
    slope = true_divide(norm.gamma, norm.sigma)
    return slope, norm.beta - rounded_product(norm.mean, slope)


def fold_batch_norm(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    bn_params: Mapping[str, ArrayLike],
    bn_stats: Mapping[str, ArrayLike],
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Fold a BatchNorm into the layer before it, see `checked.fold_batch_norm`."""
    missing = [name for name in ("mean", "var") if name not in bn_stats]
    if missing:
        raise ValueError(f"bn_stats holds no {missing[0]!r}, only {sorted(bn_stats)}.")
    kernel = jnp.asarray(kernel, jnp.float32)
    given = {**bn_params, **bn_stats} | ({} if bias is None else {"bias of the layer": bias})
    for name, value in given.items():
        if jnp.shape(value) != kernel.shape[-1:]:
            raise ValueError(
                f"{name!r} has shape {jnp.shape(value)}, but the kernel of shape {kernel.shape} "
                f"has {kernel.shape[-1]} output channels."
            )
    slope, shift = running_affine(batch_norm_state({**bn_params, **bn_stats}, epsilon))
    if bias is not None:
        shift = shift + rounded_product(jnp.asarray(bias, jnp.float32), slope)
    return scaled_kernel(kernel, slope), shift


# Training ----------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """How a BatchNorm takes its batch statistics.

    Attributes:
      axis_name: devices or vmapped axes to average over, None for none.
      axis_index_groups: groups of them.
      fast_variance: `E[c^2] - E[c]^2` instead of `E[(c - E[c])^2]`.
      mask: which positions count, broadcastable to the output; None: all.
    """

    axis_name: Hashable = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    fast_variance: bool = True
    mask: jax.Array | None = None

    def __call__(self, c: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return mean and variance of `c` (..., C) over all but its last axis, float32, (C,)."""
        c = c.astype(jnp.float32)
        if self.fast_variance:
            mean, square = self._means(c, c * c)
            return mean, jnp.maximum(square - mean * mean, 0.0)
        (mean,) = self._means(c)
        (var,) = self._means(jnp.square(c - along_channel(mean, c.ndim, -1)))
        return mean, var

    def _means(self, *values: jax.Array) -> tuple[jax.Array, ...]:
        axes = tuple(range(values[0].ndim - 1))
        mask = None if self.mask is None else jnp.asarray(self.mask, bool)
        means = tuple(jnp.mean(v, axis=axes, where=mask) for v in values)
        if self.axis_name is None:
            return means
        return tuple(lax.pmean(means, self.axis_name, axis_index_groups=self.axis_index_groups))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with a BatchNorm behind it, in training.

    Attributes:
      run: the layer with a given kernel and no bias.
      kernel: (..., C), real units.
      bias: of the layer, (C,), or None.
      norm: the BatchNorm.
      epsilon: the BatchNorm's.
      quantize: fake quantization of a kernel, times a factor for each output channel.
      moments: takes batch statistics; None: use the running ones.
      frozen: bool, shape (): use the running statistics after all; None: never.
    """

    run: Callable[[jax.Array], jax.Array]
    kernel: jax.Array
    bias: jax.Array | None
    norm: BatchNormState
    epsilon: float
    quantize: Callable[[jax.Array, jax.Array], jax.Array]
    moments: Moments | None
    frozen: jax.Array | None = None

    @property
    def offset(self) -> jax.Array:
        """The bias, 0 where there is none, float32."""
        if self.bias is None:
            return jnp.zeros_like(self.norm.mean)
        return self.bias.astype(jnp.float32)

    def running_shift(self, slope: jax.Array) -> jax.Array:
        """Return what running statistics add behind a kernel multiplied by `slope`."""
        return self.norm.beta + (self.offset - self.norm.mean) * slope

    def unless_frozen(self, batch: jax.Array, running: ArrayLike) -> jax.Array:
        """Return `batch` while batch statistics are used, else `running`."""
        return batch if self.frozen is None else jnp.where(self.frozen, running, batch)


class Folded(NamedTuple):
    """What a folded layer computes in one step.

    Attributes:
      output: `BN(layer(x))`, float32.
      mean: batch mean of the layer's output, (C,); None on running statistics.
      var: its variance.
    """

    output: jax.Array
    mean: jax.Array | None = None
    var: jax.Array | None = None


_LEAST_SCALE = 2.0**-40
"""The least magnitude of a folding scale: its square, times a variance, is no subnormal number."""


def safe_gamma(norm: BatchNormState) -> jax.Array:
    """Return the gamma that is folded into the kernel.

    Ones for zeros: such a channel still has statistics and a gradient. Where `gamma / sigma` is so
    small that statistics of the folded channel would underflow, one that is just not.
    """
    least = jnp.copysign(_LEAST_SCALE * norm.sigma, norm.gamma)
    gamma = jnp.where(jnp.abs(norm.gamma) < _LEAST_SCALE * norm.sigma, least, norm.gamma)
    return jnp.where(norm.gamma == 0, 1.0, gamma)


def folding_scale(norm: BatchNormState) -> jax.Array:
    """Return `s`, the factor that one-convolution folding puts on the kernel, without gradient.

    `s = gamma / sigma` on running statistics. What comes after does not depend on `s` but for
    quantization (batch statistics scale along), so that its gradient is zero.
    """
    return lax.stop_gradient(true_divide(safe_gamma(norm), norm.sigma))


def _affine(c: jax.Array, slope: jax.Array, shift: jax.Array) -> jax.Array:
    return c.astype(jnp.float32) * along_channel(slope, c.ndim, -1) + along_channel(
        shift, c.ndim, -1
    )


def scaled_kernel(kernel: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Multiply each output channel of a kernel by its factor, in float32; None: leave it."""
    if factor is None:
        return kernel
    return kernel.astype(jnp.float32) * along_channel(factor, kernel.ndim, -1)


def magnitudes(kernel: jax.Array, factor: jax.Array | None = None) -> jax.Array:
    """Return the largest magnitude of each channel of `scaled_kernel(kernel, factor)`, (C,).

    Rounding keeps the order of magnitudes: the largest product is that of the largest weight.
    """
    largest = jnp.max(jnp.abs(kernel), axis=tuple(range(kernel.ndim - 1))).astype(jnp.float32)
    return largest if factor is None else largest * jnp.abs(factor)


def left_to_scale(norm: BatchNormState) -> jax.Array:
    """Return what is left to multiply a folded channel by on running statistics.

    1; 0 where gamma is 0, and a little where it is nearly.
    """
    return true_divide(norm.gamma, lax.stop_gradient(safe_gamma(norm)))


def one_conv(layer: Layer) -> Folded:
    """Fold with one convolution: `c = layer(fq(kernel * s))`, then BatchNorm as one affine on `c`.

    With batch statistics of `y = c / s + bias`, which is never built:
    `BN(y) = gamma * sign(s) * (c - E[c]) / sqrt(Var[c] + epsilon * s^2) + beta`.
    """
    norm = layer.norm
    s = folding_scale(norm)
    c = layer.run(layer.quantize(layer.kernel, s))
    slope = left_to_scale(norm)
    running = layer.running_shift(true_divide(norm.gamma, norm.sigma))
    if layer.moments is None:
        return Folded(_affine(c, slope, running))
    mean, var = layer.moments(c)
    batch_slope = norm.gamma * jnp.sign(s) * lax.rsqrt(var + layer.epsilon * s * s)
    shift = layer.unless_frozen(norm.beta - mean * batch_slope, running)
    output = _affine(c, layer.unless_frozen(batch_slope, slope), shift)
    return Folded(output, mean / s + layer.offset, var / (s * s))


def two_conv(layer: Layer) -> Folded:
    """Fold with two convolutions, the first for batch statistics, the second quantized.

    `c = layer(fq(kernel * gamma / sigma_r))`; with batch statistics
    `BN(y) = c * sigma_r / sigma_b + beta + (bias - mu_b) * gamma / sigma_b`, else
    `c + beta + (bias - mu_r) * gamma / sigma_r`.

    Source:
      Krishnamoorthi, arXiv:1806.08342, section 3.2.2, figures 7 and 8.
    """
    norm = layer.norm
    slope = true_divide(norm.gamma, norm.sigma)
    c = layer.run(layer.quantize(layer.kernel, slope))
    running = layer.running_shift(slope)
    if layer.moments is None:
        return Folded(_affine(c, jnp.ones_like(slope), running))
    mean, var = layer.moments(layer.run(layer.kernel))
    correction = norm.sigma * lax.rsqrt(var + layer.epsilon)
    shift = norm.beta - mean * norm.gamma * lax.rsqrt(var + layer.epsilon)
    shift = layer.unless_frozen(shift, running)
    output = _affine(c, layer.unless_frozen(correction, 1.0), shift)
    return Folded(output, mean + layer.offset, var)


FOLDS: dict[str, Callable[[Layer], Folded]] = {"one_conv": one_conv, "two_conv": two_conv}
"""How a layer is folded in training, by the mode that folds before quantizing."""
