"""What was measured of a model besides: accuracy, size, latency."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simqat_jax.analysis.plain import plain, read_json, restored
from simqat_jax.files import atomic_file
from simqat_jax.numerics.arguments import shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of one model: a row of a report.

    Attributes:
      name: "float", "after training", "net.tflite".
      accuracy: a share, from 0 to 1; None: not measured, as for all others.
      nbytes: size of its file or parameters.
      p50_ms: median latency of a call, milliseconds.
      p99_ms: 99th percentile of latency.

    Raises:
      TypeError: a field of another type.
      ValueError: an empty name, an accuracy above 1, a number below 0.

    Examples:
      >>> Measurement(name="float", accuracy=0.9745, nbytes=246_824).p50_ms is None
      True
    """

    name: str
    accuracy: float | None = None
    nbytes: int | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Measurement.name must be a string, got {shown(self.name)}.")
        if not self.name:
            raise ValueError("Measurement.name must say which model it is, got ''.")
        for field in ("accuracy", "nbytes", "p50_ms", "p99_ms"):
            value = getattr(self, field)
            if value is not None:
                _check_number(field, value, most=1 if field == "accuracy" else math.inf)


def _check_number(field: str, value: Any, most: float) -> None:
    about = "a share from 0 to 1 (97.5 % is 0.975)" if most == 1 else "0 or more"
    text = f"Measurement.{field} must be a number, {about}, or None, got {shown(value)}."
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(text)
    if not 0 <= float(value) <= most or math.isinf(float(value)):
        raise ValueError(text)


def check_measurements(given: object) -> None:
    """Raise TypeError unless it is a list of measurements."""
    if not isinstance(given, list | tuple) or not all(isinstance(m, Measurement) for m in given):
        raise TypeError(
            f"measurements must be a list of Measurement, got {shown(given)}. Write "
            "measurements=[Measurement(name='float', accuracy=0.97)], for example."
        )


def write_measurements(measurements: Sequence[Measurement], path: Path) -> None:
    """Write measurements as JSON, a list of objects."""
    with atomic_file(path) as file:
        file.write(json.dumps(plain(measurements), indent=2, allow_nan=False).encode())


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """Read what `write_measurements` wrote; what an object leaves out was not measured.

    Raises:
      FileNotFoundError: no such file.
      ValueError: something else.
    """
    return restored(tuple[Measurement, ...], read_json(path), str(path))


def merged(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Return one for each name, in order; of a figure that is given twice, the later."""
    found: dict[str, Measurement] = {}
    for given in measurements:
        named = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
        known = found.get(given.name, given)
        changes = {name: value for name, value in named.items() if value is not None}
        found[given.name] = dataclasses.replace(known, **changes)
    return tuple(found.values())
