"""Open ONNX files in ONNX Runtime. Imports nothing of the package, see `targets/serve.py`."""

import functools
from collections.abc import Callable, Sequence

import numpy as np


def open_onnx(
    path: str, threads: int | None, exact_sums: bool
) -> tuple[str, list[str], Callable[[Sequence[np.ndarray]], list[np.ndarray]]]:
    """Open a file on the CPU, see Target.open.

    Args:
      path: of the file.
      threads: how many to run on; None: as many as the runtime takes by itself.
      exact_sums: set the option that sums exactly where sums saturate.
    """
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if exact_sums:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        results = session.run(None, {i.name: a for i, a in zip(inputs, arrays, strict=True)})
        return [np.asarray(result) for result in results]

    name = f"ONNX Runtime {runtime.__version__}"
    return name, [_type(str(i.type)) for i in inputs], run


def _type(text: str) -> str:
    """Return a type as NumPy names it, of "tensor(uint8)" or "tensor(float)"."""
    name = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(name, name)


@functools.cache
def onnxruntime_saturates() -> bool:
    """Tell whether ONNX Runtime's sums of uint8 * int8 saturate on this processor.

    On x86 without VNNI instructions it adds pairs of products in 16 bits. The session option
    `session.x64quantprecision` makes it exact there; with VNNI it would be less than half as fast.
    """
    import onnx
    import onnxruntime as runtime

    make, kinds, length = onnx.helper, onnx.TensorProto, 64
    weights = onnx.numpy_helper.from_array(np.full((length, length), 127, np.int8), "w")
    ends = [
        make.make_tensor_value_info(name, kind, [1, length])
        for name, kind in (("x", kinds.UINT8), ("y", kinds.INT32))
    ]
    node = make.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = make.make_graph([node], "sums", ends[:1], ends[1:], [weights])
    opsets = [make.make_opsetid("", 19)]
    file = make.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (sums,) = session.run(None, {"x": np.full((1, length), 255, np.uint8)})
    return bool(np.any(sums != length * 255 * 127))
