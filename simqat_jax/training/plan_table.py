"""The printed plan: what is quantized and how, what stays float and why."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from simqat_jax.ir.sheet import Line, Sheet, number, some
from simqat_jax.ir.table import Column
from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.observers import Role
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.rules import Rule
from simqat_jax.training.widths import MOST_BITS_IN_FILES

FLOAT = "float"
"""How the note of an operation begins that stays float."""


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
    role: Role
    spec: QuantSpec
    label: str
    channel_axis: int | None
    num_channels: int | None
    lo: float | None
    hi: float | None
    nonfinite: int

    @property
    def kind(self) -> str:
        """All but its width and its range, in words: "symmetric, narrow, per channel, batch"."""
        words = ["symmetric" if self.spec.symmetric else "asymmetric"]
        words += ["narrow"] if self.spec.narrow_range else []
        words.append("per tensor" if self.num_channels is None else "per channel")
        words.append(self.label)
        words += [f"delay {self.spec.quant_delay}"] if self.spec.quant_delay else []
        return ", ".join(words)

    @property
    def limits(self) -> str:
        """The range in three digits, empty where there is none."""
        if self.lo is None or self.hi is None:
            return ""
        return f"[{number(self.lo)}, {number(self.hi)}]"

    def __str__(self) -> str:
        channels = f"per channel (axis {self.channel_axis}, {self.num_channels})"
        kind = self.kind.replace("per channel", channels)
        return ", ".join(filter(None, [f"{self.spec.num_bits} bits", kind, self.limits]))


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation of a plan.

    Attributes:
      path: the layer's path, or the path and the name of a functional operation, as `Rule.path`
        takes it: "Block_0/add_1".
      kind: "conv", "dense", "matmul", "lookup", "batch_norm", "norm", "spread", "softmax",
        "log_softmax", "add", "mul", "extremum", "position", "mean", "concat", "select",
        "elementwise", "clamp", "pass" or "float".
      op: readable name with attributes and what is fused: "Conv(features=6, ...) + relu".
      weight: the kernel's quantizer, None for none.
      output: the quantizer of the output, None for none.
      note: what becomes of the grid, or why the operation stays float; the type of a mask, an index
        or a count.
      rule: what decides it: "rules[0]" or "exclude[0]" of the config; empty: nothing but its
        defaults.
      brief: `op` in few words: "Conv 5x5, 6 + relu".
      shares: the quantizer on whose grid its result stays, by name; empty: on none.
    """

    path: str
    kind: str
    op: str
    weight: QuantizerInfo | None
    output: QuantizerInfo | None
    note: str
    rule: str = ""
    brief: str = ""
    shares: str = ""

    @property
    def is_float(self) -> bool:
        """Whether it stays float."""
        return self.note.startswith(FLOAT)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is quantized and how, in order of evaluation; `print` it.

    It is data: it can be compared, copied and pickled.

    Attributes:
      rows: one per operation on the data; what all steps of a loop do in the same way, once.
      quantizers: every quantizer once, by name.
      inputs: the quantizer of each input of the model that has one, by name, and what decides it.
      bn_fold: how BatchNorm trains, but for rules.
      freeze_bn: the step from which BatchNorm is frozen, None for never.
      steps: training steps so far, None where that is not known.
      delays: the step from which the quantizers of a role quantize.

    Examples:
      >>> qmodel = SimQAT().apply(nn.Dense(10))
      >>> x = jnp.ones((1, 4))
      >>> plan = qmodel.plan(qmodel.init(jax.random.key(0), x), x)
      >>> plan
      Plan(1 operations, 0 of them float; 3 quantizers)
      >>> plan.rows[0].output.spec.num_bits
      8
    """

    rows: tuple[Row, ...]
    quantizers: dict[str, QuantizerInfo] = dataclasses.field(hash=False)
    inputs: tuple[tuple[str, str], ...]
    bn_fold: BatchNormFold
    freeze_bn: int | None
    steps: int | None
    delays: dict[Role, int] = dataclasses.field(hash=False)

    @property
    def floats(self) -> tuple[tuple[str, str], ...]:
        """Module path or operation and reason, of everything that stays float."""
        return tuple((row.path, row.note) for row in self.rows if row.is_float)

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.rows)} operations, {len(self.floats)} of them float; "
            f"{len(self.quantizers)} quantizers)"
        )

    def __str__(self) -> str:
        return self._sheet().text()

    def _repr_html_(self) -> str:
        return self._sheet().html()

    def details(self, path: str = "*") -> str:
        """Return all that is known of some operations, as text to print.

        Args:
          path: which of them, and everything inside, as `Rule.path`: `"Block_0/*"`.

        Raises:
          TypeError: no string.
          ValueError: a pattern that matches none; an empty one, one that does not compile.
        """
        rule, sheet = Rule(path=path), self._sheet()
        chosen = [line for line in sheet.lines if rule.matches(line.cells[0].split("/"))]
        if not chosen:
            paths = list(dict.fromkeys(line.cells[0] for line in sheet.lines))
            raise ValueError(f"no operation has a path like {path!r}. There are {some(paths)}.")
        return sheet.details(chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, text and numbers, as JSON holds them."""
        rows = [
            {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
            | {"weight": row.weight and row.weight.name, "output": row.output and row.output.name}
            for row in self.rows
        ]
        return {
            "bn_fold": self.bn_fold,
            "freeze_bn": self.freeze_bn,
            "steps": self.steps,
            "delays": dict(self.delays),
            "inputs": [{"quantizer": name, "rule": rule} for name, rule in self.inputs],
            "quantizers": {n: dataclasses.asdict(q) for n, q in self.quantizers.items()},
            "rows": rows,
        }

    # Showing ---------------------------------------------------------------------------------

    def _sheet(self) -> Sheet:
        ruled = any(rule for *_, rule in self.inputs) or any(row.rule for row in self.rows)
        titles = [Column("layer", "path"), Column("what it is", "words")]
        titles += [Column("weight"), Column("output", "words")]
        lines = [*self._input_lines(), *map(self._line, self.rows)]
        if not ruled:
            lines = [dataclasses.replace(line, cells=line.cells[:-1]) for line in lines]
        columns = (*titles, *([Column("decided by")] if ruled else []))
        return Sheet(self._head(), columns, tuple(lines), tuple(self._foot()))

    def _usual(self, role: Role) -> str:
        """Say what most quantizers of a role are, but for width and range."""
        kinds = Counter(q.kind for q in self.quantizers.values() if q.role == role)
        return kinds.most_common(1)[0][0] if kinds else ""

    def _head(self) -> tuple[str, ...]:
        frozen = "never" if self.freeze_bn is None else f"from step {self.freeze_bn}"
        lines = [f"SimQAT plan: bn_fold={self.bn_fold!r}, BatchNorm frozen {frozen}"]
        if self.steps is not None:
            names = {"weight": "weights", "activation": "activations"}
            pending = [
                f"; {names[role]} quantizes from step {delay}, until then values pass unquantized"
                for role, delay in self.delays.items()
                if self.steps < delay
            ]
            lines.append(f"training steps so far: {self.steps}{''.join(pending)}")
        roles: dict[str, Role] = {"weights": "weight", "outputs": "activation"}
        lines += [
            f"{name}: {self._usual(role)}" for name, role in roles.items() if self._usual(role)
        ]
        return (*lines, "")

    def _input_lines(self) -> Iterator[Line]:
        for name, rule in self.inputs:
            quantizer = self.quantizers[name]
            cells = (name, "model input", "", self._cell(quantizer), rule)
            yield Line(cells, ("model input", f"output: {quantizer}", *_decided(rule)))

    def _line(self, row: Row) -> Line:
        output = self._cell(row.output)
        if row.output is None:
            output = f"as {_seen_from(row.path, row.shares)}" if row.shares else _first(row.note)
        elif row.is_float:
            output = f"float, then {output}"
        more = [row.op]
        more += [f"weight: {row.weight}"] if row.weight else []
        more += [f"output: {row.output}"] if row.output else []
        more += [row.note] if row.note else []
        cells = (row.path, row.brief, self._cell(row.weight), output, row.rule)
        return Line(cells, (*more, *_decided(row.rule)), row.is_float)

    def _cell(self, info: QuantizerInfo | None) -> str:
        """Write width and range, with a star where the rest is not as usual."""
        if info is None:
            return ""
        star = "" if info.kind == self._usual(info.role) else "*"
        limits = info.limits if info.role == "activation" else ""
        return f"{info.spec.num_bits} bits{star} {limits}".rstrip()

    def _foot(self) -> Iterator[str]:
        roles = Counter(q.role for q in self.quantizers.values())
        yield (
            f"{roles['activation']} activation, {roles['weight']} weight and "
            f"{roles['constant']} constant quantizers; {len(self.floats)} operations stay float."
        )
        reasons: dict[str, list[str]] = defaultdict(list)
        for path, note in self.floats:
            reasons[note.removeprefix(f"{FLOAT}: ")].append(path)
        for reason, paths in reasons.items():
            yield f"float, {reason}: {some(list(dict.fromkeys(paths)))}."
        shown = [q for row in self.rows for q in (row.weight, row.output) if q is not None]
        if any(q.kind != self._usual(q.role) for q in shown):
            yield "* not as most are: details() says how."
        wide = [q for q in self.quantizers.values() if q.spec.num_bits > MOST_BITS_IN_FILES]
        if wide:
            named = some([f"{q.name} ({q.spec.num_bits} bits)" for q in wide])
            yield f"No ONNX or TFLite file holds the codes of: {named}."
        bad = [f"{q.name} ({q.nonfinite} steps)" for q in self.quantizers.values() if q.nonfinite]
        if bad:
            yield f"NaN or Inf was seen, and left out of the range, in: {', '.join(bad)}."


def _seen_from(path: str, other: str) -> str:
    """Write the path of another operation, without the module where both are in the same."""
    module = path.rpartition("/")[0]
    return other.removeprefix(f"{module}/") if module else other


def _first(note: str) -> str:
    return note.split(":")[0]


def _decided(rule: str) -> tuple[str, ...]:
    return (f"decided by {rule}",) if rule else ()
