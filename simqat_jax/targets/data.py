"""Inputs of a model in files of NumPy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simqat_jax.integer.model import IntegerModel


def read_data(model: IntegerModel, paths: Sequence[Path]) -> list[np.ndarray]:
    """Return an array for each input of a model.

    Args:
      model: what takes them.
      paths: *.npy files, one for each input, in order; or one *.npz file with an array for each, by
        the inputs' names or in order (`np.savez(path, first, second)`).

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is no array of numbers; other arrays than the model's inputs.
    """
    names = [model.tensors[i].name for i in model.inputs]
    arrays: list[np.ndarray] = []
    for path in paths:
        loaded = _loaded(path)
        arrays += [loaded] if isinstance(loaded, np.ndarray) else _in_order(loaded, names, path)
    if len(arrays) != len(names):
        raise ValueError(
            f"the model takes {len(names)} inputs ({', '.join(names)}), and the data hold "
            f"{len(arrays)} arrays. Give one *.npy for each, in order, or one *.npz with all."
        )
    return arrays


def _loaded(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}.")
    try:
        loaded = np.load(path, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # of zipfile, NumPy and the system
        raise ValueError(f"{path} is no *.npy or *.npz file of numbers: {error}.") from error


def _in_order(loaded: dict[str, np.ndarray], names: Sequence[str], path: Path) -> list[np.ndarray]:
    if set(loaded) == set(names):
        return [loaded[name] for name in names]
    numbered = [f"arr_{k}" for k in range(len(loaded))]
    if len(loaded) == 1 or set(loaded) == set(numbered):
        return [loaded[name] for name in (numbered if len(loaded) > 1 else loaded)]
    raise ValueError(
        f"{path} holds {', '.join(loaded)}, and the model takes {', '.join(names)}. Name the "
        "arrays as the inputs are."
    )
