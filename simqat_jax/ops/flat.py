"""A node of a graph as primitives of the program, one after the other."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from simqat_jax.ir import replay
from simqat_jax.ir.graph import Node, shape_of
from simqat_jax.ir.program import Shape
from simqat_jax.ir.program_builder import ProgramBuilder, thin
from simqat_jax.ops.operation import thinnest
from simqat_jax.ops.primitives import ELEMENTWISE, Params, Primitive, UnknownPrimitive, encoded


@dataclasses.dataclass(frozen=True)
class _Made:
    """A tensor of the program, in the place of its values."""

    number: int


def as_primitives(builder: ProgramBuilder, node: Node) -> None:
    """Add the primitives that a node is made of to the program.

    Raises:
      UnknownPrimitive: one of them is none of the program's; nothing was added.
    """
    tensors, ops = len(builder.tensors), len(builder.ops)
    try:
        results = _Flat(builder, node).results()
    except UnknownPrimitive:
        del builder.tensors[tensors:], builder.ops[ops:]
        raise
    builder.ids.update(zip(node.outputs, results, strict=True))


class _Flat:
    """Runs a node on numbers of tensors instead of values."""

    def __init__(self, builder: ProgramBuilder, node: Node):
        self.builder, self.node = builder, node
        self.path = "/".join((*node.path, node.op))

    def results(self) -> list[int]:
        """Add the node; return the numbers of what it makes."""
        if self.node.effects:
            raise UnknownPrimitive("an effect")
        b = self.builder
        operands: list[Any] = [
            _Made(b.number(v)) if b.is_data(v) else b.value(v) for v in self.node.inputs
        ]
        results: list[Any] = replay.run_node(self.node, operands, self.bind)
        if not all(isinstance(x, _Made) for x in results):
            raise UnknownPrimitive("a constant")
        return [x.number for x in results]

    def bind(self, eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
        """Add an equation, or compute one of constants alone."""
        if not any(isinstance(x, _Made) for x in operands):
            return list(self.builder.bind(eqn, operands))
        outs = [shape_of(v) for v in eqn.outvars]
        shapes = [self.builder.dims(out.shape) for out in outs]
        dtypes = [str(out.dtype) for out in outs]
        match eqn.primitive.name:
            case "split":
                (x,) = operands
                parts = zip(_cuts(eqn, self.builder), shapes, dtypes, strict=True)
                return [self.add("slice", [x], [s], [d], cut)[0] for cut, s, d in parts]
            case "stack":
                axis = int(eqn.params["axis"])
                one = (*shapes[0][:axis], 1, *shapes[0][axis + 1 :])
                inputs = self.operands(eqn, operands, full=True)
                parts = [self.add("reshape", [x], [one], dtypes, {})[0] for x in inputs]
                return self.add("concatenate", parts, shapes, dtypes, {"axis": axis})
        name, params = encoded(eqn, self.builder.dims)
        full = name not in ELEMENTWISE or not any(
            isinstance(x, _Made) and shape_of(v).shape == outs[0].shape
            for x, v in zip(operands, eqn.invars, strict=True)
        )
        inputs = self.operands(eqn, operands, full=full)
        return self.add(name, inputs, shapes, dtypes, params)

    def add(
        self,
        name: str,
        inputs: Sequence[_Made],
        shapes: Sequence[Shape],
        dtypes: Sequence[str],
        params: Params,
    ) -> list[_Made]:
        """Add a primitive; return what it makes."""
        outputs = [
            self.builder.add(self.path, shape, dtype, None)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]
        numbers = tuple(x.number for x in inputs)
        self.builder.ops.append(Primitive.of(name, self.path, numbers, tuple(outputs), params))
        return list(map(_Made, outputs))

    def operands(self, eqn: core.JaxprEqn, operands: Sequence[Any], *, full: bool) -> list[_Made]:
        """Return operands as tensors of the program.

        Args:
          eqn: what reads them.
          operands: constants among them.
          full: constants need their full shape; otherwise they may broadcast to it.
        """
        return [
            x if isinstance(x, _Made) else self.constant(np.asarray(x, aval.dtype), aval, full)
            for x, aval in zip(operands, map(shape_of, eqn.invars), strict=True)
        ]

    def constant(self, value: np.ndarray, aval: jax.ShapeDtypeStruct, full: bool) -> _Made:
        """Add a constant; one that may broadcast is held once where it is the same along an axis.

        Raises:
          FixedBatchError: it differs along a free batch.
        """
        name, dtype = f"{self.path}/constant", str(value.dtype)
        shape = self.builder.dims(aval.shape)
        if full:
            return _Made(self.builder.constant(name, shape, value, dtype, None))
        held = thinnest(thin(value, shape))
        return _Made(self.builder.add(name, held.shape, dtype, None, held))


def _cuts(eqn: core.JaxprEqn, builder: ProgramBuilder) -> list[Params]:
    """Return the parameters of the slices that a split is."""
    axis, shape, begin, cuts = eqn.params["axis"], shape_of(eqn.invars[0]).shape, 0, []
    for size in map(int, eqn.params["sizes"]):
        start, limit = [0] * len(shape), list(shape)
        start[axis], limit[axis] = begin, begin + size
        strides = (1,) * len(shape)
        cuts.append({"start": tuple(start), "limit": builder.dims(limit), "strides": strides})
        begin += size
    return cuts
