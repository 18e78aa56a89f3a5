"""Quantize a trained float model without training, in one call."""

from typing import Any, Literal, get_args

import flax.linen as nn
from flax.typing import VariableDict

from simqat_jax.calibration.batches import Batches, check_batches
from simqat_jax.calibration.bias import move_bias
from simqat_jax.calibration.calibrate import calibrate
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.rounding import round_kernel
from simqat_jax.calibration.variables import floats
from simqat_jax.calibration.walk import Walk
from simqat_jax.config import SimQATConfig
from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.arguments import shown
from simqat_jax.training.module import Method, QuantizedModule
from simqat_jax.training.simqat import SimQAT

Recipe = Literal["fast", "accurate"]
"""How much is done: `fast` takes ranges and corrects biases, `accurate` rounds kernels besides."""


def post_training_quantize(
    model: nn.Module,
    variables: VariableDict,
    batches: Batches,
    *,
    config: SimQATConfig | None = None,
    recipe: Recipe = "fast",
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> tuple[QuantizedModule, dict[str, Any]]:
    """Quantize a trained float model without training.

    `fast`: `calibrate`, then `correct_bias`, as far as there are biases. `accurate` does what
    `round_adaptively` does as well, each layer before its bias: of use with fewer than 8 bits, or
    with one range per tensor for kernels.

    Args:
      model: the float model.
      variables: its trained variables.
      batches: yields the call's arguments: an array, or a tuple of several; they are held in
        memory. 100 to 1,000 examples of what the model will see are enough, without labels.
      config: what to quantize and how; by default `SimQATConfig()`.
      recipe: "fast" or "accurate".
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The quantized model and its variables: evaluate, `convert`, or train on with them.

    Raises:
      TypeError: what is no model, no dictionary of variables, an array in the place of batches.
      ValueError: an unknown recipe, no batch, an empty one, a call of training, a `quant_delay`.

    Examples:
      >>> model, x = nn.Dense(2), jnp.linspace(-1, 2, 12).reshape(4, 3)
      >>> variables = model.init(jax.random.key(0), x)
      >>> qmodel, quantized = post_training_quantize(model, variables, [x], progress=False)
      >>> convert(qmodel, quantized, x)(x).shape
      (4, 2)
    """
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipe must be 'fast' or 'accurate', got {shown(recipe)}.")
    qmodule = SimQAT(config).apply(model)
    _check_no_delay(qmodule.config)
    check_batches(batches)
    data = list(batches)
    given: dict[str, Any] = {"method": method, "progress": progress, **kwargs}
    calibrated = calibrate(qmodule, floats(variables), data, **given)
    call = EvaluationCall(qmodule, method, kwargs)
    walk = Walk(call, calibrated, data, what="post_training_quantize", progress=progress)
    for stop in walk:
        if recipe == "accurate":
            round_kernel(stop)
        move_bias(stop)
    return qmodule, walk.variables()


def _check_no_delay(config: SimQATConfig) -> None:
    """Raise ValueError if quantization waits for steps of training, of which there are none."""
    for owner in (config, *config.rules):
        for name in ("weight", "activation"):
            delay = getattr(getattr(owner, name), "quant_delay", 0)
            if delay:
                raise ValueError(
                    f"{type(owner).__name__}.{name} has a quant_delay of {delay} training steps, "
                    "and nothing is trained here. Use quant_delay=0."
                )
