"""Training: observe ranges, and simulate quantization with them."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir.compound import LogSoftmax
from simqat_jax.ir.graph import Extremum
from simqat_jax.ir.plan import Placement, Quantizer, Step
from simqat_jax.numerics.observers import Learned, Observer, Range, State
from simqat_jax.numerics.requantize import FREE, Bounds
from simqat_jax.ops.operation import bounds_of
from simqat_jax.training.ranges import Stats
from simqat_jax.training.values import Observation, Run, Seen, Value, Values

_NO_BOUND = {"max": -math.inf, "min": math.inf}
"""By operation the infinity that takes no value's place."""


class Simulation(Run):
    """A training step: `seen` collects what it observes."""

    def __init__(self, placement: Placement, stats: Stats):
        super().__init__(placement, stats)
        self.shared = placement.shared

    def step(self, step: Step, env: Values, seen: Seen) -> None:
        operands = self.operands(step, env, seen)
        results, unclamped = self.simulate(step, operands, env, seen)
        for v, x in results.items():
            quantizer = self.placement.at.get(v)
            if quantizer is None:
                env[v] = Value(x)
            elif v == step.output and step.clamp is not None:
                env[v] = self.observed(quantizer, x, seen, unclamped, bounds_of(step))
            elif isinstance(step.node, LogSoftmax) and step.node.masked:
                # What is masked is the lowest code of any range; every range holds zero.
                kept = jnp.where(operands[1].real == step.node.keeps, x, 0)
                env[v] = self.observed(quantizer, x, seen, kept, FREE)
            else:
                env[v] = self.put_on_grid(quantizer, x, seen)

    def put_on_grid(self, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        return self.observed(quantizer, x, seen, x, FREE)

    def constant(self, step: Step, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        bound = _NO_BOUND.get(step.node.primitive) if isinstance(step.node, Extremum) else None
        if bound is None:
            return super().constant(step, quantizer, x, seen)
        # What bounds nothing is the first or last code of any range; every range holds zero.
        return self.observed(quantizer, x, seen, jnp.where(x == bound, 0, x), FREE)

    def observed(
        self, quantizer: Quantizer, x: jax.Array, seen: Seen, unclamped: jax.Array, bounds: Bounds
    ) -> Value:
        """Observe and fake-quantize a tensor, which is `unclamped` clamped to `bounds`."""
        if x.size == 0:
            raise ValueError(
                f"{quantizer.name}: an empty tensor of shape {x.shape} has no range. Train "
                "with at least one example in a batch."
            )
        lo, hi = self.observe(quantizer, unclamped, seen, bounds)
        # A clamp keeps what it clamps for its own gradient.
        rounded = self.fake_quantized(quantizer, x, lo, hi, kept=bounds != FREE)
        return Value(self.after_delay(quantizer.spec.quant_delay, rounded, x))

    def fake_quantized(
        self,
        quantizer: Quantizer,
        x: jax.Array,
        lo: ArrayLike,
        hi: ArrayLike,
        *,
        kept: bool = False,
    ) -> jax.Array:
        rounded = super().fake_quantized(quantizer, x, lo, hi, kept=kept)
        observer = quantizer.observer
        if not isinstance(observer, Learned):
            return rounded
        return observer.with_step_gradient(rounded, x, self.stats[quantizer.name])

    def observe(
        self, quantizer: Quantizer, x: jax.Array, seen: Seen, bounds: Bounds = FREE
    ) -> Range:
        """Take a tensor into its range, and return the range that it trains on."""
        observer, name = quantizer.observer, quantizer.name
        values = lax.stop_gradient(x)
        if not quantizer.has_state:
            return _present_range(observer, values)
        measured = _measured(observer, values, bounds)
        if self.placement.axis_name is not None:
            measured = observer.reduce(measured, self.placement.axis_name)
        if name in seen:  # tensors that share a range widen each other's
            measured = observer.merge(measured, seen[name].measured)
        state = _updated(observer, self.stats[name], measured)
        seen[name] = Observation(measured, state)
        before = self.stats[name] if name in self.shared else None
        return observer.training_range(state, before)

    def kernel_range(self, quantizer: Quantizer, flat: jax.Array, seen: Seen) -> Range:
        return self.observe(quantizer, flat, seen)


# Traced once for all quantizers that are alike: a model may have hundreds.


@partial(jax.jit, static_argnums=0)
def _present_range(observer: Observer, x: jax.Array) -> Range:
    return observer.present_range(x)


@partial(jax.jit, static_argnums=(0, 2))
def _measured(observer: Observer, x: jax.Array, bounds: Bounds) -> Any:
    return observer.measure(x, bounds)


@partial(jax.jit, static_argnums=0)
def _updated(observer: Observer, state: State, measured: Any) -> State:
    return observer.update(state, measured)
