"""The best choices of one option for each of several parts, for any size that all may have."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_UNITS = 2**17
"""Sizes are told apart in so many units: below as many bytes every one, above it rounded up."""


class Option(NamedTuple):
    """What a part may be.

    Attributes:
      size: bytes.
      noise: what it adds to all others' noise.
    """

    size: int
    noise: float


class Frontier:
    """The least noise for each size, by dynamic programming over the parts.

    Args:
      parts: the options of each part.

    Attributes:
      caps: the sizes, in bytes, from which on less noise is possible than below, in order.
    """

    def __init__(self, parts: Sequence[Sequence[Option]]):
        most = sum(max(option.size for option in options) for options in parts)
        self._unit = -(-most // _UNITS) or 1
        self._units = [[-(-option.size // self._unit) for option in options] for options in parts]
        total = sum(map(max, self._units))
        noise, self._taken = np.zeros(1), list[np.ndarray]()
        for options, units in zip(parts, self._units, strict=True):
            longer = np.full(len(noise) + max(units), np.inf)
            taken = np.zeros(len(longer), np.int16)
            for number, (option, size) in enumerate(zip(options, units, strict=True)):
                end = size + len(noise)
                better = noise + option.noise < longer[size:end]
                longer[size:end][better] = (noise + option.noise)[better]
                taken[size:end][better] = number
            noise = longer
            self._taken.append(taken)
        assert len(noise) == total + 1
        below = np.minimum.accumulate(np.append(np.inf, noise[:-1]))
        self._best = np.flatnonzero(noise < below)
        self.caps = [int(size) * self._unit for size in self._best]

    def choice(self, cap: int) -> list[int]:
        """Return the number of each part's option, of the least noise that this size allows.

        Args:
          cap: bytes, at least the first of `caps`.
        """
        size = int(self._best[np.searchsorted(self._best, cap // self._unit, side="right") - 1])
        numbers = []
        for taken, units in zip(self._taken[::-1], self._units[::-1], strict=True):
            numbers.append(int(taken[size]))
            size -= units[numbers[-1]]
        return numbers[::-1]
