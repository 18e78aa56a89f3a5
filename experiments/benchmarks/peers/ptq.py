"""Quantize a float network without training by tools of others: what they make of the same photos.

`experiments.benchmarks.ptq` runs it with the Python of `make peers`.

Source:
  AI Edge Quantizer (Apache-2.0, its recipe `static_wi8_ai8`) and qwix (Apache-2.0, its provider for
  on-device models), of which this uses the public functions.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import qwix  # pyright: ignore[reportMissingImports]
from ai_edge_litert.interpreter import Interpreter
from ai_edge_quantizer import quantizer, recipe  # pyright: ignore[reportMissingImports]
from flax import serialization

from experiments.benchmarks.peers.float_files import write_tflite
from experiments.models import EfficientNetLite0, LeNet5

_MODELS: dict[str, type[nn.Module]] = {"lenet5": LeNet5, "lite0": EfficientNetLite0}


def ai_edge(
    module: nn.Module, variables: Any, chosen: np.ndarray, x: np.ndarray, folder: Path
) -> np.ndarray:
    """Return the logits of its int8 file, in LiteRT, one at a time."""
    path = folder / "peer_float.tflite"
    network: Any = functools.partial(module.apply, variables)
    write_tflite(network, (1, *x.shape[1:]), path)
    tool = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
    data = {"serving_default": [{"input": image[None]} for image in chosen]}
    quantized = tool.quantize(tool.calibrate(data)).quantized_model
    interpreter = Interpreter(model_content=bytes(quantized), num_threads=2)
    run: Any = interpreter.get_signature_runner("serving_default")
    scale, zero_point = run.get_input_details()["input"]["quantization"]
    codes = np.clip(np.rint(x / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
    logits = np.concatenate([run(input=image[None])["output"] for image in codes])
    scale, zero_point = run.get_output_details()["output"]["quantization"]
    return np.float32(scale) * (logits.astype(np.float32) - zero_point)


def qwix_odml(
    module: nn.Module, variables: Any, chosen: np.ndarray, x: np.ndarray, folder: Path
) -> np.ndarray:
    """Return the logits of its simulation of an int8 file, ranges averaged over batches of 32."""
    del folder
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    model: Any = qwix.quantize_model(module, qwix.OdmlQatProvider([rule]))

    @jax.jit
    def observe(variables: Any, images: jax.Array) -> Any:
        _, changed = model.apply(variables, images, mutable=["quant_stats"])
        return {**variables, **changed}

    for i in range(0, len(chosen), 32):
        variables = observe(variables, chosen[i : i + 32])
    run = jax.jit(model.apply)
    return np.concatenate([run(variables, x[i : i + 32]) for i in range(0, len(x), 32)])


def main(name: str, folder: Path) -> None:
    """Write the logits of each tool.

    Args:
      name: of the network.
      folder: holds `variables.msgpack`, and `images.npz` with `chosen`, to calibrate on, and `x`;
        `TOOL.npy` are written there.
    """
    variables: Any = serialization.msgpack_restore((folder / "variables.msgpack").read_bytes())
    images = np.load(folder / "images.npz")
    for tool, quantized in {"AI Edge Quantizer": ai_edge, "qwix, ODML": qwix_odml}.items():
        logits = quantized(_MODELS[name](), variables, images["chosen"], images["x"], folder)
        np.save(folder / f"{tool}.npy", logits)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
