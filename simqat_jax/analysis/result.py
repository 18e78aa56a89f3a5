"""What an analysis finds: figures to print, to draw and to keep."""

import dataclasses
import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from simqat_jax.analysis.measures import decibels
from simqat_jax.analysis.plain import plain, read_json, restored
from simqat_jax.analysis.study import Study
from simqat_jax.files import as_path, atomic_file, import_extra
from simqat_jax.ir.table import Column, table
from simqat_jax.numerics.observers import Role
from simqat_jax.numerics.spec import QuantSpec

_LAYERS, _TENSORS = 20, 10
"""Rows of the printed tables; all there is, is in `layers` and `tensors`."""
_OF_LAYERS = (
    Column("layer", "path"),
    Column("kind", right=True),
    Column("bits", right=True),
    Column("it alone", right=True),
    Column("gain if float", right=True),
)
_OF_TENSORS = (
    Column("tensor", "path"),
    Column("values", right=True),
    Column("grid", right=True),
    Column("clipped", right=True),
    Column("SQNR", right=True),
)
_VERSION = 1
"""Of the dictionary that `to_dict` returns."""
_WRITTEN = "Pass a file that Analysis.save wrote with this version."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorAnalysis:
    """A quantized tensor, on all data.

    Attributes:
      name: "Conv_0/kernel", "Conv_0/output", "input".
      role: "activation" or "weight".
      spec: grid and observer.
      grid: lowest and highest value of its grid, real units; with one for each channel, of all.
      lo: lowest value before rounding, real units, in the quantized model.
      hi: highest value.
      below: share of values below the grid, which are clipped.
      above: share of values above it.
      counts: how many values lie in each of 64 bins, from the lowest code to the highest.
      sqnr: `10 log10(signal / noise)` against the float model's tensor, dB; infinite without noise.
    """

    name: str
    role: Role
    spec: QuantSpec
    grid: tuple[float, float]
    lo: float
    hi: float
    below: float
    above: float
    counts: tuple[int, ...] = dataclasses.field(repr=False)
    sqnr: float

    @property
    def clipped(self) -> float:
        """Share of values outside of the grid."""
        return self.below + self.above


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAnalysis:
    """What the quantization of a layer does to the model's outputs.

    Attributes:
      name: the path that rules match.
      kind: "conv", "add", "input" ..., as `Row.kind` of a plan.
      num_bits: width of its kernel's codes; None: it has no kernel.
      alone_quantized: SQNR of the outputs where this layer alone is quantized, dB: low hurts.
      alone_float: SQNR of the outputs where all but this layer is quantized, dB.
      gain: dB that the outputs gain where this layer is left float.
    """

    name: str
    kind: str
    num_bits: int | None
    alone_quantized: float
    alone_float: float
    gain: float


@dataclasses.dataclass(frozen=True)
class RangeAt:
    """A range at one time of training.

    Attributes:
      step: training steps until then.
      lo: lowest value, real units, of all channels.
      hi: highest value.
    """

    step: int
    lo: float
    hi: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """Why accuracy moved: made by `analyze`; `print` it.

    Copies and pickles hold all figures; `suggest` needs the analysis itself, which holds the data.

    Attributes:
      layers: what each layer does to the outputs, those that hurt most first.
      tensors: every quantized tensor and kernel, by name, in order of evaluation.
      sqnr: of the quantized model's outputs against the float model's, dB.
      examples: how many were looked at.
      ranges: of each range what it was in the states handed in as `history`.
    """

    layers: tuple[LayerAnalysis, ...]
    tensors: Mapping[str, TensorAnalysis]
    sqnr: float
    examples: int
    ranges: Mapping[str, tuple[RangeAt, ...]]
    study: Study | None = dataclasses.field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "study": None}

    def __repr__(self) -> str:
        held = f"{len(self.layers)} layers, {len(self.tensors)} tensors, {self.examples} examples"
        return f"Analysis({held}; outputs {decibels(self.sqnr)} SQNR)"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        worst = sorted(self.tensors.values(), key=lambda tensor: tensor.sqnr)
        lines = [f"outputs: {decibels(self.sqnr)} SQNR against float, {self.examples} examples"]
        lines += ["", "layers, those that hurt most first; SQNR of the outputs"]
        rows = [
            (
                layer.name,
                layer.kind,
                "" if layer.num_bits is None else str(layer.num_bits),
                decibels(layer.alone_quantized),
                decibels(layer.gain, sign="+"),
            )
            for layer in self.layers[:_LAYERS]
        ]
        lines += [*table(_OF_LAYERS, rows), *_rest(self.layers, _LAYERS)]
        lines += ["", "tensors, the least like float first"]
        rows = [
            (
                tensor.name,
                f"[{tensor.lo:.3g}, {tensor.hi:.3g}]",
                f"[{tensor.grid[0]:.3g}, {tensor.grid[1]:.3g}]",
                f"{tensor.clipped:.2%}",
                decibels(tensor.sqnr),
            )
            for tensor in worst[:_TENSORS]
        ]
        lines += [*table(_OF_TENSORS, rows), *_rest(worst, _TENSORS)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as what JSON holds; "Infinity" stands for an SQNR without noise.

        Examples:
          >>> qmodel, x = SimQAT().apply(nn.Dense(2)), jnp.linspace(-1, 2, 12).reshape(4, 3)
          >>> variables = calibrate(qmodel, nn.Dense(2).init(jax.random.key(0), x), [x],
          ...                       progress=False)
          >>> figures = analyze(qmodel, variables, [x], progress=False).to_dict()
          >>> sorted(layer["name"] for layer in figures["layers"])
          ['Dense', 'input']
        """
        return {"version": _VERSION, **plain(self)}

    def to_json(self) -> str:
        """Return `to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all figures to one JSON file, for `load` and `simqat report`.

        Raises:
          TypeError: `path` is none.
          OSError: an unwritable path.
        """
        with atomic_file(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Analysis":
        """Read what `save` wrote: all figures, without the data that `suggest` needs.

        Raises:
          TypeError: `path` is none.
          FileNotFoundError: no such file.
          ValueError: no analysis, or one of another version.
        """
        source = as_path(path)
        figures = read_json(source, _WRITTEN)
        if not isinstance(figures, dict) or figures.pop("version", None) != _VERSION:
            raise ValueError(f'{source} has no "version": {_VERSION}. {_WRITTEN}')
        return restored(cls, figures, f"{source}: analysis")

    def plot(self, most: int = 20) -> Any:
        """Draw what each layer does to the outputs.

        Args:
          most: how many layers, those that hurt most first.

        Returns:
          A `matplotlib.figure.Figure`: save it with `savefig`; a notebook shows it behind
          `%matplotlib inline`.

        Raises:
          ImportError: the extra `report` is not installed.
        """
        shown = self.layers[:most][::-1]
        names = [layer.name for layer in shown]
        width = 7.5 + 0.085 * max(map(len, names), default=0)  # inches; of a letter, at 10 points
        figure = import_extra("matplotlib.figure", "report").Figure(
            figsize=(width, 1 + 0.3 * len(shown)), layout="constrained"
        )
        for axes, title, values in zip(
            figure.subplots(1, 2, sharey=True),
            ("SQNR of the outputs, it alone quantized, dB", "gain if it is float, dB"),
            ([s.alone_quantized for s in shown], [s.gain for s in shown]),
            strict=True,
        ):
            axes.barh(names, [v if math.isfinite(v) else 0 for v in values])
            axes.set_xlabel(title)
        return figure


def _rest(rows: Sequence[object], most: int) -> list[str]:
    return [f"and {len(rows) - most} more"] if len(rows) > most else []
