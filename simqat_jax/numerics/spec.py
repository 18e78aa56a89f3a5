"""What one quantizer does: a frozen dataclass, validated at construction."""

import dataclasses
from typing import Literal, get_args

ObserverName = Literal["ema", "minmax", "batch"]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Describe one quantizer: its integer grid and how its range is observed.

    The defaults are those of an activation; `SimQATConfig` sets those of a weight.

    Raises:
      TypeError: a field of the wrong type, a bool for an int included.
      ValueError: `num_bits` outside 2 to 16, `ema_decay` outside [0, 1), a negative `quant_delay`,
        an unknown `observer`.

    Examples:
      >>> QuantSpec(num_bits=4, symmetric=True, narrow_range=True).qmin
      -7

    Source:
      Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342.
    """

    num_bits: int = 8
    """Width of the integer codes, 2 to 16."""
    symmetric: bool = False
    """Zero point 0 and signed codes; otherwise unsigned codes with a zero point."""
    per_channel: bool = False
    """One range per channel (last axis), else one per tensor."""
    narrow_range: bool = False
    """Leave out the lowest code: [-127, 127] for 8 symmetric bits, [1, 255] for asymmetric."""
    observer: ObserverName = "ema"
    """`ema`: exponential moving average of each batch's extremes; `minmax`: the extremes of all
    batches so far; `batch`: the extremes of the last batch. A weight under `batch` has the range
    of its present values, in training and in evaluation, and keeps no state."""
    ema_decay: float = 0.99
    """Weight of the old range in `ema`: new = decay * old + (1 - decay) * batch."""
    quant_delay: int = 0
    """Training steps during which values pass unquantized while ranges are observed."""

    def __post_init__(self) -> None:
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
        if self.quant_delay < 0:
            raise ValueError(f"QuantSpec.quant_delay must be 0 or more, got {self.quant_delay}.")

    @property
    def qmin(self) -> int:
        """Lowest integer code."""
        lowest = -(2 ** (self.num_bits - 1)) if self.symmetric else 0
        return lowest + self.narrow_range

    @property
    def qmax(self) -> int:
        """Highest integer code."""
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1
