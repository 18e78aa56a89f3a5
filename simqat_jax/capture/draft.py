"""A graph while its nodes are replaced: new tensors, new nodes, what reads what."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.typing import DTypeLike

from simqat_jax.capture.contractions import Axes, traced, transposition
from simqat_jax.capture.flatten import bound
from simqat_jax.capture.passes import dependent
from simqat_jax.ir.graph import Float, Graph, Move, Node, Operand, as_kind, shape_of


class Draft:
    """A graph, and what comes in the place of its nodes.

    Attributes:
      graph: as it was.
      avals: shape and dtype of every tensor, the new ones included.
      repeated: which tensor each of what steps of a loop repeat is, the new ones included.
      producers: the node that makes each tensor of the graph.
      instead: what comes in the place of a node; of others, themselves.
      readers: the nodes of the graph that read each tensor.
      places: of the nodes of the graph, in the order of evaluation.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.avals = dict(graph.avals)
        self.repeated = dict(graph.repeated)
        self.producers: Mapping[int, Node] = {v: n for n in graph.nodes for v in n.outputs}
        self.instead: dict[Node, list[Node]] = {}
        self.readers = graph.readers()
        self.places = {node: k for k, node in enumerate(graph.nodes)}
        self._made: dict[Hashable, int] = {}

    def finished(self) -> Graph:
        """Return the graph with its nodes replaced."""
        nodes = [n for node in self.graph.nodes for n in self.instead.get(node, [node])]
        data = dependent(nodes, self.graph.data.intersection(self.graph.inputs))
        changes = {"nodes": tuple(nodes), "avals": self.avals, "repeated": self.repeated}
        return dataclasses.replace(self.graph, data=data, **changes)

    def aval(self, v: Operand) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of an operand."""
        if isinstance(v, int):
            return self.avals[v]
        return jax.ShapeDtypeStruct(np.shape(v.value), jnp.result_type(v.value))

    def new(self, aval: jax.ShapeDtypeStruct) -> int:
        """Return the number of a new tensor."""
        v = len(self.avals)
        self.avals[v] = aval
        return v

    def beside(self, v: int, aval: jax.ShapeDtypeStruct, mark: int) -> int:
        """Return the number of a new tensor that steps of a loop repeat as they do `v`.

        Args:
          v: a tensor.
          aval: shape and dtype of the new one.
          mark: below -1, another for each that is beside `v`.
        """
        new = self.new(aval)
        if v in self.repeated:
            self.repeated[new] = (*self.repeated[v], mark)
        return new

    def only_reader(self, v: int, node: Node) -> Node | None:
        """Return the one node that reads a tensor, if it is inside the same `nn.remat`."""
        users = self.readers[v]
        alone = len(users) == 1 and v not in self.graph.outputs and users[0].remat == node.remat
        return users[0] if alone else None

    def made(
        self, node: Node, source: Operand, eqn: core.JaxprEqn, outputs: tuple[int, ...] = ()
    ) -> Node:
        """Return a node of one equation that was not captured, where `node` is."""
        outputs = outputs or (self.new(shape_of(eqn.outvars[0])),)
        if isinstance(source, int) and source in self.repeated:
            self.repeated[outputs[0]] = (*self.repeated[source], -1)
        name = "convert" if eqn.primitive.name == "convert_element_type" else eqn.primitive.name
        whole = {"inputs": (source,), "outputs": outputs, "run": bound(eqn), "eqn": eqn}
        return as_kind(Move, node, op=name, layer=None, parts=(), **whole)

    def computed(
        self, node: Node, op: str, function: Callable[..., object], *sources: Operand
    ) -> Node:
        """Return a node that computes integers or truth values by one call, where `node` is."""
        eqn = traced(function, *map(self.aval, sources))
        made = self.made(node, sources[0], eqn)
        return as_kind(Float, made, op=op, inputs=sources, run=bound(eqn), eqn=eqn)

    def once(self, key: Hashable, node: Node, make: Callable[[], Node]) -> int:
        """Return the tensor that a new node makes, which comes in front of `node`.

        Args:
          key: what tells it from all other new nodes; inside of one `nn.remat` each comes once.
          node: the first one that reads the tensor.
          make: returns the new node.
        """
        key = (key, node.remat)
        if key not in self._made:
            made = make()
            self.instead.setdefault(node, []).append(made)
            self._made[key] = made.outputs[0]
        return self._made[key]

    def turned(self, node: Node, v: Operand, order: Axes) -> int:
        """Return a tensor with its axes in another order; a constant becomes a tensor."""
        return self.once(
            (v, order), node, lambda: self.made(node, v, transposition(self.aval(v), order))
        )

    def converted(self, node: Node, v: int, dtype: DTypeLike) -> Node:
        """Return a node that converts a tensor."""
        eqn = traced(lambda x: lax.convert_element_type(x, dtype), self.avals[v])
        return self.made(node, v, eqn)
