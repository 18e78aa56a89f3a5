"""The printed plan: what is quantized and how, what stays float and why."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.core import Tracer

from simqat_jax.config import SimQATConfig
from simqat_jax.ir.graph import Clamp, Contraction, Float, Node
from simqat_jax.ir.plan import Placement, Quantizer, Step
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.ops.registry import operation_of
from simqat_jax.training.ranges import STEP, Stats
from simqat_jax.training.widths import too_wide

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


@dataclasses.dataclass(frozen=True)
class QuantizerInfo:
    """One quantizer of a plan.

    Attributes:
      name: its name in `quant_stats`, "Conv_0/output"; a weight's is "Conv_0/kernel".
      role: "activation", "weight" or "constant".
      spec: grid and observer.
      label: the observer with its setting, "ema 0.99".
      channel_axis: the axis with one range per channel, None for one per tensor.
      num_channels: how many channels, None for one per tensor.
      lo: lowest value observed so far, real units, None if there is no range (yet).
      hi: highest value, likewise.
      nonfinite: training steps in which the tensor held NaN or Inf.
    """

    name: str
    role: str
    spec: QuantSpec
    label: str
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
      kind: "conv", "dense", "matmul", "lookup", "batch_norm", "norm", "spread", "softmax",
        "log_softmax", "add", "mul", "extremum", "position", "mean", "concat", "elementwise",
        "clamp", "pass" or "float".
      op: readable name with attributes and what is fused: "Conv(features=6, ...) + relu".
      weight: the kernel's quantizer, None for none.
      output: the quantizer of the output, None for none.
      note: what becomes of the grid, or why the operation stays float.
      rule: what decides it: "rules[0]" or "exclude[0]" of the config; empty: nothing but its
        defaults.
    """

    path: str
    kind: str
    op: str
    weight: QuantizerInfo | None
    output: QuantizerInfo | None
    note: str
    rule: str = ""


class Plan:
    """What is quantized and how, in order of evaluation; `print` it.

    Attributes:
      rows: one per operation on the data; what all steps of a loop do in the same way, once.
      quantizers: every quantizer once, by name.
      floats: module path or operation and reason, of everything that stays float.
    """

    def __init__(self, placement: Placement, config: SimQATConfig, stats: Stats):
        self._placement = placement
        self._config = config
        self._stats = stats
        self.quantizers = {name: self._info(q) for name, q in placement.quantizers.items()}
        self.rows = tuple(self._rows())
        self.floats = tuple(
            (row.path, row.note) for row in self.rows if row.note.startswith("float")
        )

    def _info(self, q: Quantizer) -> QuantizerInfo:
        (lo, hi), nonfinite = q.observer.known_range or (np.inf, -np.inf), 0
        if q.name in self._stats:
            state = q.observer.restore(self._stats[q.name])
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

    def _rows(self) -> Iterator[Row]:
        graph, seen = self._placement.graph, set[Row]()
        for step in self._placement.steps:
            if step.node.data_inputs(graph.data):
                row = self._row(step)
                if step.output not in graph.repeated or row not in seen:
                    yield row
                seen.add(row)

    def _row(self, step: Step) -> Row:
        node, placement = step.node, self._placement
        layer = node.layer
        output = placement.at.get(step.output)
        weight = placement.weights.get(node)
        path = "/".join(layer.path if layer is not None else (*node.path, node.op))
        return Row(
            path=path or node.op,
            kind=node.kind,
            op=" + ".join(map(_describe, step.nodes)),
            weight=None if weight is None else self.quantizers[weight.name],
            output=None if output is None else self.quantizers[output.name],
            note=self._note(step),
            rule=self._rule(step.rule),
        )

    def _rule(self, place: int | None) -> str:
        if place is None:
            return ""
        excluded = len(self._config.exclude)
        return f"exclude[{place}]" if place < excluded else f"rules[{place - excluded}]"

    def _note(self, step: Step) -> str:
        placement = self._placement
        if step.output in placement.at:
            if step.quantized:
                return self._form(step)
            reason = self._reason(step, "its input is float")
            return f"float: {reason}; its result is quantized for an integer operation"
        if step.output in placement.grids:
            return f"on the grid of {placement.grids[step.output].name}"
        if operation_of(step.node).counts(step, placement):
            return self._form(step)
        return f"float: {self._reason(step)}"

    def _form(self, step: Step) -> str:
        """Say what an operation on integers becomes, where its name does not."""
        if step.norm is not None:
            return f"BatchNorm folded: {step.fold}"
        return operation_of(step.node).form(step)

    def _reason(self, step: Step, otherwise: str = "no integer operation needs it") -> str:
        if step.reason:
            return step.reason
        if isinstance(step.node, Float):
            return step.node.why
        return "no integer form" if isinstance(step.node, Contraction) else otherwise

    def __str__(self) -> str:
        lines = [self._header()]
        step = self._stats.get(STEP)
        if step is not None and _is_concrete(step):
            lines.append(f"training steps so far: {int(step)}{self._delays(int(step))}")
        table = [("layer or operation", "what it is", "weight", "output", "decided by", "")]
        placement = self._placement
        inputs = (placement.at[v] for v in placement.graph.inputs if v in placement.at)
        for name, rule in dict.fromkeys((q.name, self._rule(q.rule)) for q in inputs):
            table.append((name, "model input", "", _quantizer(self.quantizers[name]), rule, ""))
        table += [
            (row.path, row.op, _quantizer(row.weight), _quantizer(row.output), row.rule, row.note)
            for row in self.rows
        ]
        if not any(rule for *_, rule, _ in table[1:]):
            table = [(*cells, note) for *cells, _, note in table]
        lines += _columns(table)
        roles = [q.role for q in self.quantizers.values()]
        lines.append(
            f"{roles.count('activation')} activation, {roles.count('weight')} weight and "
            f"{roles.count('constant')} constant quantizers; "
            f"{len(self.floats)} operations stay float."
        )
        wide = [f"{q.name} ({q.spec.num_bits} bits)" for q in too_wide(placement)]
        if wide:
            lines.append(f"No ONNX or TFLite file holds the codes of: {', '.join(wide)}.")
        bad = [f"{q.name} ({q.nonfinite} steps)" for q in self.quantizers.values() if q.nonfinite]
        if bad:
            lines.append(f"NaN or Inf was seen, and left out of the range, in: {', '.join(bad)}.")
        return "\n".join(lines)

    def _header(self) -> str:
        freeze = self._placement.freeze_bn
        when = "never" if freeze is None else f"from step {freeze}"
        return f"SimQAT plan: bn_fold={self._config.bn_fold!r}, BatchNorm frozen {when}"

    def _delays(self, step: int) -> str:
        delays = {
            "weights": self._placement.delay("weight"),
            "activations": self._placement.delay("activation"),
        }
        pending = [
            f"{name} quantizes from step {delay}" for name, delay in delays.items() if step < delay
        ]
        return "".join(f"; {text}, until then values pass unquantized" for text in pending)


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
    words.append(info.label)
    words += [f"delay {spec.quant_delay}"] if spec.quant_delay else []
    words += [f"[{info.lo:.4g}, {info.hi:.4g}]"] if info.lo is not None else []
    return ", ".join(words)


def _columns(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
