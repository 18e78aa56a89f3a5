"""Evaluation: the codes that an integer implementation computes, with a gradient."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir import replay
from simqat_jax.ir.compound import Masked
from simqat_jax.ir.graph import BatchNorm, Dropout, Node, Operand, Product
from simqat_jax.ir.plan import Quantizer, Slot, Step
from simqat_jax.numerics.affine import fake_quant, straight_through
from simqat_jax.numerics.folding import magnitudes
from simqat_jax.numerics.grid import (
    Codes,
    Grid,
    KernelCodes,
    centered_codes,
    codes_fit,
    grid_of_range,
    real_values,
)
from simqat_jax.numerics.observers import Range
from simqat_jax.numerics.observers.extremes import has_nan
from simqat_jax.ops.operation import Everywhere, ExactStep
from simqat_jax.ops.products import kernel_codes
from simqat_jax.ops.registry import operation_of
from simqat_jax.training.values import Run, Seen, Value, Values, read, scaled_range


class Evaluation(Run):
    """A call that uses the ranges as they are."""

    def step(self, step: Step, env: Values, seen: Seen) -> None:
        operands = self.operands(step, env, seen)
        results, _ = self.simulate(step, operands, env, seen)
        for v, x in results.items():
            quantizer = self.placement.at.get(v)
            if quantizer is None:
                env[v] = self.moved(step, v, x, operands)
            else:
                env[v] = self.exact(step, quantizer, x, operands, env)

    def results(self, env: Values, stored: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the values of outputs and of what is stored; NaN where the model is not sound."""
        graph, sound = self.placement.graph, self.is_sound(env)
        made = graph.data - set(graph.inputs)
        computed = [*(v in made for v in graph.outputs), *(True for _ in stored)]
        return [
            jnp.where(sound, y, jnp.nan)
            if computes and jnp.issubdtype(y.dtype, jnp.floating)
            else y
            for computes, y in zip(computed, super().results(env, stored), strict=True)
        ]

    def run_node(self, node: Node, values: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Run an operation; where its values count and not its codes, as the integer model does.

        The gradient is that of the operation as it was captured.
        """
        results = super().run_node(node, values)
        if node.effects or node.only_training or node in self.placement.weights:
            return results
        exacts = replay.rounded(node, list(map(lax.stop_gradient, values)))
        return [
            straight_through(exact, x) if jnp.issubdtype(x.dtype, jnp.floating) else x
            for exact, x in zip(exacts, results, strict=True)
        ]

    # Ranges -----------------------------------------------------------------------------------

    def range(self, quantizer: Quantizer, x: jax.Array) -> Range:
        """Return a range; `x`: the values at hand, for a quantizer that keeps no state."""
        if quantizer.has_state:
            return quantizer.observer.range(self.stats[quantizer.name])
        return quantizer.observer.present_range(x)

    def kernel_range(self, quantizer: Quantizer, flat: jax.Array, seen: Seen) -> Range:
        return self.range(quantizer, flat)

    def grid(self, quantizer: Quantizer, x: jax.Array) -> Grid:
        """Return the grid of a tensor; `x`: its values, for a quantizer that keeps no state."""
        return grid_of_range(*self.range(quantizer, x), quantizer.spec)

    def is_sound(self, env: Values) -> jax.Array:
        """Whether every range was observed, and layers and ranges hold neither NaN nor Inf.

        Codes have no NaN: without this, a diverged parameter gives finite and plausible results.
        """
        ranges = (q.observer.range(self.stats[q.name]) for q in self.placement.stateful.values())
        sound = [_is_range(lo, hi) for lo, hi in ranges]
        graph = self.placement.graph
        finite: dict[Operand, Any] = {v: env[v].real for v in graph.read_trained() if v in env}
        nodes = (node for step in self.placement.steps for node in step.nodes)
        for node, position, v in ((n, k, v) for n in nodes for k, v in enumerate(n.inputs)):
            if v in graph.data or (isinstance(v, int) and v not in env):
                continue
            x = jnp.asarray(read(v, env).real)
            if not jnp.issubdtype(x.dtype, jnp.floating):
                continue
            if node.layer is None or position == 0:  # it may be an infinite bound
                sound.append(~jnp.any(jnp.isnan(x)))
                continue
            if isinstance(node, BatchNorm) and node.layer.names[position - 1] == "var":
                x = jnp.where(node.is_variance(x), x, jnp.nan)
            finite[v] = x
        return jnp.all(jnp.stack([*sound, *_are_finite(finite.values())]))

    # Tensors ----------------------------------------------------------------------------------

    def put_on_grid(self, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        grid = self.grid(quantizer, x)
        return self.evaluated(quantizer, Codes(centered_codes(x, grid), grid), x)

    def evaluated(
        self, quantizer: Quantizer, tensor: Codes, x: jax.Array, kernel_delay: int = 0
    ) -> Value:
        """Return a tensor of known codes, with the gradient of fake quantization of `x`."""
        spec = quantizer.spec
        simulated = fake_quant(x, *self.range(quantizer, x), spec)
        real = straight_through(real_values(tensor).astype(x.dtype), simulated)
        real = self.after_delay(kernel_delay, real, simulated)
        return Value(self.after_delay(spec.quant_delay, real, x), tensor.codes)

    def exact(
        self, step: Step, quantizer: Quantizer, x: jax.Array, operands: list[Value], env: Values
    ) -> Value:
        """Quantize a step's result, computed in integers where the step has an integer form."""
        grid, kernel = self.grid(quantizer, x), self.placement.weights.get(step.node)
        codes = self.integer_form(step, grid, operands, env) if step.quantized else None
        if isinstance(codes, Everywhere):
            codes = codes.codes
        else:
            rounded = centered_codes(x, grid)
            codes = rounded if codes is None else jnp.where(jnp.isnan(codes), rounded, codes)
        delay = kernel.spec.quant_delay if kernel is not None and step.quantized else 0
        return self.evaluated(quantizer, Codes(codes, grid), x, delay)

    def integer_form(
        self, step: Step, grid: Grid, operands: list[Value], env: Values
    ) -> jax.Array | Everywhere | None:
        """Compute the codes of a step's output from those of its inputs, if that is exact."""
        inputs = [self.operand_codes(step, i, value, env) for i, value in enumerate(operands)]
        if grid.per_channel or any(v is not None and v.grid.per_channel for v in inputs):
            return None
        return operation_of(step.node).codes(
            ExactStep(
                step=step,
                inputs=inputs,
                reals=[value.real for value in operands],
                layers=[
                    n.layer.named([read(v, env).real for v in n.inputs[1:]])
                    for n in step.nodes
                    if n.layer is not None
                ],
                grid=grid,
                rounding=self.placement.rounding,
                quantize_kernel=partial(self.kernel_codes, step, inputs),
            )
        )

    def kernel_codes(
        self,
        step: Step,
        inputs: Sequence[Codes | None],
        kernel: jax.Array,
        factor: jax.Array | None,
    ) -> KernelCodes:
        """Quantize a kernel to the range that training left, once the layer's input is known.

        So kernels take each other's memory: XLA on CPU quantizes all of them first if they may be.
        """
        assert isinstance(step.node, Product) and inputs[0] is not None
        quantizer, channels = self.placement.weights[step.node], step.node.num_channels
        if quantizer.has_state:
            ends = self.range(quantizer, kernel)
        else:
            ends = scaled_range(quantizer.observer, kernel.reshape(-1, channels), factor)
        known = lax.platform_dependent(inputs[0].codes, cpu=_first, default=_zero)
        lo, hi = (jnp.where(jnp.isnan(known), jnp.nan, end) for end in ends)  # no code is NaN
        return kernel_codes(quantizer, channels, (lo, hi), kernel, factor)

    def operand_codes(self, step: Step, position: int, value: Value, env: Values) -> Codes | None:
        """Return the codes of an operand with their grid; None where it lies on none."""
        v = step.node.inputs[position]
        constant = self.placement.constants.get(Slot(step, position))
        grid = constant or (self.placement.grids.get(v) if isinstance(v, int) else None)
        if grid is None or value.codes is None:
            return None
        # The range of a constant is that of its values before they were rounded to the grid.
        real = value.real if constant is None else jnp.asarray(read(v, env).real)
        return Codes(value.codes, self.grid(grid, real))

    def moved(self, step: Step, v: int, x: jax.Array, operands: list[Value]) -> Value:
        """Return a tensor without a quantizer of its own.

        Values that lie on a grid and change type are made from their codes anew, so that logits of
        a bfloat16 model that are returned as float32 are those of the integer model.
        """
        codes, node = self.moved_codes(step, v, operands), step.node
        filled = isinstance(node, Masked) and node.fill != 0
        if codes is None or (x.dtype == operands[0].real.dtype and not filled):
            return Value(x, codes)
        quantizer = self.placement.grids[v]
        tensor = Codes(codes, self.grid(quantizer, x))
        delay = max(quantizer.spec.quant_delay, self.placement.delay("weight"))
        real = straight_through(real_values(tensor).astype(x.dtype), x)
        return Value(self.after_delay(delay, real, x), codes)

    def moved_codes(self, step: Step, v: int, operands: list[Value]) -> jax.Array | None:
        """Return the codes of a tensor that keeps its input's grid, moved as its values are."""
        node = step.node
        if v not in self.placement.grids or operands[0].codes is None:
            return None
        if isinstance(node, Dropout):  # it scales values off the grid
            return None
        dtype = operands[0].real.dtype
        if not (dtype == jnp.float32 or codes_fit(dtype, self.placement.grids[v].spec)):
            return None
        values = [
            operand.real if operand.codes is None else operand.codes.astype(dtype)
            for operand in operands
        ]
        codes = node.run(*values)[node.outputs.index(v)].astype(jnp.float32)
        if isinstance(node, Masked) and node.fill:
            grid = self.grid(self.placement.grids[v], codes)
            codes = jnp.clip(codes, grid.qmin - grid.zero, grid.qmax - grid.zero)
        return codes


def _first(codes: jax.Array) -> jax.Array:
    return codes.reshape(-1)[0] if codes.size else _zero(codes)


def _zero(codes: jax.Array) -> jax.Array:
    """Return 0, as that of mapped devices: a sum of nothing, for which they do not communicate."""
    return jnp.sum(codes[:0])


def _are_finite(arrays: Iterable[jax.Array]) -> Iterator[jax.Array]:
    """Tell, several at a time, whether arrays hold neither NaN nor Inf."""
    alike: dict[tuple[int, ...], list[jax.Array]] = {}
    for x in map(jnp.asarray, arrays):
        if x.ndim > 1:  # as a kernel's range is taken, and nearly for nothing beside it
            x = x.reshape(-1, x.shape[-1])
            largest = magnitudes(x)
            x = jnp.where(has_nan(x, (0,), largest), jnp.nan, largest)
        alike.setdefault(x.shape, []).append(x * 0)
    for zeros in alike.values():  # one reduction for all of one length
        yield jnp.all(jnp.isfinite(sum(zeros)))


def _is_range(lo: ArrayLike, hi: ArrayLike) -> jax.Array:
    lo, hi = jnp.asarray(lo), jnp.asarray(hi)
    return jnp.all((lo <= hi) & jnp.isfinite(lo) & jnp.isfinite(hi))
