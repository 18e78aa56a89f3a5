"""Nodes of a graph that are to become one, found by what reads and makes what."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from simqat_jax.capture.draft import Draft
from simqat_jax.capture.passes import chain
from simqat_jax.ir.graph import Clamp, Node, Operand, as_kind

SAME = frozenset("broadcast_in_dim reshape expand_dims squeeze stop_gradient copy".split())
"""What repeats values or gives them another shape."""


class Parts:
    """Nodes of a graph that are to become one."""

    def __init__(self, draft: Draft, last: Node):
        self.draft = draft
        self.nodes: dict[Node, None] = {last: None}

    def add(self, *nodes: Node) -> None:
        """Take nodes along."""
        self.nodes.update(dict.fromkeys(nodes))

    def behind(self, v: Operand, kinds: Iterable[str]) -> Operand:
        """Step over operations of these kinds, which become parts; return what they read."""
        node = maker(self.draft, v)
        while node is not None and (node.primitive in kinds or _is_open(node)):
            self.add(node)
            v = next(x for x in node.inputs if isinstance(x, int))
            node = maker(self.draft, v)
        return v

    def made_by(self, v: Operand, primitive: str, kind: type[Node] = Node) -> Node | None:
        """Return the node of this kind that makes a tensor."""
        node = maker(self.draft, v)
        return node if isinstance(node, kind) and node.primitive == primitive else None

    @property
    def ordered(self) -> list[Node]:
        """The nodes, in the order of evaluation."""
        return [n for n in self.draft.graph.nodes if n in self.nodes]

    def are_closed(self) -> bool:
        """Whether nothing else reads what leaves any but the last, inside of one `nn.remat`."""
        *inner, last = self.ordered
        readers, outputs = self.draft.readers, set(self.draft.graph.outputs)
        return all(
            node.remat == last.remat
            and not node.effects
            and node not in self.draft.instead
            and all(
                v not in outputs and all(r in self.nodes for r in readers[v]) for v in node.outputs
            )
            for node in inner
        )

    def merged(self, kind: type[Node], inputs: tuple[Operand, ...], **fields: Any) -> Node:
        """Put one node in the place of all, where the last one is.

        Args:
          kind: its class.
          inputs: its first inputs; what else the parts read, without data, comes behind.
          fields: others of its class.
        """
        parts = self.ordered
        last = parts[-1]
        made = {v for part in parts for v in part.outputs}.union(inputs)
        read = dict.fromkeys(v for part in parts for v in part.inputs if isinstance(v, int))
        inputs = (*inputs, *(v for v in read if v not in made))
        whole = {"inputs": inputs, "run": chain(parts, inputs), "parts": tuple(parts)}
        node = as_kind(kind, last, **whole, **fields)
        self.draft.instead.update((part, []) for part in parts[:-1])
        self.draft.instead[last] = [node]
        return node


def maker(draft: Draft, v: Operand) -> Node | None:
    """Return the node that makes a tensor, unless it stands for several operations."""
    node = draft.producers.get(v) if isinstance(v, int) else None
    return None if node is None or node.parts else node


def _is_open(node: Node) -> bool:
    """Whether it clamps to no bound: `max(-inf, x)`."""
    return isinstance(node, Clamp) and node.bounds == (-np.inf, np.inf)


def number(draft: Draft, v: Operand) -> float | None:
    """Return the number that a tensor consists of; None: it is none, or not known."""
    while isinstance(v, int):
        node = maker(draft, v)
        if node is None or node.primitive not in (*SAME, "convert_element_type"):
            return None
        v = node.inputs[0]
    return float(np.asarray(v.value)) if np.size(v.value) == 1 else None
