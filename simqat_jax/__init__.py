"""Quantization-aware training of Flax (linen) models.

```python
qmodel = SimQAT(SimQATConfig()).apply(model)
variables = qmodel.init(key, x)
logits, updates = qmodel.apply(variables, x, mutable=["batch_stats", "quant_stats"])
print(qmodel.plan(variables, x))
```
"""

from importlib.metadata import version as _version

from simqat_jax.analysis.analyze import analyze
from simqat_jax.analysis.budgets import MaxBytes, MaxDrop, MinSqnr
from simqat_jax.analysis.measurement import Measurement
from simqat_jax.analysis.report import report
from simqat_jax.analysis.result import Analysis, LayerAnalysis, RangeAt, TensorAnalysis
from simqat_jax.analysis.suggest import Suggestion, suggest
from simqat_jax.calibration.batch_norm import reestimate_batch_norm
from simqat_jax.calibration.bias import correct_bias
from simqat_jax.calibration.calibrate import calibrate
from simqat_jax.calibration.equalize import equalize
from simqat_jax.calibration.post_training import post_training_quantize
from simqat_jax.calibration.rounding import round_adaptively
from simqat_jax.config import SimQATConfig
from simqat_jax.integer.convert import convert
from simqat_jax.integer.model import IntegerModel
from simqat_jax.numerics.affine import QuantParams
from simqat_jax.numerics.checked import (
    dequantize,
    fake_quant,
    fold_batch_norm,
    init_range,
    observe,
    observed,
    quant_params,
    quantize,
    update_range,
)
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.observers import RangeState
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.rules import Rule
from simqat_jax.targets import OpenFile
from simqat_jax.targets.metadata import FileMetadata, TensorMetadata
from simqat_jax.targets.onnx.target import export_onnx
from simqat_jax.targets.open_file import open_file
from simqat_jax.targets.overlays import write_overlays
from simqat_jax.targets.tflite.target import export_tflite
from simqat_jax.targets.verify import Verification, verify
from simqat_jax.training.damping import oscillation_damping
from simqat_jax.training.module import QuantizedModule
from simqat_jax.training.plan_table import Plan
from simqat_jax.training.ranges import nonfinite_ranges
from simqat_jax.training.simqat import (
    LearnedStepSizeQuantizationAwareTraining,
    SimQAT,
    SimulatedQuantizationAwareTraining,
)

__version__ = _version("simqat-jax")

__all__ = [
    "Analysis",
    "FileMetadata",
    "Grid",
    "IntegerModel",
    "LayerAnalysis",
    "LearnedStepSizeQuantizationAwareTraining",
    "MaxBytes",
    "MaxDrop",
    "Measurement",
    "MinSqnr",
    "OpenFile",
    "Plan",
    "QuantParams",
    "QuantSpec",
    "QuantizedModule",
    "RangeAt",
    "RangeState",
    "Rule",
    "SimQAT",
    "SimQATConfig",
    "SimulatedQuantizationAwareTraining",
    "Suggestion",
    "TensorAnalysis",
    "TensorMetadata",
    "Verification",
    "analyze",
    "calibrate",
    "convert",
    "correct_bias",
    "dequantize",
    "equalize",
    "export_onnx",
    "export_tflite",
    "fake_quant",
    "fold_batch_norm",
    "init_range",
    "nonfinite_ranges",
    "observe",
    "observed",
    "open_file",
    "oscillation_damping",
    "post_training_quantize",
    "quant_params",
    "quantize",
    "reestimate_batch_norm",
    "report",
    "round_adaptively",
    "suggest",
    "update_range",
    "verify",
    "write_overlays",
]
