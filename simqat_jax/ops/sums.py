"""Sums of one tensor, along axes or over windows: means and average pooling.

`rint(sum(q - z_x) * f32(s_x / (s_y * n))) + z_y`, with one `n` or, where average pooling does not
count padding, one for each position.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir.graph import Mean, Node
from simqat_jax.ir.program import Context, Need, Op
from simqat_jax.numerics.exact_sums import exact_sum, sum_fits
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.requantize import mean_multiplier
from simqat_jax.ops.moves import window
from simqat_jax.ops.operation import (
    Clamp,
    ExactStep,
    IntegerOperation,
    LoweredStep,
    requantize,
    thinnest,
)


def _count(node: Node, shape: Sequence[int]) -> int:
    """Return how many elements of a tensor of this shape a sum or pooled sum adds up."""
    params = node.eqn.params
    if "axes" in params:
        return math.prod(shape[axis] for axis in params["axes"])
    return math.prod(params["window_dimensions"])


def _fits(count: int, x: Grid) -> bool:
    """Whether the sums are exact."""
    return sum_fits(count, x.largest)


def _divisor(divisor: ArrayLike) -> jax.Array:
    """Return what sums are divided by: a number, or an array that broadcasts to them."""
    array = jnp.asarray(divisor, jnp.float32)
    return array.reshape(()) if array.size == 1 else array


class MeanOperation(IntegerOperation):
    """What a mean, average pooling or sum is on integers."""

    fuses_clamp = True

    def joins(self, inputs: int) -> bool:
        return True

    def codes(self, at: ExactStep) -> jax.Array | None:
        x, node = at.inputs[0], at.step.node
        assert isinstance(node, Mean)
        if x is None:
            return None
        divisor = 1.0 if node.divisor is None else at.reals[-1]
        count = _count(node, x.codes.shape)
        if not _fits(count, x.grid):
            return None
        adder = node.parts[0] if node.parts else node  # without the division behind it
        total = exact_sum(lambda codes: adder.run(codes)[0], x, count)
        scales = x.grid.params.scale, at.grid.params.scale
        return at.requantized(total, mean_multiplier(*scales, _divisor(divisor)))

    def lower(self, at: LoweredStep) -> bool:
        node, grid = at.node, at.in_grid()
        assert isinstance(node, Mean) and isinstance(node.inputs[0], int)
        divisor = 1.0 if node.divisor is None else at.builder.held(node.divisor)
        count = _count(node, at.builder.graph.avals[node.inputs[0]].shape)
        if not _fits(count, grid):
            return False
        divisor = _divisor(thinnest(divisor))
        multiplier = mean_multiplier(grid.scale, at.out_grid.scale, divisor)
        one = divisor.item() if divisor.size == 1 else 0.0
        given = {"clamp": at.clamp, "count": one, "arrays": {"multiplier": multiplier}}
        x, params = at.input(), node.eqn.params
        if "axes" in params:
            at.emit(SumOver, (x,), axes=tuple(params["axes"]), **given)
        else:
            at.emit(SumPool, (x,), **window(params), **given)
        return True


_MULTIPLIER = {"multiplier": Need(("float32",))}
"""One number, or one for each sum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumOver(Op):
    """A sum along axes; its "multiplier" divides by `count` (0.0: by a number for each sum)."""

    kinds = ("sum",)
    axes: tuple[int, ...]
    count: float
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return _MULTIPLIER

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        sums = jnp.sum(c.in_grid().centered(inputs[0]), axis=self.axes)
        return (requantize(c, sums, self.clamp),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumPool(Op):
    """A sum of each window; its "multiplier" divides by `count` (0.0: one for each position)."""

    kinds = ("sum_pool",)
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    count: float
    clamp: Clamp

    def needs(self, c: Context) -> Mapping[str, Need]:
        return _MULTIPLIER

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        x = c.in_grid().centered(inputs[0])
        zero = np.asarray(0, x.dtype)
        sums = lax.reduce_window(x, zero, lax.add, self.window, self.strides, self.padding)
        return (requantize(c, sums, self.clamp),)


OPERATIONS = {Mean: MeanOperation()}
PROGRAM_OPERATIONS = (SumOver, SumPool)
