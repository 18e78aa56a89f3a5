"""Renew the statistics of BatchNorm for the quantized model."""

from typing import Any

import numpy as np
from flax.typing import VariableDict

from simqat_jax.calibration.batches import Batches
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.walk import Stop, Walk
from simqat_jax.ir.graph import BatchNorm
from simqat_jax.ir.program import PyTree
from simqat_jax.training.module import Method, QuantizedModule


def reestimate_batch_norm(
    qmodule: QuantizedModule,
    variables: VariableDict,
    batches: Batches,
    *,
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> dict[str, Any]:
    """Take BatchNorm's statistics from data, as the quantized model computes them.

    After training with few bits, running statistics lag behind weights that jump between codes.
    Mean and variance become those of all data, one BatchNorm after the other: each with its
    predecessors renewed. They are computed from what the BatchNorm returns, so that a channel with
    scale 0 keeps its own; so does a BatchNorm whose statistics are not its alone, or masked.

    Renewed variances rescale folded kernels. Ranges of kernels that `quant_stats` holds (an
    observer other than `batch`) have to be taken again: by `calibrate`, without them.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: trained or calibrated ones.
      batches: yields the call's arguments, as in `calibrate`; all of them are held in memory.
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The variables, with other `batch_stats`.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables, an array in the place of batches.
      ValueError: no batch, an empty one, ranges never observed, a call of training, a model
        without BatchNorm.

    Source:
      Nagel et al., arXiv:2203.11086: re-estimation of BatchNorm's statistics after training.
    """
    call = EvaluationCall(qmodule, method, kwargs)
    walk = Walk(call, variables, batches, what="reestimate_batch_norm", progress=progress)
    if not sum([_renew(stop) for stop in walk]):
        raise ValueError(
            "reestimate_batch_norm: this model has no BatchNorm with statistics of its own. Leave "
            "the call out: without running statistics there is nothing to renew."
        )
    return walk.variables()


def _renew(stop: Stop) -> bool:
    """Renew the statistics of a step's BatchNorm; return whether it has one that can be."""
    norm = stop.step.norm or stop.step.node
    if not isinstance(norm, BatchNorm):
        return False
    operands = norm.layer.named(norm.inputs[1:])
    own = all(stop.is_free(operands[name]) for name in ("mean", "var"))
    if not own or "mask" in operands:
        return False
    values = {n: np.asarray(stop.value(v), np.float64).reshape(-1) for n, v in operands.items()}
    # y = slope (u - mean) + beta, so that u has the mean and variance
    sigma = np.sqrt(values["var"] + norm.module.epsilon)
    slope = values.get("scale", np.ones_like(sigma)) / sigma
    beta = values.get("bias", np.zeros_like(sigma))
    alive, safe, result = slope != 0, np.where(slope == 0, 1, slope), stop.moments()
    mean = values["mean"] + (result.mean - beta) / safe
    stop.set(operands["mean"], np.where(alive, mean, values["mean"]))
    stop.set(operands["var"], np.where(alive, result.var / safe**2, values["var"]))
    return True
