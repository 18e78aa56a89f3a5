"""The layers of a planned call: what is quantized, or left float, as one."""

import dataclasses
from collections.abc import Mapping

from simqat_jax.ir.plan import Placement, Step


@dataclasses.dataclass(frozen=True, eq=False)
class Layers:
    """What belongs to which layer; a layer is told by its place in `names`.

    A layer is what a rule can name: an operation with the quantizers of its kernel, constants and
    results, or an input of the model. A layer that is called twice is one.

    Attributes:
      names: paths that rules match; of a layer that is the whole model, what it is.
      kinds: what each is, as `Row.kind` of a plan.
      steps: the layer of each step, by the step's place in the plan; None: nothing is quantized.
      inputs: the layer of each quantized input of the model.
      leaves: the layer that each variable belongs to, by its place; None: none.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    steps: tuple[int | None, ...]
    inputs: Mapping[int, int]
    leaves: tuple[int | None, ...]

    def steps_of(self, layer: int) -> tuple[int, ...]:
        """Return the places of a layer's steps."""
        return tuple(number for number, owner in enumerate(self.steps) if owner == layer)


def layers_of(placement: Placement, leaves: int) -> Layers:
    """Find the layers of a planned call.

    Args:
      placement: the call; the first of its inputs are its variables.
      leaves: how many variables there are.
    """
    graph, kinds = placement.graph, dict[str, str]()
    inputs = {v: placement.at[v].name for v in graph.inputs if v in placement.at}
    kinds.update(dict.fromkeys(inputs.values(), "input"))
    with_constants = {slot.step for slot in placement.constants}
    steps: list[str | None] = []
    for step in placement.steps:
        made = [v for node in step.nodes for v in node.outputs if v in placement.at]
        if made or step.node in placement.weights or step in with_constants:
            name = step.path or step.node.op
            steps.append(name)
            kinds.setdefault(name, step.node.kind)
        else:
            steps.append(None)
    place = {name: number for number, name in enumerate(kinds)}
    owners = _owners(placement, graph.inputs[:leaves], steps)
    return Layers(
        names=tuple(kinds),
        kinds=tuple(kinds.values()),
        steps=tuple(None if name is None else place[name] for name in steps),
        inputs={v: place[name] for v, name in inputs.items()},
        leaves=tuple(None if name is None else place[name] for name in owners),
    )


def is_static(placement: Placement, step: Step) -> bool:
    """Whether a step computes from variables alone."""
    return not any(v in placement.graph.data for node in step.nodes for v in node.outputs)


def _owners(
    placement: Placement, leaves: tuple[int, ...], steps: list[str | None]
) -> list[str | None]:
    """Return for each variable the layer of the first step on data that it reaches."""
    data = placement.graph.data
    sources = {v: {v} for v in leaves}
    owners: dict[int, str | None] = {}
    for step, name in zip(placement.steps, steps, strict=True):
        read = [v for node in step.nodes for v in node.inputs if isinstance(v, int)]
        found = set[int]().union(*(sources.get(v, ()) for v in read if v not in data))
        if is_static(placement, step):
            sources.update({v: found for node in step.nodes for v in node.outputs})
        else:
            for v in found:
                owners.setdefault(v, name)
    return [owners.get(v) for v in leaves]
