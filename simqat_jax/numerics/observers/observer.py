"""What an observer is: pure `init`, `measure`, `update` and `range` on a small state."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from simqat_jax.numerics.folding import scaled_kernel
from simqat_jax.numerics.requantize import FREE, Bounds
from simqat_jax.numerics.spec import QuantSpec

Range = tuple[ArrayLike, ArrayLike]
"""Lowest and highest value, real units, shape () or (C,)."""
AxisName = Hashable
"""One or several axes of `pmap`, `shard_map` or `vmap`."""
Role = Literal["activation", "weight", "constant"]
"""What a quantizer quantizes."""


class State(Protocol):
    """What an observer remembers: a NamedTuple whose last field is `nonfinite`."""

    @property
    def nonfinite(self) -> jax.Array:
        """Number of batches that held NaN or Inf and were left out, int32, shape ()."""
        ...


S = TypeVar("S", bound=State)
M = TypeVar("M")
T = TypeVar("T", bound=tuple)


def restored(kind: type[T], state: object) -> T:
    """Restore a NamedTuple that a checkpoint library returned as a dictionary or list.

    Raises:
      TypeError: it is none.
    """
    names: Sequence[str] = getattr(kind, "_fields", ())
    if isinstance(state, Mapping) and set(state) == set(names):
        return kind(*(state[name] for name in names))
    if isinstance(state, Sequence) and len(state) == len(names):
        return kind(*state)
    raise TypeError(f"{state!r} is no {kind.__name__}: it must hold {', '.join(names)}.")


@dataclasses.dataclass(frozen=True)
class Observer(Generic[S, M]):
    """How the range of one quantizer follows its data.

    `S` is what it remembers, `M` what it measures of a batch. Nobody outside of an observer looks
    into either, but for the field `nonfinite` of a state.

    Attributes:
      spec: names the observer and holds its settings.
      num_channels: entries of the range, None for one per tensor.
      nonnegative: the tensor holds nothing below zero, so that its range starts at zero.
    """

    spec: QuantSpec
    num_channels: int | None = None
    nonnegative: bool = False

    covers: ClassVar[bool] = False
    """Whether no value lies outside of `present_range`."""

    fits_grid: ClassVar[bool] = False
    """Whether the range is chosen for the codes of its grid: few of them leave out what is large
    for the sake of all else."""

    @classmethod
    def of_role(cls, role: Role) -> "type[Observer]":
        """Return what observes tensors of a role under this observer's name; here: itself."""
        del role
        return cls

    @classmethod
    def keeps_state(cls, role: Role) -> bool:
        """Whether the range of such a quantizer is remembered; else it is `present_range`."""
        return role != "constant"

    @property
    def channel_axis(self) -> int | None:
        """The axis with one range per channel."""
        return None if self.num_channels is None else -1

    @property
    def label(self) -> str:
        """Its name and setting, to be read."""
        return self.spec.observer

    @property
    def known_range(self) -> Range | None:
        """The range that is known without any data; None: there is none such."""
        return None

    def init(self) -> S:
        """Return the empty state."""
        raise NotImplementedError

    def restore(self, state: object) -> S:
        """Restore the type of a state that a checkpoint library returned as a dictionary or list.

        Raises:
          TypeError: it is none.
        """
        raise NotImplementedError

    def measure(self, x: jax.Array, bounds: Bounds = FREE) -> M:
        """Take what the state needs to know of one batch, without gradient.

        Args:
          x: the values.
          bounds: what they are clamped to afterwards.
        """
        raise NotImplementedError

    def merge(self, one: M, other: M) -> M:
        """Return what two tensors with one range have been together."""
        raise NotImplementedError

    def reduce(self, measured: M, axis_name: AxisName) -> M:
        """Return what all devices of a mapped axis have measured together."""
        raise NotImplementedError

    def update(self, state: S, measured: M) -> S:
        """Return the state after a batch; unchanged but for its count if NaN or Inf is in it."""
        raise NotImplementedError

    def range(self, state: S) -> Range:
        """Return the range that a state stands for; lowest above highest: none yet.

        It must be read from the state, not computed in sums, which compilers order differently:
        evaluation and the integer model have to find the same one.
        """
        raise NotImplementedError

    def training_range(self, state: S, before: S | None = None) -> Range:
        """Return the range that a training step quantizes with.

        Args:
          state: after the step's batch.
          before: where several tensors share the range, the state before the step: the first of
            them come before the range is known.
        """
        del before
        lo, hi = self.range(state)
        return (np.zeros(np.shape(hi), np.float32) if self.nonnegative else lo), hi

    def scaled_range(self, kernel: jax.Array, factor: jax.Array | None) -> Range:
        """Return `present_range` of a kernel, times a factor for each channel, (C,), if any."""
        return self.present_range(scaled_kernel(kernel, factor))

    def present_range(self, x: jax.Array) -> Range:
        """Return the range of the values at hand, where no state is kept."""
        raise NotImplementedError
