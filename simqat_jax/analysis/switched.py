"""Run a call in which the quantization of each layer is switched on or off by a traced value."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from simqat_jax.analysis.layers import Layers
from simqat_jax.ir.graph import Product
from simqat_jax.ir.plan import Placement, Quantizer, Slot, Step
from simqat_jax.numerics.folding import scaled_kernel
from simqat_jax.training.evaluation import Evaluation
from simqat_jax.training.ranges import Stats
from simqat_jax.training.values import Seen, Value, Values, read


class Version(NamedTuple):
    """A model between the float one and the quantized one: what a run of the call takes.

    Attributes:
      leaves: the variables.
      kernels: what each step with a kernel multiplies by, folded if it folds; by the step's place.
      on: of each layer, whether its results and constants are rounded to their grids, bool, (n,).
    """

    leaves: tuple[jax.Array, ...]
    kernels: Mapping[int, jax.Array]
    on: jax.Array

    def with_layer_of(self, other: "Version", layer: int, layers: Layers) -> "Version":
        """Return this version with one layer, its variables included, as another version has it."""
        owned = zip(self.leaves, other.leaves, layers.leaves, strict=True)
        taken = {n: other.kernels[n] for n in layers.steps_of(layer) if n in self.kernels}
        return Version(
            leaves=tuple(new if owner == layer else old for old, new, owner in owned),
            kernels={**self.kernels, **taken},
            on=self.on.at[layer].set(other.on[layer]),
        )


class Switched(Evaluation):
    """Evaluation by fake quantization, each layer on or off; kernels are given.

    Codes of results are rounded from real values: but for rare roundings those of integers.

    Attributes:
      kernels: what the steps that have run would multiply by if none were given, in float.
      unrounded: the values of quantized tensors before they were rounded.
    """

    def __init__(self, placement: Placement, stats: Stats, layers: Layers, version: Version):
        super().__init__(placement, stats)
        self.layers = layers
        self.version = version
        self.kernels: dict[int, jax.Array] = {}
        self.unrounded: dict[int, jax.Array] = {}
        self._numbers = {step.node: number for number, step in enumerate(placement.steps)}

    def put_inputs(self, env: Values) -> None:
        """Put the call's inputs on their grids."""
        for v, layer in self.layers.inputs.items():
            env[v] = Value(self.rounded(v, env[v].real, self.version.on[layer]))

    def step(self, step: Step, env: Values, seen: Seen) -> None:
        on = self.is_on(step)
        results, _ = self.simulate(step, self.operands(step, env, seen), env, seen)
        for v, x in results.items():
            env[v] = Value(self.rounded(v, x, on) if v in self.placement.at else x)

    def operands(self, step: Step, env: Values, seen: Seen) -> list[Value]:
        del seen
        values = []
        for position, v in enumerate(step.node.inputs):
            x = read(v, env).real
            quantizer = self.placement.constants.get(Slot(step, position))
            if quantizer is not None:
                x = self.switched(quantizer, jnp.asarray(x), self.is_on(step))
            values.append(Value(x))
        return values

    def is_on(self, step: Step) -> jax.Array:
        """Whether a step's layer is quantized; of a step without a layer it does not matter."""
        layer = self.layers.steps[self._numbers[step.node]]
        return self.version.on[layer or 0]

    def rounded(self, v: int, x: jax.Array, on: jax.Array) -> jax.Array:
        """Round a tensor to its grid where its layer is on."""
        self.unrounded[v] = x
        return self.switched(self.placement.at[v], x, on)

    def switched(self, quantizer: Quantizer, x: jax.Array, on: jax.Array) -> jax.Array:
        """Round values to a grid where `on`."""
        ends = self.range(quantizer, x)
        return jnp.where(on, self.fake_quantized(quantizer, x, *ends), x)

    def quantized_kernel(
        self, node: Product, kernel: jax.Array, factor: jax.Array | None, seen: Seen
    ) -> jax.Array:
        del seen
        number, kernel = self._numbers[node], scaled_kernel(kernel, factor)
        self.kernels[number] = kernel
        return self.version.kernels.get(number, kernel).astype(kernel.dtype)
