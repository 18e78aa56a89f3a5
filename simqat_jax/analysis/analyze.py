"""Analyze a quantized model: which tensor is clipped, which layer hurts."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from flax.typing import VariableDict

from simqat_jax.analysis.progress import Counter
from simqat_jax.analysis.result import Analysis, LayerAnalysis, RangeAt, TensorAnalysis
from simqat_jax.analysis.study import Alone, Compared, Study
from simqat_jax.calibration.batches import Batches, arguments
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.ir.plan import Placement
from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.arguments import check_flag, check_mapping, shown
from simqat_jax.training.module import Method, QuantizedModule
from simqat_jax.training.ranges import STEP, ranges_and_steps, restored


def analyze(
    qmodule: QuantizedModule,
    variables: VariableDict,
    batches: Batches,
    float_variables: VariableDict | None = None,
    *,
    history: Sequence[VariableDict] = (),
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> Analysis:
    """Tell which tensors and layers quantization hurts, and how much.

    Each quantized tensor is compared with the float model's: range, histogram, share of values
    clipped, SQNR. Each layer is quantized alone, and left float alone, and what that does to the
    model's outputs is its sensitivity: n layers are 2 n runs of one compiled program. But for rare
    roundings the codes are those of evaluation; a `quant_delay` counts as over.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: calibrated or trained ones.
      batches: yields the call's arguments, as in `calibrate`, without labels; they are held in
        memory. Some dozens of examples are enough.
      float_variables: those of the float model to compare with, where quantization changed
        parameters: by training, `correct_bias`, `round_adaptively`; by default `variables`. A
        layer that is left float has them, too.
      history: variables of several training steps, or their `quant_stats` alone, each in such a
        dictionary: the result tells how ranges moved.
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables, an array in the place of batches.
      ValueError: no batch, an empty one, NaN or Inf in the float model, ranges never observed,
        variables of another model, a call of training, outputs without a float.

    Examples:
      >>> qmodel, x = SimQAT().apply(nn.Dense(2)), jnp.linspace(-1, 2, 12).reshape(4, 3)
      >>> variables = calibrate(qmodel, nn.Dense(2).init(jax.random.key(0), x), [x], progress=False)
      >>> analysis = analyze(qmodel, variables, [x], progress=False)
      >>> analysis.sqnr > 30, analysis.tensors["input"].clipped
      (True, 0.0)
    """
    check_flag("progress", progress)
    call = EvaluationCall(qmodule, method, kwargs)
    data = [args for _, args in arguments(batches, "analyze", False)]
    study = Study(call, variables, float_variables, data)
    ranges = _ranges(study.stages.placement, history)
    line = Counter("analyze", study.batches * (1 + len(study.stages.layers.names)), progress)
    compared = study.compare(line.done)
    line.end()
    return Analysis(
        layers=_layers(study, compared),
        tensors=_tensors(study, compared),
        sqnr=compared.error.sqnr,
        examples=study.examples,
        ranges=ranges,
        study=study,
    )


def _layers(study: Study, compared: Compared) -> tuple[LayerAnalysis, ...]:
    layers = study.stages.layers
    own = {n: kernel.quantizer for kernel in study.kernels for n in kernel.steps}

    def one(layer: int, alone: Alone) -> LayerAnalysis:
        quantizer = next((own[n] for n in layers.steps_of(layer) if n in own), None)
        before, after = compared.error, alone.real
        return LayerAnalysis(
            name=layers.names[layer],
            kind=layers.kinds[layer],
            num_bits=quantizer and quantizer.spec.num_bits,
            alone_quantized=alone.quantized.sqnr,
            alone_float=after.sqnr,
            gain=0.0 if before.noise == after.noise else after.sqnr - before.sqnr,
        )

    found = [one(layer, alone) for layer, alone in enumerate(compared.layers)]
    return tuple(sorted(found, key=lambda layer: layer.alone_quantized))


def _tensors(study: Study, compared: Compared) -> dict[str, TensorAnalysis]:
    result = {}
    for name, quantizer in study.quantizers.items():
        measured = compared.tensors[name]
        total = int(measured.counts.sum())
        result[name] = TensorAnalysis(
            name=name,
            role=quantizer.role,
            spec=quantizer.spec,
            grid=measured.grid,
            lo=measured.values[0],
            hi=measured.values[1],
            below=int(measured.counts[0]) / total,
            above=int(measured.counts[-1]) / total,
            counts=tuple(map(int, measured.counts[1:-1])),
            sqnr=measured.error.sqnr,
        )
    return result


def _ranges(
    placement: Placement, history: Sequence[VariableDict]
) -> dict[str, tuple[RangeAt, ...]]:
    """Return what each range was in some states of training, in their order."""
    if isinstance(history, Mapping):
        raise TypeError(
            "history must be a list of variables, each of one training step, got "
            f"{shown(history)}. Pass history=[variables]."
        )
    found: dict[str, list[RangeAt]] = {name: [] for name in placement.stateful} if history else {}
    for variables in history:
        check_mapping("history", variables, "Pass a list of variables, each of one training step.")
        stats = restored(placement, *ranges_and_steps(variables))
        for name, quantizer in placement.stateful.items():
            if name not in stats:
                continue
            lo, hi = jax.device_get(quantizer.observer.range(stats[name]))
            lo, hi = float(np.min(lo)), float(np.max(hi))
            if lo <= hi:
                found[name].append(RangeAt(int(stats.get(STEP, 0)), lo, hi))
    return {name: tuple(points) for name, points in found.items()}
