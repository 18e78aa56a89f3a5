"""Convert a trained quantization-aware model to integers only."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.errors
import jax
from jax.core import Tracer

from simqat_jax.batch_size import BATCH, same_graphs, same_models, same_values
from simqat_jax.capture import Capture
from simqat_jax.config import SimQATConfig
from simqat_jax.graph import Graph
from simqat_jax.integer_model import IntegerModel
from simqat_jax.lowering import NOT_EVALUATION, Lowering
from simqat_jax.observers import as_range_state
from simqat_jax.planning import Placement, place_quantizers
from simqat_jax.qat import COLLECTION, QuantizedModule, check_numbers, check_observed


def convert(
    qmodule: QuantizedModule,
    variables: Mapping[str, Any],
    *args: Any,
    backend: str | None = None,
    method: Any = None,
    **kwargs: Any,
) -> IntegerModel:
    """Make the integer-only model of a trained quantization-aware model.

    Where all sample arrays have the same first length, that is the batch size, and the integer
    model takes any. Its codes are those of evaluation under `SimQATConfig.backend`; another
    `backend` rounds additions and products of tensors as that runtime does.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: its trained variables.
      args: a sample of the model's arguments, arrays or ShapeDtypeStructs.
      backend: "tflite" or "onnx"; by default `SimQATConfig.backend`.
      method: of the float model, by name or function; by default its `__call__`.
      kwargs: keyword arguments of the call in evaluation: `train=False`.
    Returns: an IntegerModel.
    Raises: TypeError: no QuantizedModule, or traced variables. ValueError: ranges never observed,
      variables of another model, weights that are not finite, a `quant_delay` that has not passed,
      per-channel activations, a layer without an integer form.
    Example:
      >>> qmodel = SimQAT().apply(nn.Dense(2))
      >>> x = jnp.linspace(-1, 1, 12).reshape(4, 3)
      >>> variables = qmodel.init(jax.random.key(0), x)
      >>> _, updates = qmodel.apply(variables, x, mutable=["quant_stats"])
      >>> model = convert(qmodel, variables | updates, x)
      >>> model(x[:1]).shape
      (1, 2)
    """
    if not isinstance(qmodule, QuantizedModule):
        raise TypeError(f"convert takes what SimQAT.apply returned, got {type(qmodule).__name__}.")
    if any(isinstance(v, Tracer) for v in jax.tree.leaves(variables)):
        raise TypeError("convert takes concrete variables: call it outside of jit.")
    config = (
        qmodule.config if backend is None else dataclasses.replace(qmodule.config, backend=backend)
    )
    if config.activation.per_channel:
        raise ValueError(
            "an integer layer cannot sum over channels of different scales: convert takes models "
            "with SimQATConfig(activation=QuantSpec(per_channel=False))."
        )
    call = _Call(qmodule, variables, args, method, kwargs)
    stats = variables.get(COLLECTION, {})
    programs: dict[Any, Any] = {}

    def lowered(captured: Capture, free_batch: bool) -> tuple[Lowering, IntegerModel]:
        placement = place_quantizers(captured.graph, config)
        if not free_batch:
            _check_ranges(placement, stats, config)
        lowering = Lowering(placement, config, stats, captured.inputs, programs, free_batch)
        return lowering, lowering.model(captured.restore)

    sample = call.captured(None)
    lowering, model = lowered(sample, free_batch=False)
    free = call.captured_with_free_batch(sample.graph)
    if free is None or call.size is None:
        return model
    free_lowering, free_model = lowered(free, free_batch=True)
    same = same_models(model, free_model, call.size) and same_values(
        lowering.float_constants, free_lowering.float_constants
    )
    return free_model if same else model


def _check_ranges(placement: Placement, stats: Mapping[str, Any], config: SimQATConfig) -> None:
    check_numbers(placement, stats)
    names = placement.stateful
    check_observed(
        placement,
        {name: as_range_state(stats[name]) for name in names if name in stats},
        [name for name in names if name not in stats],
    )
    delay = max(config.weight.quant_delay, config.activation.quant_delay)
    if int(stats["step"]) < delay:
        raise ValueError(
            f"the model has trained for {int(stats['step'])} steps and quantizes from step {delay} "
            "on (quant_delay): what it computes by now is not quantized. Train on, or lower the "
            "delay."
        )


class _Call:
    """A call of a quantized module, to be captured with one batch size or another."""

    def __init__(
        self,
        qmodule: QuantizedModule,
        variables: Mapping[str, Any],
        args: tuple,
        method: Any,
        kwargs: Mapping[str, Any],
    ):
        self.qmodule = qmodule
        self.variables = variables
        self.method = method
        self.kwargs = kwargs
        self.args = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "dtype") else x, args
        )
        if any(hasattr(x, "dtype") for x in jax.tree.leaves(dict(kwargs))):
            raise ValueError("convert takes arrays as positional arguments, not by keyword.")
        arrays = [x for x in jax.tree.leaves(self.args) if hasattr(x, "dtype")]
        lengths = {x.shape[0] if x.shape else None for x in arrays}
        self.size = lengths.pop() if len(lengths) == 1 else None

    def captured(self, batch: int | None) -> Capture:
        def resized(x: Any) -> Any:
            if batch is None or not hasattr(x, "dtype"):
                return x
            return jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)

        args = jax.tree.map(resized, self.args)
        try:
            return self.qmodule._trace(self.variables, self.method, args, self.kwargs, {}, None)
        except flax.errors.InvalidRngError as error:
            raise ValueError(NOT_EVALUATION.format(path="the model")) from error

    def captured_with_free_batch(self, sample: Graph) -> Capture | None:
        """Capture with `BATCH` for the batch size; None where the model holds on to its own."""
        if self.size is None:
            return None
        try:
            free = self.captured(BATCH)
        except Exception:  # whatever a model raises for a batch size that it does not take
            return None
        return free if same_graphs(sample, free.graph, self.size) else None
