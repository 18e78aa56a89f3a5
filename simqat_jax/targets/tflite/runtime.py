"""Open TFLite files in LiteRT."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simqat_jax.files import import_extra
from simqat_jax.targets.target import OpenFile


def open_tflite(path: Path, threads: int | None) -> OpenFile:
    """Open a file on the CPU, see Target.open."""
    package = import_extra("ai_edge_litert")
    make = import_extra("ai_edge_litert.interpreter").Interpreter
    interpreter = make(str(path), num_threads=threads)
    # Numbered as the model's are: the interpreter's own order is that of the file.
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    allocated: list[tuple[int, ...]] = []

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        shapes = [a.shape for a in arrays]
        if shapes != allocated:
            for detail, shape in zip(inputs, shapes, strict=True):
                interpreter.resize_tensor_input(detail["index"], shape)
            interpreter.allocate_tensors()
            allocated[:] = shapes
        for detail, array in zip(inputs, arrays, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        return [interpreter.get_tensor(detail["index"]) for detail in outputs]

    return OpenFile(
        name=f"LiteRT {getattr(package, '__version__', '')}".rstrip(),
        run=run,
        float_inputs=[detail["dtype"] == np.float32 for detail in inputs],
        offset=lambda grid: grid.signed_offset,
        dtype=np.dtype(np.int8),
    )
