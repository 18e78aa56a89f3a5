"""The interface: how a runtime rounds sums and products of two tensors, and square roots."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.typing import ArrayLike

from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.norms import Root

Grids = tuple[Grid, Grid, Grid]
"""Those of both operands and of the output."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum or difference of two tensors, as a runtime computes it.

    Attributes:
      kind: the name of its operation in an integer model.
      constants: what `apply` needs to know of the grids.
      apply: from two tensors of centered codes (`code - zero_point`, int32), the constants and the
        grids to the output's centered codes, whole float32 numbers, not clipped.
    """

    kind: str
    constants: Callable[[Grids], Sequence[jax.Array]]
    apply: Callable[[jax.Array, jax.Array, Sequence[ArrayLike], Grids], jax.Array]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two tensors, as a runtime computes it.

    Attributes:
      kind: the name of its operation in an integer model.
      apply: from products of centered codes, int32, the multiplier (real units of a product over
        those of an output code) and the output's grid to its centered codes, whole float32
        numbers, not clipped.
    """

    kind: str
    apply: Callable[[jax.Array, ArrayLike, Grid], jax.Array]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm, with a runtime's square root.

    Attributes:
      kind: the name of its operation in an integer model.
      spread: the name of a deviation's.
      root: computes the square root.
    """

    kind: str
    spread: str
    root: Root


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How one runtime rounds: evaluation and the integer model both compute with it.

    All else is the same in every runtime, see `numerics.requantize`.
    """

    name: str
    """Of the runtime's files, as `SimQATConfig.backend` has it."""
    add: Sum
    subtract: Sum
    multiply: Product
    norm: Norm
