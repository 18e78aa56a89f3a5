"""From a placement to the plan that is printed."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.graph import Clamp, Contraction, Float, Node
from simqat_jax.ir.plan import Placement, Quantizer, Step
from simqat_jax.ops.registry import operation_of
from simqat_jax.training.plan_table import FLOAT, Plan, QuantizerInfo, Row
from simqat_jax.training.ranges import STEP, Stats

_ATTRIBUTES = {
    "features": None,
    "kernel_size": None,
    "strides": 1,
    "padding": "SAME",
    "kernel_dilation": 1,
    "input_dilation": 1,
    "feature_group_count": 1,
    "use_bias": None,
    "epsilon": None,
    "momentum": None,
    "axis": -1,
}


def plan_of(placement: Placement, config: SimQATConfig, stats: Stats) -> Plan:
    """Return the plan of a placed model.

    Args:
      placement: the model.
      config: what it was planned with.
      stats: the ranges so far, restored; what is not at hand is left out.
    """
    quantizers = {name: _info(q, stats) for name, q in placement.quantizers.items()}
    inputs = (placement.at[v] for v in placement.graph.inputs if v in placement.at)
    step = stats.get(STEP)
    return Plan(
        rows=tuple(_rows(placement, config, quantizers)),
        quantizers=quantizers,
        inputs=tuple(dict.fromkeys((q.name, _decided_by(config, q.rule)) for q in inputs)),
        bn_fold=config.bn_fold,
        freeze_bn=placement.freeze_bn,
        steps=int(step) if step is not None and _is_concrete(step) else None,
        delays={"weight": placement.delay("weight"), "activation": placement.delay("activation")},
    )


def _info(q: Quantizer, stats: Stats) -> QuantizerInfo:
    (lo, hi), nonfinite = q.observer.known_range or (np.inf, -np.inf), 0
    if q.name in stats:
        state = q.observer.restore(stats[q.name])
        if _is_concrete(state.nonfinite):
            (lo, hi), nonfinite = q.observer.range(state), state.nonfinite
    lo, hi = np.min(np.asarray(lo)), np.max(np.asarray(hi))
    seen = bool(lo <= hi)
    return QuantizerInfo(
        name=q.name,
        role=q.role,
        spec=q.spec,
        label=q.observer.label,
        channel_axis=q.observer.channel_axis,
        num_channels=q.num_channels,
        lo=float(lo) if seen else None,
        hi=float(hi) if seen else None,
        nonfinite=int(nonfinite),
    )


def _rows(
    placement: Placement, config: SimQATConfig, quantizers: dict[str, QuantizerInfo]
) -> Iterator[Row]:
    graph, seen = placement.graph, set[Row]()
    for step in placement.steps:
        if step.node.data_inputs(graph.data):
            row = _row(placement, config, quantizers, step)
            if step.output not in graph.repeated or row not in seen:
                yield row
            seen.add(row)


def _row(
    placement: Placement, config: SimQATConfig, quantizers: dict[str, QuantizerInfo], step: Step
) -> Row:
    node = step.node
    output = placement.at.get(step.output)
    weight = placement.weights.get(node)
    keeps = placement.grids.get(step.output) if output is None else None
    return Row(
        path=step.path or node.op,
        kind=node.kind,
        op=" + ".join(map(_describe, step.nodes)),
        weight=None if weight is None else quantizers[weight.name],
        output=None if output is None else quantizers[output.name],
        note=_note(placement, step),
        rule=_decided_by(config, step.rule),
        brief=" + ".join(map(_brief, step.nodes)),
        shares="" if keeps is None else keeps.name.removesuffix("/output"),
    )


def _decided_by(config: SimQATConfig, place: int | None) -> str:
    if place is None:
        return ""
    excluded = len(config.exclude)
    return f"exclude[{place}]" if place < excluded else f"rules[{place - excluded}]"


def _note(placement: Placement, step: Step) -> str:
    if step.output in placement.at:
        if step.quantized:
            return _form(step)
        reason = _reason(step, "its input is float")
        return f"{FLOAT}: {reason}; its result is quantized for an integer operation"
    if step.output in placement.grids:
        return f"on the grid of {placement.grids[step.output].name}"
    if operation_of(step.node).counts(step, placement):
        return _form(step)
    dtypes = [
        placement.graph.avals[v].dtype
        for v in (*step.node.data_inputs(placement.graph.data), step.output)
    ]
    if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return str(dtypes[-1])  # masks, indices and counts
    return f"{FLOAT}: {_reason(step)}"


def _form(step: Step) -> str:
    """Say what an operation on integers becomes, where its name does not."""
    if step.norm is not None:
        return f"BatchNorm folded: {step.fold}"
    return operation_of(step.node).form(step)


def _reason(step: Step, otherwise: str = "no integer operation needs it") -> str:
    if step.reason:
        return step.reason
    if isinstance(step.node, Float):
        return step.node.why
    return "no integer form" if isinstance(step.node, Contraction) else otherwise


def _is_concrete(value: object) -> bool:
    return not isinstance(value, (Tracer, jax.ShapeDtypeStruct))


def _describe(node: Node) -> str:
    if node.layer is None or node.layer.module is None:
        if isinstance(node, Clamp) and node.op == "clip":
            return f"clip({node.bounds[0]:g}, {node.bounds[1]:g})"
        return node.op
    module = node.layer.module
    shown = []
    for name, default in _ATTRIBUTES.items():
        value = getattr(module, name, default)
        if value is not None and value != default:
            shown.append(f"{name}={value}")
    return f"{node.op}({', '.join(shown)})"


def _brief(node: Node) -> str:
    """Say what an operation is in few words: "Conv 3x3 /2, 64"; its defaults go unsaid."""
    if node.layer is None or node.layer.module is None:
        return _describe(node)
    module = node.layer.module
    words = [node.op]
    kernel = getattr(module, "kernel_size", None)
    words += [_by(kernel)] if kernel is not None else []
    strides = getattr(module, "strides", None) or 1
    words += [f"/{_by(strides)}"] if set(np.ravel(strides)) != {1} else []
    features = getattr(module, "features", None)
    words += [_by(features)] if features is not None else []
    return " ".join(words)


def _by(lengths: ArrayLike) -> str:
    """Write lengths as "3x3"."""
    return "x".join(map(str, np.ravel(lengths)))
