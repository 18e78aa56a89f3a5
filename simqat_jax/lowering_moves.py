"""Lower what moves codes without changing them: reshapes, slices, max pooling, clipping at zero."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from simqat_jax.graph import Node
from simqat_jax.integer_arithmetic import codes_fit
from simqat_jax.integer_operations import Grid
from simqat_jax.planning import Step

if TYPE_CHECKING:
    from simqat_jax.lowering import Lowering

_MOVES = frozenset(
    "reshape squeeze expand_dims transpose broadcast_in_dim slice split rev pad reduce_max "
    "reduce_min reduce_window_max copy convert_element_type stop_gradient name "
    "sharding_constraint".split()
)


def needs_function(node: Node) -> bool:
    """Whether a node that moves codes has no operation of its own."""
    return node.kind == "pass" and primitive(node) not in _MOVES


def primitive(node: Node) -> str:
    """Return the name of the operation that a node was captured as."""
    return node.eqn.primitive.name


def move(lowering: "Lowering", step: Step) -> None:
    """Lower a step whose output keeps the grid of its input."""
    node, v = step.node, step.output
    x, grid = lowering.data_id(node.inputs[0]), lowering.out_grid(step)
    params, dtype = node.eqn.params, lowering.graph.avals[node.inputs[0]].dtype  # type: ignore[index]
    if not codes_fit(dtype, lowering.out_params(step)[1].spec):
        raise ValueError(
            f"{'/'.join(node.path) or node.op}: {dtype} does not hold codes of so many bits, so "
            "that evaluation computes with real values behind it. Use 8 bits, or float32."
        )
    if node.kind == "clamp":
        clamp = [grid.qmin, grid.qmax]
        clamp = [
            grid.zero_point if b == 0.0 else c for b, c in zip(node.bounds, clamp, strict=True)
        ]
        lowering.emit("clip", step, (x,), v, grid, {"clamp": clamp})
        return
    match primitive(node):
        case "reshape" | "squeeze" | "expand_dims":
            lowering.emit("reshape", step, (x,), v, grid)
        case "copy" | "convert_element_type" | "stop_gradient" | "name" | "sharding_constraint":
            lowering.emit("reshape", step, (x,), v, grid)
        case "transpose":
            lowering.emit(
                "transpose", step, (x,), v, grid, {"permutation": list(params["permutation"])}
            )
        case "broadcast_in_dim":
            dims = list(params["broadcast_dimensions"])
            lowering.emit("broadcast", step, (x,), v, grid, {"dimensions": dims})
        case "slice":
            start, limit = params["start_indices"], lowering.dims(params["limit_indices"])
            steps = params["strides"] or (1,) * len(start)
            _slice(lowering, step, x, v, grid, start, limit, steps)
        case "split":
            _split(lowering, step, x, grid)
        case "rev":
            lowering.emit("reverse", step, (x,), v, grid, {"axes": list(params["dimensions"])})
        case "pad":
            padding = [list(map(int, p)) for p in params["padding_config"]]
            lowering.emit("pad", step, (x,), v, grid, {"padding": padding})
        case "reduce_max" | "reduce_min" as name:
            axes = {"axes": list(params["axes"])}
            lowering.emit(name.removeprefix("reduce_"), step, (x,), v, grid, axes)
        case "reduce_window_max" if not _dilated(params):
            lowering.emit("max_pool", step, (x,), v, grid, window(params))
        case "gather" if (taken := _taken(lowering, node)) is not None:
            lowering.emit("take", step, (x,), v, grid, taken)
        case _:
            _move_by_function(lowering, step, grid)


def _taken(lowering: "Lowering", node: Node) -> dict[str, Any] | None:
    """Return axis and indices of a gather that picks elements along one axis, else None."""
    x, picked = node.inputs
    assert isinstance(x, int)
    if lowering.is_data(picked):
        return None
    numbers, lengths = node.eqn.params["dimension_numbers"], lowering.graph.avals[x].shape
    indices, axes = np.asarray(lowering.value(picked)), numbers.start_index_map
    others = tuple(a for a in range(len(lengths)) if a not in axes)
    whole = all(node.eqn.params["slice_sizes"][a] == lengths[a] for a in others)
    if len(axes) != 1 or numbers.collapsed_slice_dims != axes or indices.ndim != 2:
        return None
    if numbers.offset_dims != others or numbers.operand_batching_dims or not whole:
        return None
    if lowering.dims(lengths)[axes[0]] < 0 or not indices.size:
        return None
    if not 0 <= indices.min() <= indices.max() < lengths[axes[0]]:
        return None
    return {"axis": int(axes[0]), "indices": [int(i) for i in indices[:, 0]]}


def _slice(
    lowering: "Lowering",
    step: Step,
    x: int,
    v: int,
    grid: Grid,
    start: Sequence[int],
    limit: Sequence[int],
    strides: Sequence[int],
) -> None:
    attributes = {"start": list(start), "limit": list(limit), "strides": list(strides)}
    lowering.emit("slice", step, (x,), v, grid, attributes)


def _split(lowering: "Lowering", step: Step, x: int, grid: Grid) -> None:
    params, shape = step.node.eqn.params, lowering.tensors[x].shape
    begin = 0
    for v, size in zip(step.node.outputs, map(int, params["sizes"]), strict=True):
        start, limit = [0] * len(shape), list(shape)
        start[params["axis"]], limit[params["axis"]] = begin, begin + size
        begin += size
        _slice(lowering, step, x, v, grid, start, limit, [1] * len(shape))


def _move_by_function(lowering: "Lowering", step: Step, grid: Grid) -> None:
    op = lowering.float_op(step.node)
    for v, i in zip(step.node.outputs, op.outputs, strict=True):
        if v in lowering.placement.grids:
            lowering.tensors[i] = dataclasses.replace(lowering.tensors[i], grid=grid)
    lowering.ops.append(dataclasses.replace(op, kind="move"))


def window(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a pooling."""
    return {
        "window": list(params["window_dimensions"]),
        "strides": list(params["window_strides"]),
        "padding": [list(map(int, p)) for p in params["padding"]],
    }


def _dilated(params: Mapping[str, Any]) -> bool:
    return any(d != 1 for d in (*params["base_dilation"], *params["window_dilation"]))
