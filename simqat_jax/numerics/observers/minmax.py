"""The observer `minmax`."""

from collections.abc import Callable

import jax

from simqat_jax.numerics.observers.extremes import OfExtremes


class MinMax(OfExtremes):
    """The extremes of all batches so far."""

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        return widen(old, batch)
