"""How runtimes round sums and products of two tensors, one Rounding each."""

from typing import Literal

from simqat_jax.numerics.rounding.onnxruntime import ONNXRUNTIME
from simqat_jax.numerics.rounding.rounding import Norm, Product, Rounding, Sum
from simqat_jax.numerics.rounding.xnnpack import XNNPACK

Backend = Literal["tflite", "onnx"]
"""The name of a Rounding."""

ROUNDINGS: dict[str, Rounding] = {rounding.name: rounding for rounding in (XNNPACK, ONNXRUNTIME)}

__all__ = ["ROUNDINGS", "Backend", "Norm", "Product", "Rounding", "Sum"]
