"""What one quantizer does: a frozen dataclass, validated at construction."""

import dataclasses
from typing import ClassVar, Literal, TypedDict, TypeVar, Unpack, cast, get_args

import numpy as np

ObserverName = Literal["ema", "minmax", "batch", "percentile", "mse", "entropy", "fixed", "learned"]


def check_type(owner: object, field: str, kind: type) -> None:
    """Raise TypeError unless `owner.field` is exactly of `kind` (a bool is not an int here)."""
    value = getattr(owner, field)
    if type(value) is not kind:
        raise TypeError(
            f"{type(owner).__name__}.{field} must be of type {kind.__name__}, "
            f"got {value!r} of type {type(value).__name__}."
        )


def check_choice(owner: object, field: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `owner.field` is one of `choices`."""
    value = getattr(owner, field)
    if value not in choices:
        raise ValueError(
            f"{type(owner).__name__}.{field} must be one of {', '.join(map(repr, choices))}, "
            f"got {value!r}."
        )


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _OfRole:
    """The default of a field that differs between activations and weights."""

    activation: object
    weight: object

    def __repr__(self) -> str:
        return f"<{self.activation!r}, of weights {self.weight!r}>"


def _of_role(activation: T, weight: T) -> T:
    """Return a default that is replaced at construction; typed as what replaces it."""
    return cast(T, _OfRole(activation, weight))


_FALSE_OR_TRUE: bool = _of_role(False, weight=True)
_EMA_OR_BATCH: ObserverName = _of_role("ema", weight="batch")


class SpecFields(TypedDict, total=False):
    """The fields of a QuantSpec, to be given by keyword."""

    num_bits: int
    symmetric: bool
    per_channel: bool
    narrow_range: bool
    observer: ObserverName
    ema_decay: float
    percentile: float
    range: tuple[float, float] | None
    quant_delay: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Describe one quantizer: its integer grid and how its range is observed.

    What is not given has the default of what the spec is used for: where a `SimQATConfig` or a
    `Rule` takes it for `weight`, that of a weight, else that of an activation. `QuantSpec.weight`
    and `QuantSpec.activation` say so at once, and are what `dataclasses.replace` changes: it gives
    every field.

    Attributes:
      num_bits: width of the integer codes, 2 to 16.
      symmetric: zero point 0 and signed codes; otherwise unsigned codes with a zero point. False,
        of weights True.
      per_channel: one range per channel (last axis), else one per tensor. False, of weights True.
      narrow_range: leave out the lowest code: [-127, 127] for 8 symmetric bits, [1, 255] for
        asymmetric. False, of weights True.
      observer: `ema`, of weights `batch`. `ema`: exponential moving average of each batch's
        extremes; `minmax`: the extremes of all batches so far; `batch`: the extremes of the last
        batch. A weight under `batch` has the range of its present values, in training and in
        evaluation, and keeps no state.
        Of all batches so far, with a histogram: `percentile`: what leaves out a share of values;
        `mse`: what has the least squared error on this grid; `entropy`: what has the least
        Kullback-Leibler divergence. Of a weight they look at the values of the last step alone, and
        `entropy` is `batch`. `fixed`: the `range` given here; it keeps no state. `learned`: steps
        that are trained (LSQ), in the collection `quant_params`.
      ema_decay: weight of the old range in `ema`: new = decay * old + (1 - decay) * batch.
      percentile: the share of values that `percentile` keeps within each end of the range, in
        percent, above 50; of magnitudes where `symmetric`. 100: the extremes, as `minmax`.
      range: lowest and highest value of `fixed`, real units: `(0.0, 1.0)` for images.
      quant_delay: training steps during which values pass unquantized while ranges are observed.

    Raises:
      TypeError: a field of the wrong type, a bool for an int included.
      ValueError: `num_bits` outside 2 to 16, `ema_decay` outside [0, 1), `percentile` outside
        (50, 100], a negative `quant_delay`, an unknown `observer`; no `range` for `fixed`, one for
        another observer, or one that is not finite and from a lower to a higher number.

    Examples:
      >>> QuantSpec(num_bits=4, symmetric=True, narrow_range=True).qmin
      -7

    Source:
      Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342.
    """

    num_bits: int = 8
    symmetric: bool = _FALSE_OR_TRUE
    per_channel: bool = _FALSE_OR_TRUE
    narrow_range: bool = _FALSE_OR_TRUE
    observer: ObserverName = _EMA_OR_BATCH
    ema_decay: float = 0.99
    percentile: float = 99.99
    range: tuple[float, float] | None = None
    quant_delay: int = 0

    _open: ClassVar[tuple[str, ...]] = ()
    """Of an instance: the fields that were not given and that depend on its role."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        roles = {name: value for name, value in given.items() if isinstance(value, _OfRole)}
        object.__setattr__(self, "_open", tuple(roles))
        for name, default in roles.items():
            object.__setattr__(self, name, default.activation)
        check_type(self, "num_bits", int)
        for field in ("symmetric", "per_channel", "narrow_range"):
            check_type(self, field, bool)
        check_type(self, "observer", str)
        check_type(self, "ema_decay", float)
        check_type(self, "quant_delay", int)
        check_choice(self, "observer", get_args(ObserverName))
        if not 2 <= self.num_bits <= 16:
            raise ValueError(f"QuantSpec.num_bits must be 2 to 16, got {self.num_bits}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(
                f"QuantSpec.ema_decay must be in [0, 1), got {self.ema_decay}: it is the weight "
                "of the old range, 0.99 for slow ranges, 0.9 for fast ones."
            )
        check_type(self, "percentile", float)
        if not 50.0 < self.percentile <= 100.0:
            raise ValueError(
                f"QuantSpec.percentile must be in (50, 100], got {self.percentile}: it is the "
                "share of values within each end of the range, 99.99 to leave out a few outliers."
            )
        self._check_range()
        if self.quant_delay < 0:
            raise ValueError(f"QuantSpec.quant_delay must be 0 or more, got {self.quant_delay}.")

    def _check_range(self) -> None:
        if self.range is None:
            if self.observer == "fixed":
                raise ValueError(
                    "QuantSpec.range must be given with observer='fixed': the lowest and the "
                    "highest value, range=(0.0, 1.0)."
                )
            return
        ends = self.range
        if not isinstance(ends, tuple) or not all(type(end) in (int, float) for end in ends):
            raise TypeError(f"QuantSpec.range must be a pair of numbers (lo, hi), got {ends!r}.")
        largest = float(np.finfo(np.float32).max)
        if len(ends) != 2 or not -largest <= ends[0] < ends[1] <= largest:
            raise ValueError(
                f"QuantSpec.range must be (lo, hi), finite, with lo below hi, got {ends!r}."
            )
        # `batch` takes the place of any observer for constants, which have their own extremes.
        if self.observer not in ("fixed", "batch"):
            raise ValueError(
                f"QuantSpec.range is {ends!r}, and observer={self.observer!r} takes ranges from "
                "data. Use observer='fixed', or leave out the range."
            )

    @classmethod
    def weight(cls, **fields: Unpack[SpecFields]) -> "QuantSpec":
        """Return the spec of a weight: what is not given has the default of weights.

        Args:
          fields: as of a QuantSpec.

        Raises:
          TypeError: a field of the wrong type.
          ValueError: as for a QuantSpec.

        Examples:
          >>> spec = QuantSpec.weight(num_bits=4)
          >>> spec.symmetric, spec.per_channel, spec.narrow_range, spec.observer
          (True, True, True, 'batch')
        """
        return cls(**fields).as_weight()

    @classmethod
    def activation(cls, **fields: Unpack[SpecFields]) -> "QuantSpec":
        """Return the spec of an activation: what is not given has the default of activations.

        Args:
          fields: as of a QuantSpec.

        Raises:
          TypeError: a field of the wrong type.
          ValueError: as for a QuantSpec.

        Examples:
          >>> QuantSpec.activation(num_bits=4).symmetric
          False
        """
        return dataclasses.replace(cls(**fields))

    def as_weight(self) -> "QuantSpec":
        """Return it with the defaults of weights in the place of what was not given."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        roles = {name: cast(_OfRole, defaults[name]).weight for name in self._open}
        return dataclasses.replace(self, **cast(SpecFields, roles))

    @property
    def qmin(self) -> int:
        """Lowest integer code."""
        lowest = -(2 ** (self.num_bits - 1)) if self.symmetric else 0
        return lowest + self.narrow_range

    @property
    def qmax(self) -> int:
        """Highest integer code."""
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1
