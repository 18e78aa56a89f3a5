"""Dataclasses as what JSON holds, and back; what is not finite as text, as ProtoJSON writes it."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")
_INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """Return what JSON holds: dataclasses as dictionaries, infinities as "Infinity"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value) if field.compare)
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def read_json(path: Path, remedy: str = "") -> Any:
    """Return what a file of JSON holds.

    Args:
      path: the file.
      remedy: a sentence to end the message with where it is no JSON.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # no text, or no JSON
        raise ValueError(f"{path} is no JSON: {error}. {remedy}".rstrip()) from error


def restored(kind: type[T], value: Any, where: str) -> T:
    """Return what `plain` was given.

    Args:
      kind: its type: a dataclass, a tuple, a mapping of text, a union with None, or simple.
      value: what JSON holds.
      where: names the value in errors: "analysis.layers".

    Raises:
      ValueError: the value is none of that type.
    """
    return _restored(kind, value, where)


def _restored(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _restored(next(a for a in arguments if a is not type(None)), value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple:
        kinds = _kinds(arguments, value, where)
        return tuple(
            _restored(k, v, f"{where}[{n}]")
            for n, (k, v) in enumerate(zip(kinds, value, strict=True))
        )
    if isinstance(origin, type) and issubclass(origin, Mapping):
        given = _checked(isinstance(value, dict), "an object", value, where)
        return {n: _restored(arguments[1], v, f"{where}[{n!r}]") for n, v in given.items()}
    if origin is Literal:
        return _checked(value in arguments, f"one of {arguments}", value, where)
    if kind is float:
        value = _INFINITIES.get(value, value) if isinstance(value, str) else value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_checked(number, "a number", value, where))
    return _checked(type(value) is kind, kind.__name__, value, where)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _checked(isinstance(value, dict), "an object", value, where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.compare}
    unknown = sorted(set(value) - set(fields))
    _checked(not unknown, f"an object of {', '.join(fields)}", ", ".join(unknown), where)
    needed = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [name for name in needed if name not in value]
    _checked(not missing, f"an object with {', '.join(missing)}", value, where)
    return kind(**{n: _restored(hints[n], v, f"{where}.{n}") for n, v in value.items()})


def _kinds(arguments: tuple[Any, ...], value: Any, where: str) -> list[Any]:
    """Return the type of each element of a tuple."""
    _checked(isinstance(value, list), "a list", value, where)
    if arguments[-1] is Ellipsis:
        return [arguments[0]] * len(value)
    _checked(len(value) == len(arguments), f"a list of {len(arguments)}", value, where)
    return list(arguments)


def _checked(ok: bool, wanted: str, value: Any, where: str) -> Any:
    if not ok:
        raise ValueError(f"{where} must be {wanted}, got {_short(value)}.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
