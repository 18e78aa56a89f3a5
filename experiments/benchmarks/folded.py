"""Float networks with BatchNorm folded in training: what that costs without quantization."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


class Folded(nn.Module):
    """A float network that runs each convolution in front of a BatchNorm twice.

    First with the kernel as it is, for the statistics of the batch, then with the kernel that is
    folded with them: all convolutions that `bn_fold="two_conv"` has, and nothing else of it.

    Attributes:
      model: the float network.
    """

    model: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Return what the network does, in training within rounding."""
        called: tuple[nn.Conv, jax.Array, jax.Array] | None = None

        def fold(call: Any, args: tuple, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            nonlocal called
            y, layer = call(*args, **kwargs), context.module
            if context.method_name != "__call__" or self.is_initializing() or not train:
                return y
            if isinstance(layer, nn.Conv):
                called = layer, args[0], y
            elif isinstance(layer, nn.BatchNorm) and called is not None and called[2] is args[0]:
                return _again(*called, layer)
            return y

        with nn.intercept_methods(fold):
            return self.model(x, train=train)


def _again(conv: nn.Conv, x: jax.Array, y: jax.Array, norm: nn.BatchNorm) -> jax.Array:
    """Return a folded convolution of `x`, which has given `y` unfolded."""
    axes = tuple(range(y.ndim - 1))
    kernel, of_norm = conv.variables["params"]["kernel"], norm.variables["params"]
    slope = of_norm["scale"] * lax.rsqrt(y.var(axes) + norm.epsilon)
    bias = of_norm["bias"] - slope * y.mean(axes)
    folded: Any = conv.clone(parent=None, name=None, use_bias=True)
    kernel = kernel * jnp.broadcast_to(slope, kernel.shape)
    return folded.apply({"params": {"kernel": kernel, "bias": bias}}, x)
