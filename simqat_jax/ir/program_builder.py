"""Put a Program together: tensors, constants, operations."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from simqat_jax.ir import replay
from simqat_jax.ir.graph import CONTRACTIONS, Constant, Graph, Node, Operand, shape_of
from simqat_jax.ir.program import Op, Program, Shape, Structure, Tensor, at_batch
from simqat_jax.numerics.grid import Grid

BATCH = 10_007
"""Stands for the batch size in a captured model: a prime that divides no other length."""


class FixedBatchError(Exception):
    """A constant differs along the batch, or cannot be computed for another batch size."""


def thin(value: ArrayLike, shape: Shape) -> np.ndarray:
    """Return a constant that is the same along the batch with length 1 there.

    Args:
      value: the constant, with batches of any size.
      shape: its lengths; -k stands for k times the batch size.

    Raises:
      FixedBatchError: it differs along the batch.
    """
    array = np.asarray(value)
    for axis in (axis for axis, length in enumerate(shape) if length < 0):
        first = array.take([0], axis)
        if array.tobytes() != np.broadcast_to(first, array.shape).tobytes():
            raise FixedBatchError
        array = first
    return array


class ProgramBuilder:
    """Collects the tensors and operations of a graph's Program.

    Attributes:
      graph: what the program is made of.
      free_batch: `BATCH` stands for any batch size in the graph.
      examples: with which batch size constants are computed where it is free.
      ids: the number in the program of each tensor of the graph that depends on the data.
      constants: the values of the tensors that do not.
      tensors: of the program, so far.
      ops: likewise.
      float_constants: what operations in float hold.
    """

    def __init__(
        self, graph: Graph, inputs: Sequence[ArrayLike], free_batch: bool, examples: int = 1
    ):
        self.graph, self.free_batch, self.examples = graph, free_batch, examples
        self.ids: dict[int, int] = {}
        self.constants = {
            v: x for v, x in zip(graph.inputs, inputs, strict=True) if v not in graph.data
        }
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.float_constants: list[ArrayLike | None] = []

    # Operands of the graph -------------------------------------------------------------------

    def is_data(self, v: Operand) -> bool:
        """Whether an operand depends on the data."""
        return isinstance(v, int) and v in self.graph.data

    def value(self, v: Operand) -> ArrayLike:
        """Return an operand that does not depend on the data.

        Raises:
          FixedBatchError: it differs along a free batch.
        """
        if not isinstance(v, Constant):
            return self.constants[v]
        shape = self.shape(v)
        if all(d >= 0 for d in shape):
            return v.value
        return np.broadcast_to(thin(v.value, shape), at_batch(shape, self.examples))

    def held(self, v: Operand) -> ArrayLike:
        """Return an operand that does not depend on the data as a program holds it."""
        value, shape = self.value(v), self.shape(v)
        return thin(value, shape) if any(d < 0 for d in shape) else value

    def number(self, v: Operand) -> int:
        """Return the number in the program of a tensor that depends on the data."""
        assert isinstance(v, int)
        return self.ids[v]

    def compute(self, node: Node) -> None:
        """Compute what does not depend on the data.

        Raises:
          FixedBatchError: it has no form for another batch size than the captured one.
        """
        values = [self.value(v) for v in node.inputs]
        if node.effects:
            results = node.run(*values)
        else:
            results = map(jnp.asarray, replay.run_node(node, values, self.bind))
        self.constants.update(zip(node.outputs, results, strict=True))

    def bind(self, eqn: core.JaxprEqn, values: Sequence[ArrayLike]) -> Sequence[ArrayLike]:
        """Compute an equation on constants.

        Raises:
          FixedBatchError: it has no form for another batch size than the captured one.
        """
        if not self.free_batch:
            return replay.results(eqn, values)
        shapes = [self.dims(shape_of(v).shape) for v in eqn.outvars]
        if eqn.primitive.name in CONTRACTIONS and any(d < 0 for d in shapes[0]):
            raise FixedBatchError  # other batch sizes, other orders of summation
        try:
            if replay.is_plain(eqn):
                results = replay.results_at_batch(eqn, values, BATCH, self.examples)
            else:
                results = replay.results(eqn, values)
        except Exception as error:  # whatever JAX raises for lengths that do not fit
            raise FixedBatchError from error
        if [np.shape(x) for x in results] != [at_batch(s, self.examples) for s in shapes]:
            raise FixedBatchError
        return results

    # Tensors of the program ------------------------------------------------------------------

    def dims(self, lengths: Sequence[int]) -> Shape:
        """Write multiples of the batch size as negative numbers."""
        free = self.free_batch
        return tuple(-(d // BATCH) if free and d and d % BATCH == 0 else int(d) for d in lengths)

    def shape(self, v: Operand) -> Shape:
        """Return the shape of an operand of the graph."""
        return self.dims(self.graph.avals[v].shape if isinstance(v, int) else np.shape(v.value))

    def add(
        self,
        name: str,
        shape: Shape,
        dtype: str,
        grid: Grid | None,
        value: np.ndarray | None = None,
    ) -> int:
        """Add a tensor; return its number."""
        self.tensors.append(Tensor(name, shape, dtype, grid, value))
        return len(self.tensors) - 1

    def tensor(self, name: str, v: int, grid: Grid | None) -> int:
        """Add the tensor that stands for one of the graph."""
        self.ids[v] = self.add(name, self.shape(v), str(self.graph.avals[v].dtype), grid)
        return self.ids[v]

    def constant(
        self, name: str, shape: Shape, value: np.ndarray, dtype: str, grid: Grid | None
    ) -> int:
        """Add a constant with batches of any size: codes on a grid, or values.

        Raises:
          FixedBatchError: it differs along the batch, or has it in several of its lengths.
        """
        if sum(d < 0 for d in shape) > 1 or min(shape, default=0) < -1:
            raise FixedBatchError
        return self.add(name, shape, dtype, grid, thin(value, shape))

    # The program -----------------------------------------------------------------------------

    def output(self, v: Operand) -> int:
        """Return the number of an output of the graph; a constant is added."""
        if isinstance(v, int) and v in self.ids:
            return self.ids[v]
        value = np.asarray(self.value(v))
        return self.constant("constant", self.shape(v), value, str(value.dtype), None)

    def program(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        structure: Structure,
        backend: str,
        metadata: Mapping[str, object],
    ) -> Program:
        """Return the program, without the operations whose results nobody reads."""
        needed, ops = set(outputs), []
        for op in reversed(self.ops):
            if not needed.isdisjoint(op.outputs):
                needed.update(op.inputs)
                ops.append(op)
        program = Program(
            tensors=tuple(self.tensors),
            ops=tuple(reversed(ops)),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            structure=structure,
            backend=backend,
            metadata=dict(metadata),
        )
        program.validate()
        return program
