"""Rules: what is quantized otherwise than the rest of the model."""

import dataclasses
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.spec import QuantSpec, check_choice, check_type

Kind = Literal[
    "input",
    "conv",
    "dense",
    "matmul",
    "lookup",
    "batch_norm",
    "norm",
    "spread",
    "softmax",
    "log_softmax",
    "add",
    "mul",
    "extremum",
    "position",
    "mean",
    "concat",
    "select",
    "elementwise",
]
"""What an operation is, as `Row.kind` of a plan says; `input` is an input of the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Say how some operations are quantized; of several rules the first that matches decides.

    What a rule leaves None is as in the `SimQATConfig` that holds it. A spec is one of its own:
    what it does not give has the default of a weight or an activation, not the config's setting.

    Attributes:
      path: which modules and operations, everything inside of them included: an `fnmatch` pattern
        such as `"encoder/*/Dense_0"` or `"Block_0/add_1"` (the second sum of `Block_0`), or behind
        `re:` a regular expression that matches a whole path.
      op: only operations of this kind; None: all.
      quantize: whether they are quantized; False leaves them float.
      weight: of their kernels.
      activation: of their results (of the input itself for `op="input"`).
      weight_bits: short for `weight=QuantSpec.weight(num_bits=...)`; not kept, read
        `weight.num_bits`.
      activation_bits: short for `activation=QuantSpec.activation(num_bits=...)`, likewise.
      bn_fold: of the BatchNorm behind them.

    Raises:
      TypeError: a field of the wrong type.
      ValueError: an empty pattern, one that does not compile; an unknown `op` or `bn_fold`;
        asymmetric weights; a spec together with its bits; `quantize=False` together with what is
        about quantized operations.

    Examples:
      >>> Rule(path="encoder/*", op="dense", weight_bits=4).weight.num_bits
      4
      >>> Rule(path="re:Block_[0-3]/.*", quantize=False).matches(("Block_2", "Conv_0"))
      True
    """

    path: str = "*"
    op: Kind | None = None
    quantize: bool = True
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None
    weight_bits: dataclasses.InitVar[int | None] = None
    activation_bits: dataclasses.InitVar[int | None] = None
    bn_fold: BatchNormFold | None = None

    def __post_init__(self, weight_bits: int | None, activation_bits: int | None) -> None:
        check_type(self, "path", str)
        if not self.path.removeprefix("re:"):
            raise ValueError(f"Rule.path must hold a pattern such as 'head/*', got {self.path!r}.")
        if self.path.startswith("re:"):
            try:
                re.compile(self.path[3:])
            except re.error as error:
                raise ValueError(
                    f"Rule.path {self.path!r} is no regular expression: {error}."
                ) from error
        check_type(self, "quantize", bool)
        for field, choices in (("op", get_args(Kind)), ("bn_fold", get_args(BatchNormFold))):
            if getattr(self, field) is not None:
                check_type(self, field, str)
                check_choice(self, field, choices)
        for field in ("weight", "activation"):
            if getattr(self, field) is not None:
                check_type(self, field, QuantSpec)
        if self.weight is not None:
            object.__setattr__(self, "weight", weight_spec("Rule", self.weight))
        if self.activation is not None:
            object.__setattr__(self, "activation", dataclasses.replace(self.activation))
        self._widen("weight", QuantSpec.weight, weight_bits)
        self._widen("activation", QuantSpec.activation, activation_bits)
        if not self.quantize and self.parts:
            raise ValueError(
                f"Rule(path={self.path!r}, quantize=False) leaves its operations float, and says "
                f"of quantized ones: {', '.join(self.parts)}. Use two rules, or leave one out."
            )

    def _widen(self, field: str, spec: Callable[..., QuantSpec], bits: int | None) -> None:
        if bits is None:
            return
        if getattr(self, field) is not None:
            raise ValueError(
                f"Rule(path={self.path!r}) has both {field} and {field}_bits. Give one of them: "
                f"{field}=QuantSpec.{field}(num_bits={bits}, ...) says all."
            )
        made = spec(num_bits=checked_width("Rule", f"{field}_bits", bits))
        object.__setattr__(self, field, made)

    @property
    def parts(self) -> tuple[str, ...]:
        """The settings that it replaces."""
        names = ("weight", "activation", "bn_fold")
        return tuple(name for name in names if getattr(self, name) is not None)

    def matches(self, path: Sequence[str]) -> bool:
        """Whether it is about a path, given in parts, or a module around it.

        The numbers of layers that are repeated ("layers/0/Dense_0") may be left out.
        """
        unnumbered = [part for part in path if not part.isdigit()]
        names = (*around(path), *around(unnumbered))
        if self.path.startswith("re:"):
            return any(re.fullmatch(self.path[3:], name) for name in names)
        return any(fnmatch.fnmatchcase(name, self.path) for name in names)


def checked_width(owner: str, field: str, bits: object) -> int:
    """Return a width that was given in short.

    Raises:
      TypeError: it is no whole number.
      ValueError: it is outside of 2 to 16.
    """
    text = f"{owner}.{field} must be a number of bits, 2 to 16, or None, got {bits!r}."
    if type(bits) is not int:
        raise TypeError(text)
    if not 2 <= bits <= 16:
        raise ValueError(text)
    return bits


def around(path: Sequence[str]) -> Iterator[str]:
    """Yield a path and those of the modules around it, outermost first."""
    return ("/".join(path[:depth]) for depth in range(min(1, len(path)), len(path) + 1))


def weight_spec(owner: str, given: QuantSpec) -> QuantSpec:
    """Return a spec of kernels, with the defaults of weights for what was not given.

    Raises:
      ValueError: it is not symmetric.
    """
    spec = given.as_weight()
    if spec.symmetric:
        _warn_of_defaults(owner, spec)
        return spec
    usual = [
        dataclasses.asdict(default) for default in (QuantSpec.activation(), QuantSpec.weight())
    ]
    fields = dataclasses.asdict(spec).items()
    kept = [f"{k}={v!r}" for k, v in fields if v not in [default[k] for default in usual]]
    raise ValueError(
        f"{owner}.weight must be symmetric: integer kernels of every target have zero point 0. "
        f"Write QuantSpec.weight({', '.join(kept)}), with the defaults of weights for all else."
    )


def _warn_of_defaults(owner: str, spec: QuantSpec) -> None:
    """Warn of a weight that is an activation in all but its symmetry: one that was replaced."""
    fields = ("per_channel", "narrow_range", "observer")
    if all(getattr(spec, name) == getattr(QuantSpec.activation(), name) for name in fields):
        warnings.warn(
            f"{owner}.weight has what activations have by default: one range per tensor, the whole "
            "range of codes and the observer 'ema'. dataclasses.replace gives every field: replace "
            f"those of QuantSpec.weight(num_bits={spec.num_bits}), or of another weight.",
            stacklevel=5,  # behind __post_init__ and __init__
        )


def deciding(rules: Sequence[Rule], path: Sequence[str], kind: str | None = None) -> int | None:
    """Return the place of the first rule about an operation; None: there is none.

    Args:
      rules: in order.
      path: of the operation or module.
      kind: of the operation; None: not known yet, so that nothing is decided either where a rule
        for one kind comes first.
    """
    for place, rule in enumerate(rules):
        if rule.op in (None, kind) and rule.matches(path):
            return place
        if kind is None and rule.matches(path):
            return None
    return None


def left_out(rules: Sequence[Rule], path: Sequence[str], kind: str | None = None) -> int | None:
    """Return the place of the rule by which an operation stays float; None: by none."""
    place = deciding(rules, path, kind)
    return None if place is None or rules[place].quantize else place
