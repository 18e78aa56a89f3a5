"""Read tensors from an archive of torch with NumPy alone: the format from before torch 1.6.

The file holds five pickles: a magic number, the version, the sizes of types, the tensors by their
names, and the keys of the storages. Behind them each storage follows: the number of its elements,
int64, and the elements. A tensor says which elements of which storage it holds.

A pickle can call whatever Python can. This reader admits the four names that float32 weights and
counters need, and refuses a file with any other before anything is called.
"""

import collections
import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from experiments.errors import ExperimentError

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Elements of one type in the file, under a key."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Part of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, contents: Mapping[str, bytes]) -> np.ndarray:
        """Return the values, read-only; NumPy checks that they lie inside the storage."""
        dtype = self.storage.dtype
        strides = [stride * dtype.itemsize for stride in self.strides]
        buffer = contents[self.storage.key]
        return np.ndarray(self.shape, dtype, buffer, self.offset * dtype.itemsize, strides)


class _ClosedUnpickler(pickle.Unpickler):
    """Makes numbers, strings, tuples, lists, dictionaries and tensors."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        match module_name, global_name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda storage, offset, shape, strides, *_: _Tensor(
                    storage, offset, shape, strides
                )
            case "torch", "FloatStorage":
                return np.dtype("<f4")
            case "torch", "LongStorage":
                return np.dtype("<i8")
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError("it has storages that are parts of others")
        return _Storage(key, dtype, size)


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by their names, float32 or int64, read-only.

    Args:
      path: of a file that `torch.save` wrote in its format from before torch 1.6.

    Raises:
      ExperimentError: the file cannot be read, is of another format, is cut short, or asks for more
        than the tensors of a state dict.
    """
    try:
        with path.open("rb") as file:
            return _read(file)
    except Exception as error:  # What a damaged pickle raises can be anything.
        raise ExperimentError(
            f"cannot read {path} as weights that torch.save wrote before torch 1.6: "
            f"{str(error) or type(error).__name__}. Install the package that it is from again."
        ) from error


def _read(file: BinaryIO) -> dict[str, np.ndarray]:
    if _ClosedUnpickler(file).load() != _MAGIC or _ClosedUnpickler(file).load() != _VERSION:
        raise ValueError("it does not start with the magic number and the version")
    if not _ClosedUnpickler(file).load()["little_endian"]:
        raise ValueError("it is big-endian")
    tensors = _ClosedUnpickler(file).load()
    if not all(isinstance(tensor, _Tensor) for tensor in tensors.values()):
        raise ValueError("it holds other things than tensors")
    keys = _ClosedUnpickler(file).load()
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    contents = {key: _elements(file, storages[key]) for key in keys}
    return {name: tensor.array(contents) for name, tensor in tensors.items()}


def _elements(file: BinaryIO, storage: _Storage) -> bytes:
    size = int.from_bytes(file.read(8), "little")
    if size != storage.size:
        raise ValueError(f"storage {storage.key} has {size} elements, not {storage.size}")
    wanted = size * storage.dtype.itemsize
    content = file.read(wanted)
    if len(content) != wanted:
        raise ValueError(f"storage {storage.key} ends after {len(content)} of {wanted} bytes")
    return content
