"""Where a model is quantized, and how: data only."""

import dataclasses
from collections import Counter
from typing import NamedTuple

from simqat_jax.ir.graph import BatchNorm, Clamp, Graph, Node, Product
from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.observers import OBSERVERS, AxisName, Learned, Observer, Role
from simqat_jax.numerics.rounding import Rounding
from simqat_jax.numerics.spec import QuantSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """One quantizer and the name of its state in `quant_stats`.

    Attributes:
      name: "Conv_0/kernel", "Conv_0/output", "Block_0/add/output", "input".
      spec: grid and observer.
      num_channels: entries of its range, None for one per tensor.
      role: what it quantizes.
      nonnegative: the tensor holds nothing below zero (a ReLU's output), so that its range starts
        at zero and its zero point is the lowest code.
      rule: the place of the rule that decides its spec; None: the config's own.
    """

    name: str
    spec: QuantSpec
    num_channels: int | None
    role: Role
    nonnegative: bool = False
    rule: int | None = None

    @property
    def observer(self) -> Observer:
        """What its range follows the data with."""
        kind = OBSERVERS[self.spec.observer].of_role(self.role)
        return kind(self.spec, self.num_channels, self.nonnegative)

    @property
    def has_state(self) -> bool:
        """Whether `quant_stats` holds a range of this name; else it is that of the values."""
        return self.observer.keeps_state(self.role)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A node with what is fused behind it, evaluated as one.

    Attributes:
      node: the operation.
      norm: the BatchNorm behind a Conv or Dense.
      clamp: the ReLU, ReLU6 or clip behind it.
      output: the tensor that leaves the step (of several, the first).
      fold: how the BatchNorm behind it trains.
      quantized: whether it runs on integers once converted.
      reason: why it does not, where the operation alone does not tell.
      rule: the place of the rule that decides it; None: none does.
      path: what rules match; of an operation that is no module the module's path and its name, with
        a number from the second quantized one on: "Block_0/add_1". Empty: the whole model.
    """

    node: Node
    norm: BatchNorm | None
    clamp: Clamp | None
    output: int
    fold: BatchNormFold = "none"
    quantized: bool = False
    reason: str = ""
    rule: int | None = None
    path: str = ""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The operation and what is fused behind it."""
        return tuple(n for n in (self.node, self.norm, self.clamp) if n is not None)


class Slot(NamedTuple):
    """An operand of a step, by its position."""

    step: Step
    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """A planned model: all that training, evaluation and conversion need to know.

    Attributes:
      graph: the model.
      steps: its nodes, grouped, in the order of evaluation.
      at: the tensors that are quantized, each with its quantizer.
      grids: every tensor that lies on an integer grid, with the quantizer that set the grid.
      weights: the kernel quantizer of each product.
      constants: the quantizers of constant operands.
      rounding: whose rounding evaluation mirrors.
      freeze_bn: training step from which BatchNorm uses its running statistics; None: never.
      axis_name: the mapped axis over which BatchNorm takes its statistics, and quantizers their
        ranges; None: none.
    """

    graph: Graph
    steps: tuple[Step, ...]
    at: dict[int, Quantizer]
    grids: dict[int, Quantizer]
    weights: dict[Node, Quantizer]
    constants: dict[Slot, Quantizer]
    rounding: Rounding
    freeze_bn: int | None
    axis_name: AxisName = None

    @property
    def numbered(self) -> frozenset[str]:
        """The names of quantizers that count operations: "Block_0/add/output", the first add."""
        return frozenset(
            self.grids[step.output].name
            for step in self.steps
            if _is_counted(step.node) and (step.quantized or step.output in self.at)
        )

    @property
    def shared(self) -> frozenset[str]:
        """The names of quantizers that several tensors have in common."""
        counts = Counter(q.name for q in (*self.at.values(), *self.constants.values()))
        return frozenset(name for name, count in counts.items() if count > 1)

    @property
    def quantizers(self) -> dict[str, Quantizer]:
        """Every quantizer, by name."""
        groups = (self.at.values(), self.weights.values(), self.constants.values())
        return {q.name: q for group in groups for q in group}

    @property
    def stateful(self) -> dict[str, Quantizer]:
        """Every quantizer with a range in `quant_stats`, by name, in order of evaluation."""
        everything = (*self.at.values(), *self.weights.values())
        return {q.name: q for q in everything if q.has_state}

    @property
    def learned(self) -> dict[str, Learned]:
        """The observer of every quantizer with a step in `quant_params`, by name."""
        observers = ((name, q.observer) for name, q in self.stateful.items())
        return {name: o for name, o in observers if isinstance(o, Learned)}

    def delay(self, role: Role) -> int:
        """Return the training steps after which every quantizer of a role quantizes."""
        delays = (q.spec.quant_delay for q in self.quantizers.values() if q.role == role)
        return max(delays, default=0)


def _is_counted(node: Node) -> bool:
    """Whether its place among its kind in its module is all that tells it."""
    return node.counted if isinstance(node, Product) else node.layer is None
