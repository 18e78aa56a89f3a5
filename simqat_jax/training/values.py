"""Running a planned model with JAX, in what training and evaluation have in common."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir.graph import Constant, Node, Operand, Product, Remat
from simqat_jax.ir.plan import Placement, Quantizer, Slot, Step
from simqat_jax.numerics.affine import fake_quant, straight_through
from simqat_jax.numerics.folding import scaled_kernel
from simqat_jax.numerics.observers import Observer, Range, State
from simqat_jax.training.batch_norm import folded_step, unless_frozen
from simqat_jax.training.ranges import Stats


class Value(NamedTuple):
    """A tensor while the model runs.

    Attributes:
      real: its values, in the model's own dtype.
      codes: in evaluation, for a tensor on a grid: `code - zero_point`, float32.
    """

    real: Any
    codes: jax.Array | None = None


Values = dict[int, Value]
"""The tensors that are known so far."""


class Observation(NamedTuple):
    """What a training step has seen of a range so far.

    Attributes:
      measured: of all tensors that share the range, see Observer.measure.
      state: the range's new state.
    """

    measured: Any
    state: State


Seen = dict[str, Observation]
"""The observations of a training step, by the name of the range."""


def read(v: Operand, env: Mapping[int, Value]) -> Value:
    """Return the value of an operand."""
    return Value(v.value) if isinstance(v, Constant) else env[v]


@partial(jax.jit, static_argnums=0)  # traced once for all kernels that are alike
def scaled_range(observer: Observer, kernel: jax.Array, factor: jax.Array | None) -> Range:
    """Return the range of a kernel without a state, see `Observer.scaled_range`."""
    return observer.scaled_range(kernel, factor)


class Run:
    """One run of a planned model: what it needs at every step.

    Attributes:
      placement: the model and its quantizers.
      stats: the ranges.
    """

    def __init__(self, placement: Placement, stats: Stats):
        self.placement = placement
        self.stats = stats
        freeze = placement.freeze_bn
        self.frozen = None if freeze is None else stats["step"] >= freeze
        """Whether BatchNorm is frozen by now; None: never."""

    # What training and evaluation do each in their way ----------------------------------------

    def put_on_grid(self, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        """Quantize a tensor as it is: a model input, a constant."""
        raise NotImplementedError

    def constant(self, step: Step, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        """Quantize a constant that a step reads."""
        del step
        return self.put_on_grid(quantizer, x, seen)

    def kernel_range(self, quantizer: Quantizer, flat: jax.Array, seen: Seen) -> Range:
        """Return the range of a kernel, shape (..., output channels), that has a state."""
        raise NotImplementedError

    def fake_quantized(
        self,
        quantizer: Quantizer,
        x: jax.Array,
        lo: ArrayLike,
        hi: ArrayLike,
        *,
        kept: bool = False,
    ) -> jax.Array:
        """Round a tensor to the grid on a range; `kept`: the backward pass has it anyway."""
        return fake_quant(x, lo, hi, quantizer.spec, keeps_input=kept)

    def step(self, step: Step, env: Values, seen: Seen) -> None:
        """Run a step: put the tensors that leave it into `env`."""
        raise NotImplementedError

    def results(self, env: Values, stored: Sequence[jax.Array]) -> list[jax.Array]:
        """Return the values of the graph's outputs, and behind them what the call stores."""
        return [*(read(v, env).real for v in self.placement.graph.outputs), *stored]

    # Steps ------------------------------------------------------------------------------------

    def steps(self, steps: Iterable[Step], env: Values, seen: Seen) -> None:
        """Run steps in order; those inside one `nn.remat` as one rematerialized function."""
        for remat, group in itertools.groupby(steps, key=lambda s: s.node.remat):
            if remat is None:
                for step in group:
                    self.step(step, env, seen)
            else:
                self.rematerialized(remat, list(group), env, seen)

    def rematerialized(self, remat: Remat, steps: list[Step], env: Values, seen: Seen) -> None:
        """Run the steps of one `nn.remat`, which the backward pass computes again."""
        nodes = [node for step in steps for node in step.nodes]
        made = {v for node in nodes for v in node.outputs}
        inputs = {v for node in nodes for v in node.inputs if isinstance(v, int)} - made
        others = (n for s in self.placement.steps if s not in steps for n in s.nodes)
        used = {v for node in others for v in node.inputs} | set(self.placement.graph.outputs)

        def region(values: Values, seen: Seen) -> tuple[Values, Seen]:
            inner, seen = dict(values), dict(seen)
            for step in steps:
                self.step(step, inner, seen)
            return {v: inner[v] for v in made & used if v in inner}, seen

        again = jax.checkpoint(region, policy=remat.policy, prevent_cse=remat.prevent_cse)
        results, now_seen = again({v: env[v] for v in inputs}, seen)
        env.update(results)
        seen.update(now_seen)

    def operands(self, step: Step, env: Values, seen: Seen) -> list[Value]:
        """Return the values of a step's inputs, its constants on their grids."""
        values = []
        for position, v in enumerate(step.node.inputs):
            value = read(v, env)
            quantizer = self.placement.constants.get(Slot(step, position))
            if quantizer is not None:
                value = self.constant(step, quantizer, jnp.asarray(value.real), seen)
            values.append(value)
        return values

    def simulate(
        self, step: Step, operands: Sequence[Value], env: Values, seen: Seen
    ) -> tuple[dict[int, jax.Array], jax.Array]:
        """Run the step on real values, with fake-quantized kernel, before any output quantizer.

        Returns:
          The tensors that leave it, and its result before the clamp.
        """
        values = [operand.real for operand in operands]
        node = step.node
        if step.fold != "none":
            results = self.simulate_folded(step, values, env, seen)
        else:
            if isinstance(node, Product) and node in self.placement.weights:
                values[1] = self.quantized_kernel(node, values[1], None, seen)
            results = dict(zip(node.outputs, self.run_node(node, values), strict=True))
            if step.norm is not None:
                self.run_behind(step.norm, results, env)
        unclamped = results[(step.norm or step.node).outputs[0]]
        if step.clamp is not None:
            self.run_behind(step.clamp, results, env)
        return results, unclamped

    def run_behind(self, node: Node, results: dict[int, jax.Array], env: Values) -> None:
        """Put the results of a fused node in the place of the one that it reads."""
        first, *rest = node.inputs
        assert isinstance(first, int)
        values = [results.pop(first), *(read(v, env).real for v in rest)]
        results.update(zip(node.outputs, self.run_node(node, values), strict=True))

    def run_node(self, node: Node, values: Sequence[jax.Array]) -> Sequence[jax.Array]:
        """Run an operation; a frozen BatchNorm on its running statistics, which stay."""
        results = node.run(*values)
        return results if self.frozen is None else unless_frozen(node, values, results, self.frozen)

    def simulate_folded(
        self, step: Step, values: Sequence[jax.Array], env: Values, seen: Seen
    ) -> dict[int, jax.Array]:
        """Run a layer with the BatchNorm behind it folded in."""
        assert isinstance(step.node, Product) and step.norm is not None
        stats = [read(v, env).real for v in step.norm.inputs[1:]]
        quantize = partial(self.quantized_kernel, step.node, seen=seen)
        dtype = self.placement.graph.avals[step.norm.outputs[0]].dtype
        return folded_step(step, values, stats, quantize, self.frozen, dtype)

    def quantized_kernel(
        self, node: Product, kernel: jax.Array, factor: jax.Array | None, seen: Seen
    ) -> jax.Array:
        """Fake-quantize a kernel, times the factor of a BatchNorm for each output channel."""
        quantizer = self.placement.weights[node]
        channels = node.num_channels
        # A view of its own shape fuses with what reads the kernel; XLA takes two kernels more for
        # the extremes of long and narrow matrices.
        flat = kernel if kernel.shape[-1:] == (channels,) else kernel.reshape(-1, channels)
        plain, flat = flat, scaled_kernel(flat, factor)
        if quantizer.has_state:
            lo, hi = self.kernel_range(quantizer, flat, seen)
        else:
            lo, hi = scaled_range(quantizer.observer, lax.stop_gradient(plain), factor)
        if quantizer.spec.symmetric and not quantizer.has_state and quantizer.observer.covers:
            # Nothing lies outside of a range of its own extremes: the gradient needs no mask.
            exact = fake_quant(lax.stop_gradient(flat), lo, hi, quantizer.spec)
            rounded = straight_through(exact, flat)
        else:
            rounded = self.fake_quantized(quantizer, flat, lo, hi, kept=True)
        rounded, real = (v.reshape(kernel.shape) for v in (rounded, flat))
        return self.after_delay(quantizer.spec.quant_delay, rounded, real)

    def after_delay(self, delay: int, quantized: jax.Array, real: jax.Array) -> jax.Array:
        """Return `quantized` once `delay` training steps have passed, `real` before."""
        return quantized if delay == 0 else jnp.where(self.stats["step"] >= delay, quantized, real)
