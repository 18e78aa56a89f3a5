"""Quantization-aware training of Flax (linen) models.

```python
qmodel = SimQAT(SimQATConfig()).apply(model)
variables = qmodel.init(key, x)
logits, updates = qmodel.apply(variables, x, mutable=["batch_stats", "quant_stats"])
print(qmodel.plan(variables, x))
```
"""

from importlib.metadata import version as _version

from simqat_jax.config import QuantSpec, SimQATConfig
from simqat_jax.conversion import convert
from simqat_jax.export.onnx import export_onnx
from simqat_jax.export.tflite import export_tflite
from simqat_jax.folding import fold_batch_norm
from simqat_jax.integer_model import IntegerModel
from simqat_jax.integer_operations import Grid
from simqat_jax.numerics import QuantParams, dequantize, fake_quant, quant_params, quantize
from simqat_jax.observers import RangeState, init_range, observe, observed, update_range
from simqat_jax.qat import (
    QuantizedModule,
    SimQAT,
    SimulatedQuantizationAwareTraining,
    nonfinite_ranges,
)
from simqat_jax.report import Plan
from simqat_jax.verification import OpenFile, Verification, open_file, verify

__version__ = _version("simqat-jax")

__all__ = [
    "Grid",
    "IntegerModel",
    "OpenFile",
    "Plan",
    "QuantParams",
    "QuantSpec",
    "QuantizedModule",
    "RangeState",
    "SimQAT",
    "SimQATConfig",
    "SimulatedQuantizationAwareTraining",
    "Verification",
    "convert",
    "dequantize",
    "export_onnx",
    "export_tflite",
    "fake_quant",
    "fold_batch_norm",
    "init_range",
    "nonfinite_ranges",
    "observe",
    "observed",
    "open_file",
    "quant_params",
    "quantize",
    "update_range",
    "verify",
]
