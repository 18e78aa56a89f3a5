"""Lower a planned model to a program on integers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from simqat_jax.ir.plan import Placement
from simqat_jax.ir.program import Program, PyTree, Structure
from simqat_jax.ir.program_builder import ProgramBuilder
from simqat_jax.numerics.grid import grid_of_range
from simqat_jax.numerics.observers import Range
from simqat_jax.ops.floats import emit_float
from simqat_jax.ops.operation import LoweredStep, concrete
from simqat_jax.ops.registry import operation_of
from simqat_jax.ops.shared import SharedLayers

NOT_EVALUATION = (
    "{path}: convert takes the model in evaluation, and here it drops out values or uses batch "
    "statistics. Pass the arguments of evaluation, such as train=False, deterministic=True or "
    "use_running_average=True."
)


class _Index(int):
    """The number of an output, in the place of its value."""


def lower(
    placement: Placement,
    ranges: Mapping[str, Range],
    builder: ProgramBuilder,
    returned: Callable[[Sequence[Any]], PyTree],
    shared: SharedLayers,
    metadata: Mapping[str, object],
) -> Program:
    """Make the program of a planned model, one step of the plan after the other.

    Args:
      placement: the planned model.
      ranges: the range of each quantizer with a state, by name.
      builder: an empty program of the same graph.
      returned: makes what the model returns of its outputs.
      shared: computes the arrays of layers, for this or another lowering.
      metadata: for the program.

    Raises:
      ValueError: a model in training, a weight that is not finite, a layer without an integer
        form, an output that no file can hold.
    """
    graph, inputs = placement.graph, []
    for v, name in zip(graph.inputs, graph.input_names, strict=True):
        if v in graph.data:
            quantizer = placement.at.get(v)
            grid = None
            if quantizer is not None:
                grid = concrete(grid_of_range(*ranges[quantizer.name], quantizer.spec))
            inputs.append(builder.tensor(name or f"input_{len(inputs)}", v, grid))
    for step in placement.steps:
        if step.node.data_inputs(graph.data):
            _lower(LoweredStep(step, placement, builder, ranges, shared))
        else:
            for node in step.nodes:
                builder.compute(node)
    _check_trained(builder)
    read, structure = _returned(returned, len(graph.outputs))
    outputs = [builder.output(graph.outputs[i]) for i in read]
    return builder.program(inputs, outputs, structure, placement.rounding.name, metadata)


def _lower(at: LoweredStep) -> None:
    step, placement = at.step, at.placement
    if any(node.only_training for node in step.nodes):
        raise ValueError(NOT_EVALUATION.format(path="/".join(step.node.path)))
    _check_operands(at)
    operation = operation_of(step.node)
    if step.quantized or operation.counts(step, placement):
        if not operation.lower(at):
            emit_float(at)
    elif step.output in placement.grids and step.output not in placement.at:
        operation.move(at)
    else:
        emit_float(at)


def _check_operands(at: LoweredStep) -> None:
    """Raise ValueError for NaN in what functional operations read besides their data."""
    for node in at.step.nodes:
        if node.layer is not None:  # `layer_values` names the parameter
            continue
        for v in node.inputs:
            value = None if at.builder.is_data(v) else at.builder.value(v)
            if value is None or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                continue
            if np.isnan(np.asarray(value, np.float32)).any():
                raise ValueError(
                    f"{node.where}: a parameter of {node.op} holds NaN. Train again from a "
                    "checkpoint without."
                )


def _check_trained(builder: ProgramBuilder) -> None:
    """Raise ValueError for NaN and Inf in what was trained, whatever reads it."""
    for v, path in builder.graph.read_trained().items():
        if not np.isfinite(np.asarray(builder.value(v), np.float32)).all():
            raise ValueError(
                f"{'/'.join(path[1:])}: the variable in {path[0]} holds NaN or Inf. Train again "
                "from a checkpoint without."
            )


def _returned(
    returned: Callable[[Sequence[Any]], PyTree], count: int
) -> tuple[list[_Index], Structure]:
    """Return which outputs the model returns, in order, and in what structure."""
    result = returned(list(map(_Index, range(count))))
    read = jax.tree.leaves(result)
    others = [x for x in read if not isinstance(x, _Index)]
    if others:
        raise ValueError(f"convert takes models that return arrays, and this returns {others}.")
    numbers = {i: n for n, i in enumerate(read)}
    return read, _plain(jax.tree.map(lambda i: numbers[i], result))


def _plain(tree: PyTree) -> Structure:
    """Rebuild a tree from dictionaries, lists and tuples, as a file can hold it."""
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        return {k: _plain(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return (list if isinstance(tree, list) else tuple)(map(_plain, tree))
    if tree is None or isinstance(tree, int):
        return tree
    raise ValueError(
        f"the model returns a {type(tree).__name__}, which a file cannot hold. Return arrays, "
        "lists, tuples or dictionaries with strings as keys."
    )
