"""Norms: LayerNorm, RMSNorm, GroupNorm, InstanceNorm and L2 on codes, see `numerics.norms`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from simqat_jax.ir.compound import Norm
from simqat_jax.ir.plan import Step
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.numerics.affine import rounded_product, true_divide
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.norms import (
    MOST_ELEMENTS,
    Guard,
    Statistics,
    normalized,
    scaled_and_shifted,
)
from simqat_jax.numerics.rounding import ROUNDINGS, Rounding
from simqat_jax.ops.operation import (
    Clamp,
    Everywhere,
    ExactStep,
    IntegerOperation,
    LoweredStep,
    thinnest,
)

_LEAST = 2.0**-40
"""Squared codes that change no code: the variance of codes that differ is larger."""


class NormOperation(IntegerOperation):
    """What a norm is on integers."""

    fuses_clamp = True

    def joins(self, inputs: int) -> bool:
        return True

    def form(self, step: Step) -> str:
        return "normalized from its codes"

    def codes(self, at: ExactStep) -> Everywhere | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, Norm)
        if x is None:
            return None
        statistics = Statistics(node.axes, node.centered)
        grouped = _grouped(x.codes.shape, node.groups)
        if not fits(statistics, grouped, x.grid):
            return None
        guard = guard_in_codes(node.epsilon, node.least, node.offset, x.grid)
        y = normalized(x.codes.reshape(grouped), statistics, guard, at.rounding.norm.root)
        scale, shift = _affine(node, at.reals[1:], x.codes.shape, at.grid)
        return Everywhere(at.clamped(scaled_and_shifted(y.reshape(x.codes.shape), scale, shift)))

    def lower(self, at: LoweredStep) -> bool:
        node, x = at.node, at.input()
        assert isinstance(node, Norm) and isinstance(node.inputs[0], int)
        shape, grid = at.builder.shape(node.inputs[0]), at.in_grid()
        statistics = Statistics(node.axes, node.centered)
        if not fits(statistics, _grouped(shape, node.groups), grid):  # or over a free batch
            return False
        values = [at.builder.held(v) for v in node.inputs[1:]]
        if node.layer is None:  # broadcast to the input
            values = list(map(thinnest, values))
        else:
            at.layer_values()  # raises for what is not finite
        scale, shift = _affine(node, values, shape, at.out_grid)
        arrays = {"scale": scale} if shift is None else {"scale": scale, "shift": shift}
        at.emit(
            Normalize,
            (x,),
            kind=at.placement.rounding.norm.kind,
            axes=node.axes,
            groups=node.groups or 0,
            centered=node.centered,
            **held(guard_in_codes(node.epsilon, node.least, node.offset, grid)),
            clamp=at.clamp,
            arrays=arrays,
        )
        return True


def fits(statistics: Statistics, shape: Sequence[int], x: Grid) -> bool:
    """Whether sums of codes and of their squares are exact; `shape`: of what has the axes."""
    lengths = [shape[a] for a in statistics.axes]
    if x.num_bits > 8 or not lengths or min(lengths) <= 0:
        return False
    count = math.prod(lengths)
    return count <= MOST_ELEMENTS and count * largest_square(x, statistics.centered) < 2**31


def largest_square(x: Grid, centered: bool) -> float:
    """Return the largest square that a sum has, on average: codes lie around their mean."""
    return ((x.qmax - x.qmin) / 2 + 1) ** 2 if centered else x.largest**2


def _grouped(shape: Sequence[int], groups: int | None) -> tuple[int, ...]:
    """Return a shape with its last axis in groups."""
    if not groups:
        return tuple(shape)
    return (*shape[:-1], groups, shape[-1] // groups)


def guard_in_codes(epsilon: float, least: float, offset: float, x: Grid) -> Guard:
    """Return what keeps a deviation from zero in codes; no zero, by which nothing divides."""
    scale = x.params.scale

    def counted(real: float) -> jax.Array:
        return true_divide(jnp.float32(real), scale)

    added = jnp.maximum(true_divide(counted(epsilon), scale), _LEAST)
    return Guard(added, counted(least) if least else None, counted(offset) if offset else None)


def held(guard: Guard) -> dict[str, float]:
    """Return the fields of an operation that hold a guard; zero stands for None."""
    return {k: 0.0 if v is None else float(v) for k, v in guard._asdict().items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfStatistics(Op):
    """An operation that divides by a deviation, or returns one.

    Attributes:
      axes: over which statistics are taken.
      centered: the mean is subtracted.
      epsilon: added to the variance, in squared codes.
      least: the least deviation, in codes.
      offset: added to the deviation, in codes.
      clamp: lowest and highest code of the output.
    """

    axes: tuple[int, ...]
    centered: bool
    epsilon: float
    least: float = 0.0
    offset: float = 0.0
    clamp: Clamp

    @property
    def statistics(self) -> Statistics:
        """Over which axes, and how."""
        return Statistics(self.axes, self.centered)

    @property
    def guard(self) -> Guard:
        """What keeps the deviation from zero."""
        least, offset = (jnp.float32(v) if v else None for v in (self.least, self.offset))
        return Guard(jnp.float32(self.epsilon), least, offset)

    def grouped(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that has the axes; `shape`: the input's."""
        return tuple(shape)

    def count(self, shape: Sequence[int]) -> int:
        """Return how many elements a sum has; `shape`: the input's."""
        return math.prod(self.grouped(shape)[a] for a in self.axes)

    def largest_sum(self, shape: Sequence[int], x: Grid) -> float:
        """Return what a sum of squares may reach; `x`: the input's grid."""
        return self.count(shape) * largest_square(x, self.centered)


def _affine(
    node: Norm, operands: Sequence[ArrayLike], shape: Sequence[int], y: Grid
) -> tuple[jax.Array, jax.Array | None]:
    """Return scale and shift in codes of the output, in shapes that broadcast to the input.

    Args:
      node: the norm.
      operands: the values of its inputs behind the first.
      shape: of the first.
      y: the output's grid.
    """
    features = tuple(n if axis in node.feature_axes else 1 for axis, n in enumerate(shape))
    scale, shift = jnp.ones((1,) * len(shape), jnp.float32), None
    for value, name in zip(operands, node.affine, strict=False):
        value = jnp.asarray(value, jnp.float32)
        if node.layer is not None:
            value = value.reshape(features)
        if name == "scale":
            scale = rounded_product(scale, value)
        else:
            shift = true_divide(value, y.params.scale)
    return true_divide(scale, y.params.scale), shift


_NORMS = {r.norm.kind: r.norm for r in ROUNDINGS.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Normalize(OfStatistics):
    """A norm; its kind names the runtime whose square root it takes.

    Arrays: "scale" and maybe "shift", in codes of the output; they broadcast to the input.

    Attributes:
      groups: of the last axis, which counts as two for the axes; 0: it is one.
    """

    kinds = tuple(_NORMS)
    groups: int

    def rounds_as(self, rounding: Rounding) -> bool:
        return self.kind == rounding.norm.kind

    def grouped(self, shape: Sequence[int]) -> tuple[int, ...]:
        return _grouped(shape, self.groups)

    def needs(self, c: Context) -> Mapping[str, Need]:
        return {"scale": Need(("float32",)), "shift": Need(("float32",), optional=True)}

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        x = c.in_grid().centered(inputs[0]).astype(jnp.float32)
        root = _NORMS[self.kind].root
        y = normalized(x.reshape(self.grouped(x.shape)), self.statistics, self.guard, root)
        codes = scaled_and_shifted(y.reshape(x.shape), c.arrays["scale"], c.arrays.get("shift"))
        return (c.grid.from_float(codes, self.clamp),)


OPERATIONS = {Norm: NormOperation()}
PROGRAM_OPERATIONS = (Normalize,)
