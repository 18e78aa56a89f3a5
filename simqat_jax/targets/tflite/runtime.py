"""Open TFLite files in LiteRT. Imports nothing of the package, see `targets/serve.py`."""

from collections.abc import Callable, Sequence

import numpy as np


def open_tflite(
    path: str, threads: int | None
) -> tuple[str, list[str], Callable[[Sequence[np.ndarray]], list[np.ndarray]]]:
    """Open a file on the CPU, see Target.open."""
    import ai_edge_litert
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
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

    name = f"LiteRT {getattr(ai_edge_litert, '__version__', '')}".rstrip()
    return name, [np.dtype(detail["dtype"]).name for detail in inputs], run
