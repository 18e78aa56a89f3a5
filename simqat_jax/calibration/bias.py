"""Correct biases: quantization moves the means of a layer, and biases move them back."""

from typing import Any

import numpy as np
from flax.typing import VariableDict

from simqat_jax.calibration.batches import Batches
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.walk import Stop, Walk
from simqat_jax.ir.graph import BatchNorm, Product
from simqat_jax.ir.program import PyTree
from simqat_jax.training.module import Method, QuantizedModule


def correct_bias(
    qmodule: QuantizedModule,
    variables: VariableDict,
    batches: Batches,
    *,
    reference: VariableDict | None = None,
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> dict[str, Any]:
    """Move biases so that the mean of each channel is that of the float model.

    `bias -= mean(y_quantized) - mean(y_float)` of each output channel, before the activation
    function, one layer after the other: each with its predecessors corrected. The bias is that of
    the BatchNorm fused behind a layer or standing alone, else the layer's own. A layer without
    either stays, as does a bias that several layers share.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: calibrated ones.
      batches: yields the call's arguments, as in `calibrate`; all of them are held in memory.
      reference: the float model's variables; by default `variables`, of which the kernels must
        not have been rounded then.
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The variables, with other biases in `params`.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables, an array in the place of batches.
      ValueError: no batch, an empty one, ranges never observed, a call of training, a model
        without any bias.

    Examples:
      >>> qmodel, x = SimQAT().apply(nn.Dense(2)), jnp.linspace(-1, 2, 12).reshape(4, 3)
      >>> variables = calibrate(qmodel, nn.Dense(2).init(jax.random.key(0), x), [x], progress=False)
      >>> corrected = correct_bias(qmodel, variables, [x], progress=False)
      >>> error = qmodel.apply(corrected, x) - nn.Dense(2).apply({"params": variables["params"]}, x)
      >>> bool((abs(error.mean(axis=0)) < 0.01).all())
      True

    Source:
      Nagel et al., arXiv:1906.04721, section 4.2 and appendix D: empirical bias correction.
    """
    call = EvaluationCall(qmodule, method, kwargs)
    walk = Walk(call, variables, batches, reference, what="correct_bias", progress=progress)
    if not sum([move_bias(stop) for stop in walk]):
        raise ValueError(
            "correct_bias: no layer of this model has a bias of its own to correct. Leave the "
            "correction out, or give layers use_bias=True and train them."
        )
    return walk.variables()


def move_bias(stop: Stop) -> bool:
    """Correct the bias of a step; return whether it has one that can be."""
    node = stop.step.norm or stop.step.node
    if not isinstance(node, BatchNorm | Product) or node.layer is None:
        return False
    bias = node.layer.named(node.inputs[1:]).get("bias")
    if bias is None or not stop.is_free(bias):
        return False
    error = stop.moments().mean - stop.moments(real=True).mean
    old = np.asarray(stop.value(bias), np.float64)
    stop.set(bias, old - error.reshape(old.shape))
    return True
