"""What to quantize and how: two frozen dataclasses, validated at construction."""

import dataclasses
from typing import Literal, get_args

Observer = Literal["ema", "minmax", "batch"]
Backend = Literal["tflite", "onnx"]
BatchNormFold = Literal["none", "one_conv", "two_conv"]


def _require_type(owner: object, field: str, kind: type) -> None:
    """Raise TypeError unless `owner.field` is exactly of `kind` (a bool is not an int here)."""
    value = getattr(owner, field)
    if type(value) is not kind:
        raise TypeError(
            f"{type(owner).__name__}.{field} must be of type {kind.__name__}, "
            f"got {value!r} of type {type(value).__name__}."
        )


def _require_choice(owner: object, field: str, choices: tuple[str, ...]) -> None:
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

    Raises: TypeError: a field of the wrong type, a bool for an int included.
      ValueError: `num_bits` outside 2 to 16, `ema_decay` outside [0, 1), a negative
      `quant_delay`, an unknown `observer`.
    Example:
      >>> QuantSpec(num_bits=4, symmetric=True, narrow_range=True).qmin
      -7

    Source: Jacob et al., arXiv:1712.05877; Krishnamoorthi, arXiv:1806.08342.
    """

    num_bits: int = 8
    """Width of the integer codes, 2 to 16."""
    symmetric: bool = False
    """Zero point 0 and signed codes; otherwise unsigned codes with a zero point."""
    per_channel: bool = False
    """One range per channel (last axis), else one per tensor."""
    narrow_range: bool = False
    """Leave out the lowest code: [-127, 127] for 8 symmetric bits, [1, 255] for asymmetric."""
    observer: Observer = "ema"
    """`ema`: exponential moving average of each batch's extremes; `minmax`: the extremes of all
    batches so far; `batch`: the extremes of the last batch. A weight under `batch` has the range
    of its present values, in training and in evaluation, and keeps no state."""
    ema_decay: float = 0.99
    """Weight of the old range in `ema`: new = decay * old + (1 - decay) * batch."""
    quant_delay: int = 0
    """Training steps during which values pass unquantized while ranges are observed."""

    def __post_init__(self) -> None:
        _require_type(self, "num_bits", int)
        for field in ("symmetric", "per_channel", "narrow_range"):
            _require_type(self, field, bool)
        _require_type(self, "observer", str)
        _require_type(self, "ema_decay", float)
        _require_type(self, "quant_delay", int)
        _require_choice(self, "observer", get_args(Observer))
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


def _weight_spec() -> QuantSpec:
    return QuantSpec(symmetric=True, per_channel=True, narrow_range=True, observer="batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimQATConfig:
    """Configure simulated quantization of a whole model.

    Raises: TypeError: a field of the wrong type. ValueError: an unknown `bn_fold`, a negative
      `freeze_bn`, asymmetric weights, an empty pattern in `exclude`.
    Example:
      >>> SimQATConfig(weight=QuantSpec(num_bits=4, symmetric=True, per_channel=True),
      ...              exclude=("Dense_2",)).weight.qmin
      -8
    """

    weight: QuantSpec = dataclasses.field(default_factory=_weight_spec)
    """Kernels: symmetric, per output channel, narrow range, range of the present values."""
    activation: QuantSpec = dataclasses.field(default_factory=QuantSpec)
    """Tensors between layers: asymmetric, per tensor, moving average."""
    bn_fold: BatchNormFold = "one_conv"
    """How BatchNorm behind a Conv or Dense trains, with `sigma` of the running statistics. `none`:
    `BN(conv(x, fq(w)))`; `one_conv`: `conv(x, fq(w * gamma / sigma))` and batch statistics from
    its output; `two_conv`: batch statistics from a float convolution of their own."""
    freeze_bn: int | None = None
    """Training step from which BatchNorm uses its running statistics and leaves them alone;
    None: never."""
    exclude: tuple[str, ...] = ()
    """Module paths that stay float, with everything inside them: `"Dense_2"`, `"head/*"`
    (`fnmatch` patterns). A pattern that matches no module is an error."""
    backend: Backend = "tflite"
    """Whose rounding of sums and products of tensors evaluation mirrors, code for code: `tflite`
    (XNNPACK) or `onnx` (ONNX Runtime). All else is the same in both."""
    strict: bool = True
    """A Conv or Dense that cannot be quantized is an error; otherwise it stays float and the
    plan says why."""

    def __post_init__(self) -> None:
        _require_type(self, "weight", QuantSpec)
        _require_type(self, "activation", QuantSpec)
        _require_type(self, "bn_fold", str)
        _require_type(self, "strict", bool)
        _require_choice(self, "bn_fold", get_args(BatchNormFold))
        _require_type(self, "backend", str)
        _require_choice(self, "backend", get_args(Backend))
        if self.freeze_bn is not None:
            _require_type(self, "freeze_bn", int)
            if self.freeze_bn < 0:
                raise ValueError(
                    f"SimQATConfig.freeze_bn must be a number of steps, 0 or more, or None, got "
                    f"{self.freeze_bn}."
                )
        if not self.weight.symmetric:
            raise ValueError(
                "SimQATConfig.weight must be symmetric: integer kernels of every target have "
                "zero point 0. Use QuantSpec(symmetric=True, ...)."
            )
        _require_type(self, "exclude", tuple)
        for pattern in self.exclude:
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(
                    f"SimQATConfig.exclude must hold module paths such as 'head/Dense_0', got "
                    f"{pattern!r}."
                )
