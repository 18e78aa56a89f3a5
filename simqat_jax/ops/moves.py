"""What moves codes without changing them: reshapes, slices, max pooling, concatenation."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from simqat_jax.ir.graph import Concat, Dropout, Graph, Move, Node, gathered_axes
from simqat_jax.ir.program import Context, Op, Shape, grid_of
from simqat_jax.numerics.grid import Grid, codes_fit
from simqat_jax.ops.floats import emit_move
from simqat_jax.ops.operation import (
    Clamp,
    Demand,
    LoweredStep,
    Operation,
    SharedGridOperation,
)

# Primitives behind which the last axis holds other channels.
_MOVES_CHANNELS = frozenset("transpose rev gather broadcast_in_dim reduce_max reduce_min".split())


class MoveOperation(Operation):
    """What a reshape, slicing or max pooling is on integers."""

    def demand(self, data: Sequence[int], *, needed: bool, wanted: bool) -> Demand:
        return Demand(data[:1] if needed else (), data[:1] if wanted else ())

    def carries_grid(self, node: Node, graph: Graph, *, per_channel: bool) -> bool:
        if not per_channel:
            return True
        before, after = (
            graph.avals[v].shape for v in (node.inputs[0], node.outputs[0]) if isinstance(v, int)
        )
        return before[-1:] == after[-1:] and not _moves_channels(node)

    def move(self, at: LoweredStep) -> None:
        check_codes_fit(at)
        rule = _RULES.get(at.node.primitive, _by_function)
        if not rule(at):
            emit_move(at)


def _moves_channels(node: Node) -> bool:
    if node.primitive == "reduce_window_max":
        return node.eqn.params["window_dimensions"][-1] != 1
    return node.primitive in _MOVES_CHANNELS


def check_codes_fit(at: LoweredStep) -> None:
    """Raise ValueError where the float type of a tensor does not hold its codes."""
    v = at.node.inputs[0]
    assert isinstance(v, int)
    dtype = at.builder.graph.avals[v].dtype
    if not codes_fit(dtype, at.out_grid):
        raise ValueError(
            f"{at.node.where}: {dtype} does not hold codes of so many bits, so "
            "that evaluation computes with real values behind it. Use 8 bits, or float32."
        )


def reshaped(at: LoweredStep, source: int, shape: Shape) -> int:
    """Return a tensor of the program in another shape."""
    if at.shape_of(source) == shape:
        return source
    tensors = at.builder.tensors
    tensor = tensors[source]
    grid = tensor.grid
    assert grid is not None
    if tensor.value is not None:
        lengths = [1 if d < 0 else d for d in shape]
        tensors[source] = dataclasses.replace(
            tensor, shape=shape, value=tensor.value.reshape(lengths)
        )
        return source
    return at.between(Reshape, source, shape, grid)


def turned(at: LoweredStep, source: int, order: tuple[int, ...]) -> int:
    """Return a tensor of the program with its axes in another order."""
    if order == tuple(range(len(order))):
        return source
    tensor = at.builder.tensors[source]
    shape = tuple(tensor.shape[a] for a in order)
    return at.between(Transpose, source, shape, grid_of(tensor), permutation=order)


# Lowering, by primitive: False where it takes a function after all -------------------------------


def _by_function(at: LoweredStep) -> bool:
    del at
    return False


def _reshape(at: LoweredStep) -> bool:
    at.emit(Reshape, (at.input(),))
    return True


def _transpose(at: LoweredStep) -> bool:
    permutation = tuple(at.node.eqn.params["permutation"])
    at.emit(Transpose, (at.input(),), permutation=permutation)
    return True


def _broadcast(at: LoweredStep) -> bool:
    dimensions = tuple(at.node.eqn.params["broadcast_dimensions"])
    at.emit(Broadcast, (at.input(),), dimensions=dimensions)
    return True


def _slice(at: LoweredStep) -> bool:
    params = at.node.eqn.params
    start, limit = params["start_indices"], at.builder.dims(params["limit_indices"])
    strides = params["strides"] or (1,) * len(start)
    at.emit(Slice, (at.input(),), start=tuple(start), limit=limit, strides=tuple(strides))
    return True


def _split(at: LoweredStep) -> bool:
    params, x = at.node.eqn.params, at.input()
    shape, axis, begin = at.shape_of(x), params["axis"], 0
    for v, size in zip(at.node.outputs, map(int, params["sizes"]), strict=True):
        start, limit = [0] * len(shape), list(shape)
        start[axis], limit[axis] = begin, begin + size
        begin += size
        strides = (1,) * len(shape)
        at.emit(Slice, (x,), v, start=tuple(start), limit=tuple(limit), strides=strides)
    return True


def _reverse(at: LoweredStep) -> bool:
    at.emit(Reverse, (at.input(),), axes=tuple(at.node.eqn.params["dimensions"]))
    return True


def _pad(at: LoweredStep) -> bool:
    config = at.node.eqn.params["padding_config"]
    at.emit(Pad, (at.input(),), padding=tuple(tuple(map(int, p)) for p in config))
    return True


def _reduce(at: LoweredStep) -> bool:
    kind = at.node.primitive.removeprefix("reduce_")
    at.emit(Extreme, (at.input(),), kind=kind, axes=tuple(at.node.eqn.params["axes"]))
    return True


def _max_pool(at: LoweredStep) -> bool:
    params = at.node.eqn.params
    if any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"])):
        return False
    at.emit(MaxPool, (at.input(),), **window(params))
    return True


def _gather(at: LoweredStep) -> bool:
    """Lower a gather with constant indices: the axes at which it picks become one."""
    x, picked = at.node.inputs
    assert isinstance(x, int)
    axes, shape = gathered_axes(at.node.eqn), at.builder.shape(x)
    if axes is None or at.builder.is_data(picked):
        return False
    lead, lengths = at.builder.shape(picked)[:-1], [shape[a] for a in axes]
    place = _place_of(lead, at.node.eqn.params["dimension_numbers"].offset_dims)
    if place is None or any(d < 1 for d in lead):
        return False
    indices = np.moveaxis(np.asarray(at.builder.value(picked)), -1, 0)
    if any(i.min() < 0 or i.max() >= d for i, d in zip(indices, lengths, strict=True)):
        return False  # or along a free axis, whose length is below zero
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    before, behind = rest[:place], rest[place:]
    y = turned(at, at.input(), (*before, *axes, *behind))
    lo, hi = (tuple(shape[a] for a in part) for part in (before, behind))
    y = reshaped(at, y, (*lo, math.prod(lengths), *hi))
    flat = np.ravel_multi_index(tuple(indices), lengths).ravel()
    fields = {"axis": place, "indices": tuple(map(int, flat))}
    if len(lead) == 1:
        at.emit(Take, (y,), **fields)
    else:
        at.emit(Reshape, (at.between(Take, y, (*lo, len(flat), *hi), at.out_grid, **fields),))
    return True


def _place_of(lead: Shape, others: Sequence[int]) -> int | None:
    """Return the first of the axes that indices become in a gather's output; None: they are apart.

    Args:
      lead: the lengths of these axes.
      others: the other axes of the output.
    """
    first = next(k for k, axis in enumerate((*others, -1)) if k != axis)
    return first if all(axis >= first + len(lead) for axis in others[first:]) else None


_RULES: Mapping[str, Callable[[LoweredStep], bool]] = {
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    **dict.fromkeys(("copy", "convert_element_type", "stop_gradient"), _reshape),
    **dict.fromkeys(("name", "sharding_constraint"), _reshape),
    **dict.fromkeys(("reduce_max", "reduce_min"), _reduce),
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "rev": _reverse,
    "pad": _pad,
    "reduce_window_max": _max_pool,
    "gather": _gather,
}


def needs_function(node: Node) -> bool:
    """Whether a node that moves codes may have no operation of its own."""
    ruled = node.primitive in _RULES and node.primitive != "gather"
    return type(node) is Move and not ruled


def window(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a pooling."""
    return {
        "window": tuple(params["window_dimensions"]),
        "strides": tuple(params["window_strides"]),
        "padding": tuple((int(lo), int(hi)) for lo, hi in params["padding"]),
    }


class ConcatOperation(SharedGridOperation):
    """What a concatenation or stack is on integers."""

    def lower(self, at: LoweredStep) -> bool:
        params, tensors = at.node.eqn.params, at.builder.tensors
        ids = [at.operand(p) for p in range(len(at.node.inputs))]
        ids = [i for i in ids if 0 not in tensors[i].shape] or ids
        stacks = at.node.primitive == "stack"
        axis = int(params["axis" if stacks else "dimension"])
        if stacks:
            shapes = [tensors[i].shape for i in ids]
            ids = [
                reshaped(at, i, (*shape[:axis], 1, *shape[axis:]))
                for i, shape in zip(ids, shapes, strict=True)
            ]
        at.emit(Concatenate, ids, axis=axis)
        return True

    def move(self, at: LoweredStep) -> None:
        check_codes_fit(at)
        self.lower(at)


# Operations of the program -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reshape(Op):
    """The same codes in another shape, that of the output."""

    kinds = ("reshape",)

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (jnp.reshape(inputs[0], c.shape(c.outputs[0].shape)),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transpose(Op):
    """Axes in another order."""

    kinds = ("transpose",)
    permutation: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (jnp.transpose(inputs[0], self.permutation),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broadcast(Op):
    """Codes repeated; `dimensions` are the output's axes that the input's are."""

    kinds = ("broadcast",)
    dimensions: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        shape = c.shape(c.outputs[0].shape)
        return (lax.broadcast_in_dim(inputs[0], shape, self.dimensions),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice(Op):
    """A part of each axis, from `start` to `limit` (-k: k times the batch size)."""

    kinds = ("slice",)
    start: tuple[int, ...]
    limit: Shape
    strides: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (lax.slice(inputs[0], self.start, c.shape(self.limit), self.strides),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(Op):
    """Axes turned round."""

    kinds = ("reverse",)
    axes: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (lax.rev(inputs[0], self.axes),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Take(Op):
    """Elements picked along an axis."""

    kinds = ("take",)
    axis: int
    indices: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (jnp.take(inputs[0], np.asarray(self.indices), axis=self.axis),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad(Op):
    """Codes of zero around and, third of each triple, between the elements of each axis."""

    kinds = ("pad",)
    padding: tuple[tuple[int, int, int], ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        return (lax.pad(x, np.asarray(c.in_grid().stored_zero, x.dtype), self.padding),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extreme(Op):
    """The highest or lowest code along axes."""

    kinds = ("max", "min")
    axes: tuple[int, ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        extreme = jnp.max if self.kind == "max" else jnp.min
        return (extreme(inputs[0], axis=self.axes),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaxPool(Op):
    """The highest code of each window; lengths, strides and pads of all axes."""

    kinds = ("max_pool",)
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        lowest = np.asarray(jnp.iinfo(x.dtype).min, x.dtype)
        return (lax.reduce_window(x, lowest, lax.max, self.window, self.strides, self.padding),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(Op):
    """Codes clipped to a lowest and a highest one."""

    kinds = ("clip",)
    clamp: Clamp

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        (x,) = inputs
        lo, hi = (np.asarray(v - c.grid.offset, x.dtype) for v in self.clamp)
        return (jnp.clip(x, lo, hi),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concatenate(Op):
    """Tensors on one grid, side by side along an axis."""

    kinds = ("concat",)
    axis: int

    def run(self, c: Context, *inputs: jax.Array) -> Sequence[jax.Array]:
        return (lax.concatenate(inputs, self.axis),)


def clip_at_zero(at: LoweredStep, bounds: Sequence[float]) -> None:
    """Lower a clamp whose ends are zero or none, on the grid of its input."""
    check_codes_fit(at)
    grid: Grid = at.out_grid
    lo, hi = (
        int(grid.zero_point) if bound == 0.0 else end
        for bound, end in zip(bounds, (grid.qmin, grid.qmax), strict=True)
    )
    at.emit(Clip, (at.input(),), clamp=(lo, hi))


OPERATIONS = {
    Move: MoveOperation(),
    Dropout: MoveOperation(),
    Concat: ConcatOperation(),
}
PROGRAM_OPERATIONS = (
    *(Reshape, Transpose, Broadcast, Slice, Reverse, Take, Pad),
    *(Extreme, MaxPool, Clip, Concatenate),
)
