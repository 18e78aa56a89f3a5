"""The float model's variables as tensors of its graph, and which of them may be changed."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.typing import VariableDict
from jax.typing import ArrayLike

from simqat_jax.ir.graph import Graph, Operand
from simqat_jax.training.arguments import check_variables
from simqat_jax.training.ranges import OWN


def floats(variables: VariableDict) -> dict[str, Any]:
    """Return the variables of the float model.

    Raises:
      TypeError: no dictionary.
    """
    check_variables(variables, "Pass a trained float model's, or what init returned.")
    return {name: tree for name, tree in variables.items() if name not in OWN}


class FloatVariables:
    """The variables of a model, all but its ranges.

    Args:
      variables: a dictionary of collections.

    Attributes:
      leaves: their arrays, in the order in which a captured call has them as its first inputs.
    """

    def __init__(self, variables: VariableDict):
        self.leaves, self._tree = jax.tree.flatten(floats(variables))

    def like(self, other: VariableDict, name: str = "reference") -> list[Any]:
        """Return the arrays of other variables of the same model.

        Args:
          other: the variables.
          name: of the argument that holds them, for messages.

        Raises:
          ValueError: they are not of the same model.
        """
        given = FloatVariables(other)
        own, others = self._shapes(), given._shapes()
        strange = [path for path in {**own, **others} if own.get(path) != others.get(path)]
        if given._tree != self._tree or strange:
            first = strange[0] if strange else "the order of variables"
            raise ValueError(
                f"{name} holds other variables than the quantized model: {first} is "
                f"{others.get(first, 'missing')} there, {own.get(first, 'missing')} here. Pass the "
                "float model's, as they were trained: params, batch_stats and what else it has."
            )
        return given.leaves

    def _shapes(self) -> dict[str, str]:
        """Return the shape of each variable, to be read, by its path."""
        paths = jax.tree.leaves_with_path(jax.tree.unflatten(self._tree, self.leaves))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"of shape {np.shape(leaf)}"
            for path, leaf in paths
        }

    def tensors(self, graph: Graph) -> tuple[int, ...]:
        """Return the tensors of a captured call that they are."""
        return graph.inputs[: len(self.leaves)]

    def tree(self, graph: Graph, values: Mapping[int, ArrayLike]) -> dict[str, Any]:
        """Return the variables with these values; what has none stays."""
        own = zip(self.tensors(graph), self.leaves, strict=True)
        return jax.tree.unflatten(self._tree, [values.get(v, old) for v, old in own])


class FreeVariables:
    """Tells which operands may be changed for the one step that reads them.

    Args:
      graph: a captured call.
      own: the tensors that are variables.
    """

    def __init__(self, graph: Graph, own: tuple[int, ...]):
        self._own = frozenset(own)
        self._outputs = frozenset(v for v in graph.outputs if isinstance(v, int))
        self._makers = {v: node for node in graph.nodes for v in node.outputs}
        self._readers = graph.readers()

    def sources(self, v: Operand | None) -> tuple[int, ...]:
        """Return an operand and what it is cast from, up to a variable; (): it is none.

        What several nodes read is none either: nobody may change it for one of them.
        """
        found: list[int] = []
        while isinstance(v, int) and len(self._readers[v]) == 1 and v not in self._outputs:
            found.append(v)
            if v in self._own:
                return tuple(found)
            node = self._makers.get(v)
            if node is None or node.primitive != "convert_element_type":
                return ()
            v = node.inputs[0]
        return ()
