"""The interface: a kind of file, who runs it, and how."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from simqat_jax.integer.model import IntegerModel
from simqat_jax.ir.program import Program
from simqat_jax.numerics.arguments import check_kind, shown
from simqat_jax.numerics.rounding import Rounding
from simqat_jax.targets.listing import Listing
from simqat_jax.targets.metadata import FileMetadata
from simqat_jax.training.module import QuantizedModule


def check_model(model: object, call: str) -> None:
    """Raise TypeError unless it is an IntegerModel; `call` is how the function is called."""
    remedy = "convert and IntegerModel.load return one."
    if isinstance(model, QuantizedModule):
        remedy = "Convert it first: model = convert(qmodel, variables, x)."
    elif isinstance(model, str | os.PathLike):
        remedy = f"The model comes first: {call}."
    check_kind("model", model, IntegerModel, remedy)


IntegerIO = bool | Literal["int8", "uint8"]
"""Whether a file takes and returns codes, and of which type: True: that of the codes inside."""


def check_integer_io(value: object) -> None:
    """Raise TypeError unless `value` is an IntegerIO."""
    if not (isinstance(value, bool) or (isinstance(value, str) and value in ("int8", "uint8"))):
        raise TypeError(f'integer_io must be True, False, "int8" or "uint8", got {shown(value)}.')


@dataclasses.dataclass(frozen=True)
class OpenFile:
    """An exported file, open in its runtime.

    Attributes:
      name: the runtime with its version.
      run: from input arrays, one for each input, to output arrays.
      input_types: what each input takes, as NumPy names it: "float32" for real values, "int8" or
        "uint8" for codes, see `Grid.in_file`.
    """

    name: str
    run: Callable[[Sequence[np.ndarray]], list[np.ndarray]]
    input_types: tuple[str, ...]


Run = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""From input arrays to output arrays."""
Session = tuple[str, list[str], Run]
"""The fields of an OpenFile, name, input_types and run, as a runtime tells them."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file and the runtime that executes it.

    Attributes:
      suffix: of the files: ".onnx".
      rounding: the runtime's.
      dtype: the type of codes inside the file.
      write: returns the file of a program. Inputs and outputs are codes of a type, or real values
        where it is None; metadata are written where there are any.
      listing: tells what is in a file of any origin.
      packages: of the extra `export` that the runtime needs.
      open: opens a file of that path with the settings by keyword, and `threads` (None: as many as
        the runtime takes by itself). Its module imports nothing of this package, see `serve.py`.
      settings: what `open` is to know besides, as JSON holds it.
    """

    suffix: str
    rounding: Rounding
    dtype: np.dtype
    write: Callable[[Program, np.dtype | None, FileMetadata | None], bytes]
    listing: Callable[[Path], Listing]
    packages: tuple[str, ...]
    open: Callable[..., Session]
    settings: Callable[[], dict[str, Any]]

    def code_type(self, integer_io: IntegerIO) -> np.dtype | None:
        """Return the type of codes that go in and out; None: they are real values."""
        if isinstance(integer_io, str):
            return np.dtype(integer_io)
        return self.dtype if integer_io else None
