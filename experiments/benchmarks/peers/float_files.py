"""Write a float network as ONNX and TFLite files, by converters of others.

`experiments.benchmarks.deploy` runs it with the Python of `make peers`.

Source:
  jax2onnx (Apache-2.0) and litert-converter (Apache-2.0), of which this uses the public functions.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax2onnx  # pyright: ignore[reportMissingImports]
import onnx
from flax import serialization
from jax import export
from litert_converter import converter_api_ext  # pyright: ignore[reportMissingImports]
from litert_converter.mlir import ir, passmanager  # pyright: ignore[reportMissingImports]

from experiments.benchmarks.workloads import WORKLOADS

Function = Callable[[jax.Array], jax.Array]


def write_onnx(function: Function, image: tuple[int, ...], path: Path) -> None:
    """Write a function of images of (N, H, W, C) for any N."""
    onnx.save(jax2onnx.to_onnx(function, [("B", *image)]), str(path))


def write_tflite(function: Function, shape: tuple[int, ...], path: Path) -> None:
    """Write a function of images of one shape."""
    images = jax.ShapeDtypeStruct(shape, "float32")
    text = export.export(jax.jit(function))(images).mlir_module()
    context = ir.Context()
    converter_api_ext.prepare_mlir_context(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        main = next(f for f in module.body.operations if "main" in str(f.attributes["sym_name"]))
        converter_api_ext.set_signature(main, "serving_default", ["input"], ["output"])
        config = converter_api_ext.ConvertToTFLConfig()
        converter_api_ext.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
        converter_api_ext.export_flatbuffer_to_file(module.operation, str(path))


def main(name: str, variables: Path, folder: Path) -> None:
    """Write `float.onnx` for any number of images, and `float.tflite` for the first batch size.

    Args:
      name: of the workload.
      variables: a file of Flax's serialization.
      folder: where to.
    """
    workload = WORKLOADS[name]
    values: Any = serialization.msgpack_restore(variables.read_bytes())
    model = workload.model()

    def network(images: jax.Array) -> Any:
        return model.apply(values, images, train=False)

    write_onnx(network, workload.image, folder / "float.onnx")
    write_tflite(network, (workload.batches[0], *workload.image), folder / "float.tflite")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
