"""Put a Program together: tensors, constants, operations."""

from collections.abc import Mapping, Sequence

import numpy as np
from jax.typing import ArrayLike

from simqat_jax.ir import replay
from simqat_jax.ir.graph import Constant, Graph, Node, Operand
from simqat_jax.ir.program import Op, Program, Shape, Structure, Tensor
from simqat_jax.numerics.grid import Grid

BATCH = 10_007
"""Stands for the batch size in a captured model: a prime that divides no other length."""


class ProgramBuilder:
    """Collects the tensors and operations of a graph's Program.

    Attributes:
      graph: what the program is made of.
      free_batch: `BATCH` stands for any batch size in the graph.
      ids: the number in the program of each tensor of the graph that depends on the data.
      constants: the values of the tensors that do not.
      tensors: of the program, so far.
      ops: likewise.
      float_constants: what operations in float hold.
    """

    def __init__(self, graph: Graph, inputs: Sequence[ArrayLike], free_batch: bool):
        self.graph, self.free_batch = graph, free_batch
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
        """Return an operand that does not depend on the data."""
        return v.value if isinstance(v, Constant) else self.constants[v]

    def number(self, v: Operand) -> int:
        """Return the number in the program of a tensor that depends on the data."""
        assert isinstance(v, int)
        return self.ids[v]

    def compute(self, node: Node) -> None:
        """Compute what does not depend on the data."""
        values = [self.value(v) for v in node.inputs]
        if node.primitive == "broadcast_in_dim" and not node.parts:
            # Along the batch, a copy would have `BATCH` of them.
            params = node.eqn.params
            results = (replay.spread(values[0], params["shape"], params["broadcast_dimensions"]),)
        else:
            results = node.run(*values) if node.effects else replay.rounded(node, values)
        self.constants.update(zip(node.outputs, results, strict=True))

    # Tensors of the program ------------------------------------------------------------------

    def dims(self, lengths: Sequence[int]) -> Shape:
        """Write multiples of the batch size as negative numbers."""
        free = self.free_batch
        return tuple(-(d // BATCH) if free and d and d % BATCH == 0 else int(d) for d in lengths)

    def shape(self, v: Operand) -> Shape:
        """Return the shape of a tensor of the graph."""
        assert isinstance(v, int)
        return self.dims(self.graph.avals[v].shape)

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

    def constant(self, name: str, value: np.ndarray, dtype: str, grid: Grid | None) -> int:
        """Add a constant: codes on a grid, or values."""
        return self.add(name, value.shape, dtype, grid, value)

    # The program -----------------------------------------------------------------------------

    def output(self, v: Operand) -> int:
        """Return the number of an output of the graph; a constant is added."""
        if isinstance(v, int) and v in self.ids:
            return self.ids[v]
        value = np.asarray(self.value(v))
        return self.constant("constant", value, str(value.dtype), None)

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
