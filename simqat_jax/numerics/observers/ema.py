"""The observer `ema`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from simqat_jax.numerics.affine import rounded_product
from simqat_jax.numerics.observers.extremes import OfExtremes


class Ema(OfExtremes):
    """An exponential moving average of each batch's extremes."""

    @property
    def label(self) -> str:
        return f"ema {self.spec.ema_decay:g}"

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        decay = self.spec.ema_decay
        mean = rounded_product(old, decay) + rounded_product(batch, 1 - decay)
        return jnp.where(jnp.isfinite(old), mean, batch)
