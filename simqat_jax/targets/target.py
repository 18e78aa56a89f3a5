"""The interface: a kind of file, who runs it, and how."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.arguments import check_kind
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.rounding import Rounding
from simqat_jax.targets.listing import Listing
from simqat_jax.training.module import QuantizedModule


def check_model(model: object, call: str) -> None:
    """Raise TypeError unless it is an IntegerModel; `call` is how the function is called."""
    remedy = "convert and IntegerModel.load return one."
    if isinstance(model, QuantizedModule):
        remedy = "Convert it first: model = convert(qmodel, variables, x)."
    elif isinstance(model, str | os.PathLike):
        remedy = f"The model comes first: {call}."
    check_kind("model", model, IntegerModel, remedy)


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """An exported file, open in its runtime.

    Attributes:
      name: the runtime with its version.
      run: from input arrays, one for each input, to output arrays.
      float_inputs: whether each input takes real values; otherwise codes.
      offset: what codes of a grid have added in the file.
      dtype: the type of codes in the file.
    """

    name: str
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    float_inputs: list[bool]
    offset: Callable[[Grid], int]
    dtype: np.dtype


Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""From input arrays to output arrays."""
Session = tuple[str, list[bool], Run]
"""The first fields of an OpenFile, name, float_inputs and run, as a runtime alone tells them."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file and the runtime that executes it.

    Attributes:
      suffix: of the files: ".onnx".
      rounding: the runtime's.
      write: returns the file of a program; the flag asks for inputs and outputs of codes.
      listing: tells what is in a file of any origin.
      packages: of the extra `export` that the runtime needs.
      open: opens a file of that path with the settings by keyword, and `threads` (None: as many as
        the runtime takes by itself). Its module imports nothing of this package, see `serve.py`.
      settings: what `open` is to know besides, as JSON holds it.
      offset: what codes of a grid have added in the file.
      dtype: the type of codes in the file.
    """

    suffix: str
    rounding: Rounding
    write: Callable[[Program, bool], bytes]
    listing: Callable[[Path], Listing]
    packages: tuple[str, ...]
    open: Callable[..., Session]
    settings: Callable[[], dict[str, Any]]
    offset: Callable[[Grid], int]
    dtype: np.dtype
