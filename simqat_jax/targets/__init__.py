"""Files that other runtimes execute, written from an integer model: one Target each."""

from simqat_jax.targets.onnx.target import ONNX
from simqat_jax.targets.target import OpenFile, Target
from simqat_jax.targets.tflite.target import TFLITE

TARGETS: dict[str, Target] = {target.suffix: target for target in (ONNX, TFLITE)}
"""By the suffix of their files."""

__all__ = ["TARGETS", "OpenFile", "Target"]
