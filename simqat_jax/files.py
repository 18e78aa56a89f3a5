"""Files that appear whole or not at all, and packages that only some users have."""

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, Literal

Extra = Literal["export", "report", "cli"]
"""What `pip install 'simqat-jax[...]'` takes."""
EXPORTED = {".onnx": "export_onnx", ".tflite": "export_tflite"}
"""Suffixes of the files that other runtimes read, and the function that writes such files."""
_NEEDING: dict[Extra, str] = {
    "export": "exporting",
    "report": "drawing",
    "cli": "the command simqat",
}


def as_path(path: str | os.PathLike[str]) -> Path:
    """Return a path.

    Raises:
      TypeError: it is none.
    """
    try:
        return Path(path)
    except TypeError as error:
        raise TypeError(
            f"path must be the name of a file, a string or a pathlib.Path, got {_shown(path)}."
        ) from error


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], suffix: str | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only once it is whole.

    It is written under a name that nobody else has, also in another thread or process, and beside
    its target, so that the renaming is one step.

    Args:
      path: of the file; one that exists is replaced.
      suffix: of `EXPORTED`, where the file is to be such a one. Any other name will do as well, but
        those of the other kind: runtimes and `open_file` take files for what their names say.

    Raises:
      TypeError: `path` is none.
      ValueError: the suffix of `path` is that of another kind of file.
      FileNotFoundError: there is no directory to write it to.
      IsADirectoryError: `path` is a directory.
      OSError: the directory cannot be written.
    """
    target = as_path(path)
    named = target.suffix.lower()
    if named != suffix and named in EXPORTED:
        other = "" if suffix is None else f", such as {target.with_suffix(suffix)}"
        raise ValueError(
            f"{target} is not what this writes: {EXPORTED[named]} writes *{named}. Call that, or "
            f"give another name{other}."
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no directory {target.parent} to write {target.name} to.")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory. Give the name of a file.")
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def import_extra(name: str, extra: Extra = "export") -> ModuleType:
    """Import a package of an extra, such as `export`.

    Raises:
      ImportError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{_NEEDING[extra]} needs {name}, of the extra {extra!r}: "
            f"pip install 'simqat-jax[{extra}]'."
        ) from error
