"""The observer `fixed`: a range that is known."""

import jax
import numpy as np

from simqat_jax.numerics.observers.observer import Observer, Range, Role


class Fixed(Observer):
    """The range that the spec gives; it keeps no state, and looks at no values."""

    fits_grid = True

    @classmethod
    def keeps_state(cls, role: Role) -> bool:
        return False

    @property
    def label(self) -> str:
        return "fixed"

    @property
    def known_range(self) -> Range:
        assert self.spec.range is not None
        shape = () if self.num_channels is None else (self.num_channels,)
        lo, hi = (np.full(shape, end, np.float32) for end in self.spec.range)
        return lo, hi

    def present_range(self, x: jax.Array) -> Range:
        del x
        return self.known_range
