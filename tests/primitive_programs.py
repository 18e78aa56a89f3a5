"""Integer models of functions of real values, integers and truth values: primitives alone."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from models import export
from zoo import Model

import simqat_jax as sq
from simqat_jax.capture import capture
from simqat_jax.capture.capture import Call
from simqat_jax.ir.program_builder import BATCH, ProgramBuilder
from simqat_jax.ops.flat import as_primitives


class _Nowhere(nn.Module):
    """A module that no model holds."""


def primitives_of(function: Callable[..., Any], backend: str, *args: Any) -> sq.IntegerModel:
    """Return the integer model of a function, for any length of the first axis of its arrays."""
    shapes = [jax.ShapeDtypeStruct((BATCH, *x.shape[1:]), x.dtype) for x in args]
    call = Call(Model(function), {}, tuple(shapes), {}, None, {}, mutable=[])
    captured = capture(call, config=sq.SimQATConfig(), forbidden=_Nowhere)
    graph = captured.graph
    builder = ProgramBuilder(graph, captured.inputs, free_batch=True)
    inputs = [builder.tensor(f"x{k}", v, None) for k, v in enumerate(graph.inputs)]
    for node in graph.nodes:
        if node.data_inputs(graph.data):
            as_primitives(builder, node)
        else:
            builder.compute(node)
    outputs = [builder.output(v) for v in graph.outputs]
    numbers = list(range(len(outputs)))
    return sq.IntegerModel(builder.program(inputs, outputs, numbers, backend, {}))


def in_runtime(model: sq.IntegerModel, folder: Path, *args: Any) -> Sequence[np.ndarray]:
    """Save a model, load it, write that, and run the file on one example and on all."""
    model.save(folder / "model")
    path = folder / f"primitives.{model.backend}"
    export(sq.IntegerModel.load(folder / "model"), path)
    run = sq.open_file(path, threads=1, isolated=False).run
    run([np.asarray(x[:1]) for x in args])
    return run([np.asarray(x) for x in args])
