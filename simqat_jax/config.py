"""What to quantize and how, for a whole model: a frozen dataclass, validated at construction."""

import dataclasses
from typing import Literal, get_args

from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.rounding import Backend
from simqat_jax.numerics.spec import QuantSpec, check_choice, check_type

FloatParts = Literal["allow", "refuse"]
"""What `convert` does with what has no exact integer form."""


def _weight_spec() -> QuantSpec:
    return QuantSpec(symmetric=True, per_channel=True, narrow_range=True, observer="batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimQATConfig:
    """Configure simulated quantization of a whole model.

    Raises:
      TypeError: a field of the wrong type.
      ValueError: an unknown `bn_fold`, `backend` or `float_parts`, a negative `freeze_bn`,
        asymmetric weights, an empty pattern in `exclude`.

    Examples:
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
    float_parts: FloatParts = "allow"
    """What has no exact integer form, LayerNorm or an input that is scaled: `allow`: integer
    models and files compute it in float; `refuse`: `convert` raises, and lists all of it."""
    strict: bool = True
    """A Conv or Dense that cannot be quantized is an error; otherwise it stays float and the
    plan says why."""

    def __post_init__(self) -> None:
        check_type(self, "weight", QuantSpec)
        check_type(self, "activation", QuantSpec)
        check_type(self, "bn_fold", str)
        check_type(self, "strict", bool)
        check_choice(self, "bn_fold", get_args(BatchNormFold))
        check_type(self, "backend", str)
        check_choice(self, "backend", get_args(Backend))
        check_type(self, "float_parts", str)
        check_choice(self, "float_parts", get_args(FloatParts))
        if self.freeze_bn is not None:
            check_type(self, "freeze_bn", int)
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
        check_type(self, "exclude", tuple)
        for pattern in self.exclude:
            if not isinstance(pattern, str) or not pattern:
                raise (TypeError if pattern != "" else ValueError)(
                    f"SimQATConfig.exclude must hold module paths such as 'head/Dense_0', got "
                    f"{pattern!r}."
                )
