"""The printed plan: what is quantized and how, what stays float and why."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from simqat_jax.config import QuantSpec, SimQATConfig
from simqat_jax.graph import LAYER_KINDS, Node
from simqat_jax.interception import excluded
from simqat_jax.observers import as_range_state
from simqat_jax.planning import Placement, Quantizer, Step

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
_GRID_LOST = "no integer form"


@dataclasses.dataclass(frozen=True)
class QuantizerInfo:
    """One quantizer of a plan.

    Attributes:
      name: its name in `quant_stats`, "Conv_0/output"; a weight's is "Conv_0/kernel".
      role: "activation", "weight" or "constant".
      spec: grid and observer.
      channel_axis: the axis with one range per channel, None for one per tensor.
      num_channels: how many channels, None for one per tensor.
      lo: lowest value observed so far, real units, None if there is no range (yet).
      hi: highest value, likewise.
      nonfinite: training steps in which the tensor held NaN or Inf.
    """

    name: str
    role: str
    spec: QuantSpec
    channel_axis: int | None
    num_channels: int | None
    lo: float | None
    hi: float | None
    nonfinite: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation of a plan.

    Attributes:
      path: the layer's path, or the path and the name of a functional operation.
      kind: "conv", "dense", "batch_norm", "add", "mul", "mean", "concat", "elementwise", "clamp",
        "pass" or "float".
      op: readable name with attributes and what is fused: "Conv(features=6, ...) + relu".
      weight: the kernel's quantizer, None for none.
      output: the quantizer of the output, None for none.
      note: what becomes of the grid, or why the operation stays float.
    """

    path: str
    kind: str
    op: str
    weight: QuantizerInfo | None
    output: QuantizerInfo | None
    note: str


class Plan:
    """What is quantized and how, in order of evaluation; `print` it.

    Attributes:
      rows: one per operation on the data.
      quantizers: every quantizer once, by name.
      floats: module path or operation and reason, of everything that stays float.
    """

    def __init__(self, placement: Placement, config: SimQATConfig, stats: Mapping[str, Any]):
        self._placement = placement
        self._config = config
        self._stats = stats
        everything = {
            q.name: q
            for group in (placement.at, placement.weights, placement.constants)
            for q in group.values()
        }
        self.quantizers = {name: self._info(q) for name, q in everything.items()}
        readers = [step for step in placement.steps if step.node.data_inputs(placement.graph.data)]
        self.rows = tuple(self._row(step) for step in readers)
        self.floats = tuple(
            (row.path, row.note) for row in self.rows if row.note.startswith("float")
        )

    def _info(self, q: Quantizer) -> QuantizerInfo:
        empty = (np.inf, -np.inf, 0)
        lo, hi, nonfinite = as_range_state(self._stats.get(q.name, empty))
        if not _is_concrete(lo):
            lo, hi, nonfinite = empty
        lo, hi = np.min(lo), np.max(hi)
        seen = bool(lo <= hi)
        return QuantizerInfo(
            name=q.name,
            role=q.role,
            spec=q.spec,
            channel_axis=None if q.num_channels is None else -1,
            num_channels=q.num_channels,
            lo=float(lo) if seen else None,
            hi=float(hi) if seen else None,
            nonfinite=int(nonfinite),
        )

    def _row(self, step: Step) -> Row:
        node, placement = step.node, self._placement
        layer = node.layer
        output = placement.at.get(step.output)
        weight = None
        if node.kind in LAYER_KINDS and layer is not None and layer.path in placement.weights:
            weight = self.quantizers[placement.weights[layer.path].name]
        path = "/".join(node.path) if layer is not None else "/".join((*node.path, node.op))
        return Row(
            path=path or node.op,
            kind=node.kind,
            op=" + ".join(map(_describe, step.nodes)),
            weight=weight,
            output=None if output is None else self.quantizers[output.name],
            note=self._note(step),
        )

    def _note(self, step: Step) -> str:
        placement, node = self._placement, step.node
        if step.output in placement.at:
            if step.quantized:
                return self._form(step)
            reason = self._reason(node, "its input is float")
            return f"float: {reason}; its result is quantized for an integer operation"
        if step.output in placement.grids:
            return f"on the grid of {placement.grids[step.output].name}"
        return f"float: {self._reason(node)}"

    def _form(self, step: Step) -> str:
        """Say what a quantized operation becomes, where its name does not."""
        if step.batch_norm is not None:
            return f"BatchNorm folded: {self._config.bn_fold}"
        if step.node.kind == "batch_norm":
            return "on its own: a 1x1 depthwise convolution"
        return "table lookup" if step.node.kind in ("elementwise", "clamp") else ""

    def _reason(self, node: Node, otherwise: str = "no integer operation needs it") -> str:
        path = "/".join(node.path)
        for name, reason in self._placement.unquantizable:
            if name == path:
                return reason
        if excluded(node.path, self._config.exclude):
            return "excluded"
        if node.kind == "float":
            return _GRID_LOST
        return otherwise

    def __str__(self) -> str:
        lines = [_header(self._config)]
        step = self._stats.get("step")
        if step is not None and _is_concrete(step):
            lines.append(f"training steps so far: {int(step)}{self._delays(int(step))}")
        table = [("layer or operation", "what it is", "weight", "output", "")]
        for name in dict.fromkeys(
            q.name for v, q in self._placement.at.items() if v in self._placement.graph.inputs
        ):
            table.append((name, "model input", "", _quantizer(self.quantizers[name]), ""))
        table += [
            (row.path, row.op, _quantizer(row.weight), _quantizer(row.output), row.note)
            for row in self.rows
        ]
        lines += _columns(table)
        roles = [q.role for q in self.quantizers.values()]
        lines.append(
            f"{roles.count('activation')} activation, {roles.count('weight')} weight and "
            f"{roles.count('constant')} constant quantizers; "
            f"{len(self.floats)} operations stay float."
        )
        bad = [f"{q.name} ({q.nonfinite} steps)" for q in self.quantizers.values() if q.nonfinite]
        if bad:
            lines.append(f"NaN or Inf was seen, and left out of the range, in: {', '.join(bad)}.")
        return "\n".join(lines)

    def _delays(self, step: int) -> str:
        pending = [
            f"{name} quantizes from step {spec.quant_delay}"
            for name, spec in (
                ("weights", self._config.weight),
                ("activations", self._config.activation),
            )
            if step < spec.quant_delay
        ]
        return "".join(f"; {text}, until then values pass unquantized" for text in pending)


def _is_concrete(value: Any) -> bool:
    return not isinstance(value, (Tracer, jax.ShapeDtypeStruct))


def _describe(node: Node) -> str:
    if node.layer is None:
        if node.kind == "clamp" and node.op == "clip":
            return f"clip({node.bounds[0]:g}, {node.bounds[1]:g})"
        return node.op
    module = node.layer.module
    shown = []
    for name, default in _ATTRIBUTES.items():
        value = getattr(module, name, default)
        if value is not None and value != default:
            shown.append(f"{name}={value}")
    return f"{node.op}({', '.join(shown)})"


def _quantizer(info: QuantizerInfo | None) -> str:
    if info is None:
        return ""
    spec = info.spec
    words = [f"{spec.num_bits} bits", "symmetric" if spec.symmetric else "asymmetric"]
    words += ["narrow"] if spec.narrow_range else []
    words.append(
        "per tensor"
        if info.num_channels is None
        else f"per channel (axis {info.channel_axis}, {info.num_channels})"
    )
    words.append(f"ema {spec.ema_decay:g}" if spec.observer == "ema" else spec.observer)
    words += [f"delay {spec.quant_delay}"] if spec.quant_delay else []
    words += [f"[{info.lo:.4g}, {info.hi:.4g}]"] if info.lo is not None else []
    return ", ".join(words)


def _header(config: SimQATConfig) -> str:
    freeze = "never" if config.freeze_bn is None else f"from step {config.freeze_bn}"
    return f"SimQAT plan: bn_fold={config.bn_fold!r}, BatchNorm frozen {freeze}"


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
