"""The observer `batch`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.numerics.folding import magnitudes, scaled_kernel
from simqat_jax.numerics.observers.extremes import OfExtremes, RangeState
from simqat_jax.numerics.observers.observer import Range, Role


class Batch(OfExtremes):
    """The extremes of the last batch; of a weight, those of its present values."""

    covers = True

    @classmethod
    def keeps_state(cls, role: Role) -> bool:
        return role == "activation"

    @property
    def label(self) -> str:
        return "batch"

    def follow(
        self, old: jax.Array, batch: jax.Array, widen: Callable[..., jax.Array]
    ) -> jax.Array:
        return batch

    def training_range(self, state: RangeState, before: RangeState | None = None) -> Range:
        lo, hi = state.lo, state.hi
        if before is not None:  # the range starts anew with each batch
            lo, hi = jnp.minimum(lo, before.lo), jnp.maximum(hi, before.hi)
        return (np.zeros(hi.shape, np.float32) if self.nonnegative else lo), hi

    def present_range(self, x: jax.Array) -> Range:
        return self.scaled_range(x, None)

    def scaled_range(self, kernel: jax.Array, factor: jax.Array | None) -> Range:
        if not self.spec.symmetric:
            return self.measure(scaled_kernel(kernel, factor))
        # A symmetric grid needs the magnitude alone.
        magnitude = magnitudes(lax.stop_gradient(kernel), factor)
        if self.num_channels is None:
            magnitude = jnp.max(magnitude)
        return -magnitude, magnitude
