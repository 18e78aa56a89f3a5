"""Nodes that stand for several operations of a model: norms, softmax, masked means, products."""

import dataclasses

from simqat_jax.ir.graph import Contraction, Move, Node, Operand


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Norm(Node):
    """A norm of one tensor, scaled and shifted: LayerNorm, RMSNorm, GroupNorm, InstanceNorm, L2.

    What it divides by is `max(sqrt(var + epsilon), least) + offset`.

    Attributes:
      axes: over which axes of the tensor statistics are taken; its last axis, where it is in
        groups, counts as two: groups and what is in them.
      groups: of the last axis; None: it is one.
      feature_axes: the axes of the tensor, in order, that scale and bias have.
      centered: the mean is subtracted.
      epsilon: added to the variance, squared real units.
      least: the least root of it, real units.
      offset: added to that, real units.
      affine: what each of the next inputs is: a "scale", or a "bias" behind all of them.
    """

    axes: tuple[int, ...]
    groups: int | None
    feature_axes: tuple[int, ...]
    centered: bool
    epsilon: float
    least: float = 0.0
    offset: float = 0.0
    affine: tuple[str, ...]
    kind: str = "norm"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Spread(Node):
    """A deviation, variance or length of a tensor: `factor * max(sqrt(var + epsilon), least)`.

    Attributes:
      axes: over which axes.
      centered: the mean is subtracted.
      rooted: the root is taken.
      factor: what the root is multiplied by: of the length of so many elements the root of those.
      epsilon: added to the variance, squared real units.
      least: the least root, real units.
    """

    axes: tuple[int, ...]
    centered: bool
    rooted: bool
    factor: float
    epsilon: float
    least: float
    kind: str = "spread"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ChannelAffine(Node):
    """A BatchNorm written by hand: each channel of the first input scaled and shifted.

    Attributes:
      steps: what happens with each of the next inputs, numbers for each channel, by primitive.
      training: some of these are statistics of the batch: then it is float, as it is written.
    """

    steps: tuple[str, ...]
    training: bool
    kind: str = "batch_norm"

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """The first input: statistics have no codes."""
        return self.data_inputs(data)[:1]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OfExponentials(Node):
    """A softmax or its logarithm.

    Attributes:
      axes: along which.
      masked: the second input is a mask.
      keeps: the value of the mask where a number stays; elsewhere it counts as the lowest.
    """

    axes: tuple[int, ...]
    masked: bool = False
    keeps: bool = True

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """The first input: a mask has no codes."""
        return self.data_inputs(data)[:1]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Softmax(OfExponentials):
    """A softmax along axes."""

    kind: str = "softmax"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LogSoftmax(OfExponentials):
    """The logarithm of a softmax along axes."""

    kind: str = "log_softmax"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MatMul(Node):
    """A matrix product of two tensors that both depend on the data, times numbers.

    Attributes:
      contraction: the product itself; its operands are the first two inputs.
      divides: for each of the next inputs, a number, whether the product is divided by it.
    """

    contraction: Contraction
    divides: tuple[bool, ...]
    kind: str = "matmul"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Lookup(Node):
    """Rows of a table, its first input, that integers, its second, pick.

    Attributes:
      clips: integers beyond the table's ends pick its ends; otherwise no row.
    """

    clips: bool
    kind: str = "lookup"

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """None: indices have no codes."""
        del data
        return ()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Masked(Move):
    """The first input where the second, truth values that broadcast to it, lets it stay.

    Attributes:
      keeps: the truth value where a number stays.
      fill: what is elsewhere, real units; but for zero the end of the grid that is next to it.
    """

    keeps: bool
    fill: float = 0.0

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """The first input: a mask has no codes."""
        return self.data_inputs(data)[:1]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Selected(Node):
    """The first input where truth values, the third, are false; where they are true the second."""

    kind: str = "select"

    @property
    def numbers(self) -> tuple[Operand, ...]:
        """The first two inputs: a mask has no codes."""
        return self.inputs[:2]

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """Those of them that depend on the data."""
        return tuple(v for v in self.data_inputs(data) if v in self.numbers)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CountedMean(Node):
    """Sums of the first input, each divided by what the third holds at a count, the second input.

    Attributes:
      axes: along which axes; none: its numbers themselves.
    """

    axes: tuple[int, ...]
    kind: str = "mean"

    def tensors(self, data: frozenset[int]) -> tuple[int, ...]:
        """The first input: counts have no codes."""
        return self.data_inputs(data)[:1]
