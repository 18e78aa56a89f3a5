"""What to quantize and how, for a whole model: a frozen dataclass, validated at construction."""

import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from simqat_jax.numerics.arguments import shown
from simqat_jax.numerics.folding import BatchNormFold
from simqat_jax.numerics.rounding import Backend
from simqat_jax.numerics.spec import QuantSpec, check_choice, check_type
from simqat_jax.rules import Rule, checked_width, weight_spec

FloatParts = Literal["allow", "refuse"]
"""What `convert` does with what has no exact integer form."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimQATConfig:
    """Configure simulated quantization of a whole model.

    Attributes:
      weight: kernels: by default 8 bits, symmetric, per output channel, narrow range, range of the
        present values. What a QuantSpec does not give here has these defaults.
      activation: tensors between layers: by default 8 bits, asymmetric, per tensor, moving average.
      weight_bits: short for a `weight` of this width; not kept, read `weight.num_bits`.
      activation_bits: short for an `activation` of this width, likewise.
      bn_fold: how BatchNorm behind a Conv or Dense trains, with `sigma` of the running statistics.
        `none`: `BN(conv(x, fq(w)))`; `one_conv`: `conv(x, fq(w * gamma / sigma))` and batch
        statistics from its output; `two_conv`: batch statistics from a float convolution of their
        own.
      freeze_bn: training step from which BatchNorm uses its running statistics and leaves them
        alone; None: never.
      exclude: module paths that stay float, with everything inside them: `"Dense_2"`, `"head/*"`
        (patterns as in `Rule.path`). A pattern that matches no module or product is an
        error: another operation takes `Rule(path=..., quantize=False)`.
      rules: what is quantized otherwise, behind `exclude`; the first that matches decides. A rule
        that decides nothing, or a part of one without effect, is an error.
      backend: whose rounding of sums and products of tensors evaluation mirrors, code for code:
        `tflite` (XNNPACK) or `onnx` (ONNX Runtime). All else is the same in both.
      targets: the files that the model is for, `("onnx", "tflite")`: codes of more bits than they
        hold are an error in the first call, before training. Without, an export refuses them.
      float_parts: what has no exact integer form, LayerNorm or an input that is scaled: `allow`:
        integer models and files compute it in float; `refuse`: `convert` raises, and lists all of
        it.
      strict: a Conv or Dense that cannot be quantized is an error; otherwise it stays float and the
        plan says why.

    Raises:
      TypeError: a field of the wrong type.
      ValueError: an unknown `bn_fold`, `backend`, `float_parts` or target, a negative
        `freeze_bn`, asymmetric weights, an empty pattern in `exclude`.

    Examples:
      >>> SimQATConfig(weight_bits=4, exclude=["Dense_2"]).weight.qmin
      -7
      >>> SimQATConfig(weight=QuantSpec(num_bits=4, per_channel=False)).weight.observer
      'batch'
    """

    weight: QuantSpec = dataclasses.field(default_factory=QuantSpec.weight)
    activation: QuantSpec = dataclasses.field(default_factory=QuantSpec.activation)
    weight_bits: dataclasses.InitVar[int | None] = None
    activation_bits: dataclasses.InitVar[int | None] = None
    bn_fold: BatchNormFold = "one_conv"
    freeze_bn: int | None = None
    exclude: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    backend: Backend = "tflite"
    targets: Sequence[Backend] = ()
    float_parts: FloatParts = "allow"
    strict: bool = True

    def __post_init__(self, weight_bits: int | None, activation_bits: int | None) -> None:
        check_type(self, "weight", QuantSpec)
        check_type(self, "activation", QuantSpec)
        owner = "SimQATConfig"
        specs = {"weight": weight_spec(owner, self.weight), "activation": self.activation}
        for (field, spec), bits in zip(specs.items(), (weight_bits, activation_bits), strict=True):
            width = spec.num_bits if bits is None else checked_width(owner, f"{field}_bits", bits)
            object.__setattr__(self, field, dataclasses.replace(spec, num_bits=width))
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
        for field, kind, example in (
            ("targets", str, "'tflite'"),
            ("exclude", str, "'head/*'"),
            ("rules", Rule, "Rule(...)"),
        ):
            given = getattr(self, field)
            if not isinstance(given, (tuple, list)) or not all(isinstance(v, kind) for v in given):
                meant = f"[{given!r}]" if isinstance(given, str) else f"[{example}]"
                raise TypeError(
                    f"SimQATConfig.{field} must be a list or tuple of {kind.__name__}, got "
                    f"{given!r}. Write {field}={meant}."
                )
            object.__setattr__(self, field, tuple(given))
        unknown = [target for target in self.targets if target not in get_args(Backend)]
        if unknown:
            raise ValueError(
                f"SimQATConfig.targets must be of {', '.join(map(repr, get_args(Backend)))}, got "
                f"{unknown[0]!r}."
            )
        if "" in self.exclude:
            raise ValueError("SimQATConfig.exclude must hold paths such as 'head/*', got ''.")

    @property
    def decisions(self) -> tuple[Rule, ...]:
        """All rules in the order in which they decide: what is excluded, then `rules`."""
        return (*(Rule(path=path, quantize=False) for path in self.exclude), *self.rules)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, text and numbers, as JSON holds them."""
        return {"version": RECIPE_VERSION} | json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "SimQATConfig":
        """Return the configuration of a dictionary, as `to_dict` and JSON have it.

        What it leaves out has its default; `weight_bits` and `activation_bits` are taken as well.

        Args:
          fields: by name; `version` may be left out. Or a dictionary with one such within, as
            `config.json` and `results.json` of a run have it.

        Raises:
          TypeError: no dictionary, a field of the wrong type.
          ValueError: another version, an unknown field; several configurations within; what the
            fields refuse.

        Examples:
          >>> config = SimQATConfig.from_dict({"weight_bits": 4, "rules": [{"path": "head"}]})
          >>> config.weight.num_bits, config.rules[0].path
          (4, 'head')
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"the recipe must be a dictionary, got {shown(fields)}.")
        within = list(_recipes_inside(fields))
        if len(within) == 1 and not fields.keys() & _parameters(cls).keys():
            return cls.from_dict(within[0][1])
        given = dict(fields)
        version = given.pop("version", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            raise ValueError(
                f"the recipe has version {version!r}, and this version of the library reads "
                f"{RECIPE_VERSION}. Write it again with SimQATConfig.to_json."
            )
        unknown = given.keys() - _parameters(cls).keys()
        if unknown and within:
            raise ValueError(
                f"the dictionary is no recipe, but holds {len(within)}. Pass one of them: "
                f"SimQATConfig.from_dict(given{within[0][0]})."
            )
        return _from_fields(cls, given, "the recipe")

    def to_json(self) -> str:
        """Return the configuration as text, to be kept in a file and read by `from_json`.

        Examples:
          >>> config = SimQATConfig(rules=[Rule(path="head", bn_fold="none")])
          >>> SimQATConfig.from_json(config.to_json()) == config
          True
        """
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "SimQATConfig":
        """Return the configuration that `to_json` wrote.

        What the text leaves out has its default.

        Args:
          text: JSON, of this version.

        Raises:
          ValueError: no JSON object, another version, an unknown field; what the fields refuse.
          TypeError: no string, a field of the wrong type.
        """
        if not isinstance(text, str):
            raise TypeError(f"the recipe must be JSON as a string, got {shown(text)}.")
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the recipe is no JSON: {error}.") from error
        if not isinstance(fields, dict) or fields.get("version") != RECIPE_VERSION:
            raise ValueError(
                f'the recipe must be a JSON object with "version": {RECIPE_VERSION}, as '
                f"SimQATConfig.to_json writes it with this version, got {text[:80]!r}."
            )
        return cls.from_dict(fields)


T = TypeVar("T")
RECIPE_VERSION = 1
"""Of the text that `to_json` writes."""


def _parameters(kind: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(kind).parameters)


def _recipes_inside(given: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping]]:
    """Yield what `to_dict` returned, within a dictionary, and where: "['settings']['quant']"."""
    for key, value in given.items():
        if isinstance(value, Mapping):
            where = f"{path}[{key!r}]"
            if {"version", "weight", "activation"} <= value.keys():
                yield where, value
            yield from _recipes_inside(value, where)


def _from_fields(kind: type[T], given: Any, where: str) -> T:
    """Return an object of a dataclass that holds others, from what JSON has for it.

    Args:
      kind: the dataclass.
      given: its fields.
      where: names it in messages: "rules[0].weight".

    Raises:
      ValueError: a field that it does not have, or another JSON value than it holds.
    """
    names = sorted(_parameters(kind))
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where} must be a JSON object with fields of {kind.__name__} "
            f"({', '.join(names)}), got {shown(given)}."
        )
    unknown = [str(name) for name in given if name not in names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 1)
        meant = f": {near[0]!r} may be meant" if near else ""
        raise ValueError(
            f"{where} has a field {unknown[0]!r}, which no {kind.__name__} has{meant}. It has "
            f"{', '.join(names)}."
        )
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    for name in sorted(fields.keys() & {"weight", "activation"}):
        if fields[name] is not None:
            fields[name] = _from_fields(QuantSpec, fields[name], _under(where, name))
    if "rules" in fields:
        if not isinstance(fields["rules"], tuple):
            raise ValueError(f"rules must be a JSON list, got {shown(fields['rules'])}.")
        pairs = enumerate(fields["rules"])
        fields["rules"] = tuple(_from_fields(Rule, rule, f"rules[{k}]") for k, rule in pairs)
    return kind(**fields)


def _under(where: str, name: str) -> str:
    return f"{where}.{name}" if where.startswith("rules") else f"{where}'s {name}"
