"""Open ONNX files in ONNX Runtime."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simqat_jax.files import import_extra
from simqat_jax.targets.target import OpenFile


def open_onnx(path: Path, threads: int | None) -> OpenFile:
    """Open a file on the CPU, see Target.open."""
    runtime = import_extra("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    if onnxruntime_saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()

    def run(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        return session.run(None, {i.name: a for i, a in zip(inputs, arrays, strict=True)})

    return OpenFile(
        name=f"ONNX Runtime {runtime.__version__}",
        run=run,
        float_inputs=[i.type == "tensor(float)" for i in inputs],
        offset=lambda grid: grid.unsigned_offset,
        dtype=np.dtype(np.uint8),
    )


@functools.cache
def onnxruntime_saturates() -> bool:
    """Tell whether ONNX Runtime's sums of uint8 * int8 saturate on this processor.

    On x86 without VNNI instructions it adds pairs of products in 16 bits. The session option
    `session.x64quantprecision` makes it exact there; with VNNI it would be less than half as fast.

    Raises:
      ImportError: the extra `export` is missing.
    """
    onnx, runtime = import_extra("onnx"), import_extra("onnxruntime")
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
