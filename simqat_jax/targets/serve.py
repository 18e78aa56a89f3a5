"""A process that runs one file: what it reads, what it answers, and its main function.

It is started by the path of this file. Neither this file nor a target's `runtime.py` imports
anything of the package, which would import JAX: the process is there in a fifth of a second.
"""

import json
import os
import runpy
import struct
import sys
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

_LENGTH = struct.Struct("<Q")


def send(stream: IO[bytes], message: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write a message, what JSON holds, and arrays behind it."""
    kinds = [(array.dtype.str, array.shape) for array in arrays]
    text = json.dumps(message | {"arrays": kinds}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        stream.write(array.tobytes())
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Read what `send` wrote.

    Raises:
      EOFError: the other process has ended.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    message = json.loads(_exactly(stream, length))
    kinds = [(np.dtype(dtype), tuple(shape)) for dtype, shape in message.pop("arrays")]
    return message, [_array(stream, dtype, shape) for dtype, shape in kinds]


def _array(stream: IO[bytes], dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, dtype)
    array[...] = np.frombuffer(_exactly(stream, array.nbytes), dtype).reshape(shape)
    return array


def _exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def main() -> None:
    """Open a file as the arguments say; answer with its outputs until there are no more inputs."""
    runtime, function, path, settings = sys.argv[1:]
    inputs, outputs = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer
    try:
        name, input_types, run = runpy.run_path(runtime)[function](path, **json.loads(settings))
        send(outputs, {"name": name, "input_types": input_types})
        while True:
            _, arrays = receive(inputs)
            send(outputs, {}, run(arrays))
    except EOFError:
        pass
    except Exception as error:  # of a runtime, which has classes of its own
        send(outputs, {"error": " ".join(str(error).split()) or type(error).__name__})


if __name__ == "__main__":
    main()
