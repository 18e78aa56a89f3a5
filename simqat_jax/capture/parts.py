"""Nodes of a graph that are to become one, found by what reads and makes what."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from simqat_jax.capture.classify import function_name, inner_equations, is_real
from simqat_jax.capture.draft import Draft
from simqat_jax.capture.passes import chain
from simqat_jax.ir.graph import Clamp, Node, Operand, as_kind, shape_of
from simqat_jax.numerics.requantize import FREE, Bounds

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

    def behind(self, v: Operand, bounds: Iterable[Bounds] = (FREE,)) -> Operand:
        """Step over what keeps values, which becomes parts; return what it reads.

        A change between real types keeps them: half-precision models add up in float32.

        Args:
          v: an operand.
          bounds: of clamps that keep the values at hand.
        """
        node = maker(self.draft, v)
        while node is not None and (
            node.primitive in SAME
            or (isinstance(node, Clamp) and node.bounds in bounds)
            or _changes_precision(node)
        ):
            source = next((x for x in node.inputs if isinstance(x, int)), None)
            if source is None:  # constants alone
                break
            self.add(node)
            v, node = source, maker(self.draft, source)
        return v

    def unconverted(self, v: Operand) -> Operand:
        """Step over a change between real types, which becomes a part; return what it reads."""
        node = maker(self.draft, v)
        if node is None or not _changes_precision(node):
            return v
        self.add(node)
        return node.inputs[0]

    def made_by(self, v: Operand, primitive: str, kind: type[Node] = Node) -> Node | None:
        """Return the node of this kind that makes a tensor."""
        node = maker(self.draft, v)
        return node if isinstance(node, kind) and node.primitive == primitive else None

    @property
    def ordered(self) -> list[Node]:
        """The nodes, in the order of evaluation."""
        return sorted(self.nodes, key=self.draft.places.__getitem__)

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

    def are_aligned(self, x: int) -> bool:
        """Whether each axis that is reduced is put back in its place: `e / e.sum(-1)[..., None]`.

        Args:
          x: the tensor of which all parts are made.
        """
        known: dict[int, _Axes] = {x: tuple(range(len(self.draft.avals[x].shape)))}
        for node in self.ordered:
            made = [known[v] for v in node.inputs if isinstance(v, int) and v in known]
            axes = _axes_behind(self.draft, node, made) if made else ()
            if axes is None:
                return False
            known.update((v, axes) for v in node.outputs if made)
        return True

    def merged(
        self, kind: type[Node], inputs: tuple[Operand, ...], *, keep: bool = False, **fields: Any
    ) -> Node:
        """Put one node in the place of all, where the last one is.

        Args:
          kind: its class.
          inputs: its first inputs; what else the parts read, without data, comes behind.
          keep: the others stay besides, for what else reads them.
          fields: others of its class.
        """
        parts = self.ordered
        last = parts[-1]
        made = {v for part in parts for v in part.outputs}.union(inputs)
        read = dict.fromkeys(v for part in parts for v in part.inputs if isinstance(v, int))
        inputs = (*inputs, *(v for v in read if v not in made))
        whole = {"inputs": inputs, "run": chain(parts, inputs), "parts": tuple(parts)}
        node = as_kind(kind, last, **whole, **fields)
        self.draft.instead.update((part, []) for part in parts[:-1] if not keep)
        self.draft.instead.setdefault(last, []).append(node)
        return node


_Axes = tuple[int | None, ...]
"""For each axis of a tensor the axis of another that it is; None: it repeats values."""


def _axes_behind(draft: Draft, node: Node, operands: Sequence[_Axes]) -> _Axes | None:
    """Return the axes of what a node makes of operands of these; None: they do not fit together."""
    shape, first, reduced = draft.avals[node.outputs[0]].shape, operands[0], reduced_axes(node)
    if reduced:
        if len(shape) == len(first):
            return tuple(None if k in reduced else axis for k, axis in enumerate(first))
        return tuple(axis for k, axis in enumerate(first) if k not in reduced)
    if node.primitive == "broadcast_in_dim":
        places = dict(zip(node.eqn.params["broadcast_dimensions"], first, strict=True))
        return tuple(places.get(k) for k in range(len(shape)))
    if node.primitive in SAME:  # axes of length 1 come and go
        before = draft.aval(node.inputs[0]).shape
        long = [axis for axis, n in zip(first, before, strict=True) if n > 1]
        if [n for n in before if n > 1] != [n for n in shape if n > 1]:
            return None
        rest = iter(long)
        return tuple(next(rest) if n > 1 else None for n in shape)
    found = [{axis for axis in axes if axis is not None} for axes in zip(*operands, strict=True)]
    if any(len(axes) > 1 and n > 1 for axes, n in zip(found, shape, strict=True)):
        return None
    return tuple(min(axes, default=None) for axes in found)


def reduced_axes(node: Node) -> tuple[int, ...]:
    """Return the axes along which a node reduces its tensor, also as `jnp.var` does."""
    if node.primitive.startswith("reduce_"):
        return tuple(map(int, node.eqn.params["axes"]))
    if function_name(node.eqn) not in ("_var", "_std", "norm"):
        return ()
    inner = inner_equations(node.eqn)
    sums = [eqn.params["axes"] for eqn in inner if eqn.primitive.name == "reduce_sum"]
    return tuple(map(int, sums[-1])) if sums else ()


def _changes_precision(node: Node) -> bool:
    """Whether a node converts real numbers to another type of real numbers."""
    ends = (*node.eqn.invars, *node.eqn.outvars)
    real = all(jnp.issubdtype(shape_of(v).dtype, jnp.floating) for v in ends)
    return node.primitive == "convert_element_type" and real


def maker(draft: Draft, v: Operand) -> Node | None:
    """Return the node that makes a tensor, unless it stands for several operations."""
    node = draft.producers.get(v) if isinstance(v, int) else None
    return None if node is None or node.parts else node


def unwrapped(draft: Draft, v: Operand, *others: str) -> Operand:
    """Return what an operand repeats, or is in another shape; `others`: also behind these."""
    node = maker(draft, v)
    while node is not None and node.primitive in (*SAME, *others):
        v = node.inputs[0]
        node = maker(draft, v)
    return v


def number(draft: Draft, v: Operand) -> float | None:
    """Return the number that a tensor consists of; None: it is none, or not known."""
    v = unwrapped(draft, v, "convert_element_type")
    if isinstance(v, int) or np.size(v.value) != 1 or not is_real(v.value):
        return None
    return float(np.asarray(v.value).item())


def repeated(draft: Draft, v: Operand) -> Operand | None:
    """Return the one number that a tensor repeats; None: there are several."""
    while draft.aval(v).size > 1:
        node = maker(draft, v)
        if node is None or node.primitive != "broadcast_in_dim":
            return None
        v = node.inputs[0]
    return v
