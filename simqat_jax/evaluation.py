"""Run a planned model with JAX: simulated quantization in training, exact codes in evaluation."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from simqat_jax import folding
from simqat_jax.config import SimQATConfig
from simqat_jax.graph import LAYER_KINDS, Constant, Node, Operand
from simqat_jax.integer_arithmetic import Codes, centered_codes, codes_fit, real_values
from simqat_jax.integer_forms import deployed_layer, integer_form
from simqat_jax.interception import batch_norm
from simqat_jax.numerics import QuantParams, fake_quant, quant_params, straight_through
from simqat_jax.observers import RangeState, extremes, observed, update_range
from simqat_jax.planning import Placement, Quantizer, Step, kernel_channels

Seen = dict[str, tuple[jax.Array, jax.Array, RangeState]]
"""What a training step has observed of each range so far: lowest, highest, and the new state."""


class Value(NamedTuple):
    """A tensor while the model runs.

    Attributes:
      real: its values, in the model's own dtype.
      codes: in evaluation, for a tensor on a grid: `code - zero_point`, float32.
    """

    real: Any
    codes: jax.Array | None = None


def evaluate(
    placement: Placement,
    config: SimQATConfig,
    inputs: Sequence[Any],
    stats: Mapping[str, Any],
    *,
    training: bool,
) -> tuple[list[Any], dict[str, Any]]:
    """Run the model on the values of its inputs.

    Args:
      placement: the model and its quantizers.
      config: the quantization.
      inputs: one value per tensor of `placement.graph.inputs`.
      stats: a RangeState per name of `placement.stateful`, and "step": training steps so far.
      training: observe ranges and simulate; otherwise use the ranges, unchanged, and compute what
        an integer implementation computes.
    Returns: the values of `placement.graph.outputs`, and the new `stats`.
    """
    run = _Run(placement, config, stats, training)
    raw = dict(zip(placement.graph.inputs, inputs, strict=True))
    env = {v: Value(x) for v, x in raw.items()}
    seen: Seen = {}
    for v in placement.graph.inputs:
        if v in placement.at:
            env[v] = run.put_on_grid(placement.at[v], env[v].real, seen)
    run.steps(placement.steps, env, seen)
    env.update({v: Value(x) for v, x in raw.items()})  # a model's own input leaves as it came
    outputs = [_read(v, env).real for v in placement.graph.outputs]
    if not training:
        return outputs, dict(stats)
    states = {name: state for name, (_, _, state) in seen.items()}
    return outputs, {**stats, **states, "step": stats["step"] + 1}


def _read(v: Operand, env: Mapping[int, Value]) -> Value:
    return Value(v.value) if isinstance(v, Constant) else env[v]


def _ends(quantizer: Quantizer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the extremes that the quantizer's range asks for, without gradient."""
    axis = None if quantizer.num_channels is None else -1
    return extremes(jax.lax.stop_gradient(x), axis)


def _flat_kernel(node: Node, kernel: jax.Array) -> jax.Array:
    """View a kernel as (inputs, output channels)."""
    assert node.layer is not None
    return kernel.reshape(-1, kernel_channels(node.layer.module, kernel.shape))


def _moments(module: Any, mask: jax.Array | None) -> folding.Moments:
    return folding.Moments(
        module.axis_name, module.axis_index_groups, module.use_fast_variance, mask
    )


class _Run:
    """One evaluation: what it needs at every step. `seen` collects a training step's extremes."""

    def __init__(
        self, placement: Placement, config: SimQATConfig, stats: Mapping[str, Any], training: bool
    ):
        self.placement = placement
        self.config = config
        self.stats = stats
        self.training = training
        self.shared = placement.shared

    # Steps ------------------------------------------------------------------------------------

    def steps(self, steps: Iterable[Step], env: dict[int, Value], seen: Seen) -> None:
        """Run steps in order; those inside one `nn.remat` as one rematerialized function."""
        for remat, group in itertools.groupby(steps, key=lambda s: s.node.remat):
            if remat is None:
                for step in group:
                    self.step(step, env, seen)
            else:
                self.rematerialized(remat[1], list(group), env, seen)

    def rematerialized(
        self, params: Mapping[str, Any], steps: list[Step], env: dict[int, Value], seen: Seen
    ) -> None:
        nodes = [node for step in steps for node in step.nodes]
        made = {v for node in nodes for v in node.outputs}
        read = {v for node in nodes for v in node.inputs if isinstance(v, int)} - made
        others = (n for s in self.placement.steps if s not in steps for n in s.nodes)
        used = {v for node in others for v in node.inputs} | set(self.placement.graph.outputs)

        def region(values: dict[int, Value], seen: Seen):
            inner, seen = dict(values), dict(seen)
            for step in steps:
                self.step(step, inner, seen)
            return {v: inner[v] for v in made & used if v in inner}, seen

        results, now_seen = jax.checkpoint(region, **params)({v: env[v] for v in read}, seen)
        env.update(results)
        seen.update(now_seen)

    def step(self, step: Step, env: dict[int, Value], seen: Seen) -> None:
        operands = [self.operand(step, i, v, env, seen) for i, v in enumerate(step.node.inputs)]
        results, unclamped = self.simulate(step, operands, env, seen)
        for v, x in results.items():
            quantizer = self.placement.at.get(v)
            if quantizer is None:
                env[v] = self.moved(step, v, x, operands)
            elif self.training and step.clamp is not None and v == step.output:
                ends = _ends(quantizer, unclamped)
                ends = tuple(jnp.clip(end, *step.clamp.bounds) for end in ends)
                env[v] = self.put_on_grid(quantizer, x, seen, ends)
            elif self.training:
                env[v] = self.put_on_grid(quantizer, x, seen)
            else:
                env[v] = self.exact(step, quantizer, x, operands, env)

    def operand(
        self, step: Step, position: int, v: Operand, env: Mapping[int, Value], seen: Seen
    ) -> Value:
        value, quantizer = _read(v, env), self.placement.constants.get((step, position))
        return (
            value
            if quantizer is None
            else self.put_on_grid(quantizer, jnp.asarray(value.real), seen)
        )

    def simulate(
        self, step: Step, operands: list[Value], env: dict[int, Value], seen: Seen
    ) -> tuple[dict[int, jax.Array], jax.Array]:
        """Run the step on real values, with fake-quantized kernel, before any output quantizer.

        Returns: the tensors that leave it, and its result before the clamp. The extremes of a
          clamped tensor are the clamped extremes: taken from there, they need no pass of their own
          over the clamped one, which a compiled step then never stores.
        """
        values = [operand.real for operand in operands]
        if self.is_folded(step):
            results = self.simulate_folded(step, values, env, seen)
        else:
            if self.is_quantized_layer(step.node):
                values[1] = self.quantized_kernel(step.node, values[1], seen)
            results = dict(zip(step.node.outputs, self.run_node(step.node, values), strict=True))
            if step.batch_norm is not None:
                self.run_behind(step.batch_norm, results, env)
        unclamped = results[(step.batch_norm or step.node).outputs[0]]
        if step.clamp is not None:
            self.run_behind(step.clamp, results, env)
        return results, unclamped

    def run_behind(
        self, node: Node, results: dict[int, jax.Array], env: Mapping[int, Value]
    ) -> None:
        """Put the results of a fused node in the place of the one that it reads."""
        first, *rest = node.inputs
        assert isinstance(first, int)
        values = [results.pop(first), *(_read(v, env).real for v in rest)]
        results.update(zip(node.outputs, self.run_node(node, values), strict=True))

    def is_folded(self, step: Step) -> bool:
        return (
            step.batch_norm is not None
            and self.config.bn_fold != "none"
            and self.is_quantized_layer(step.node)
        )

    def simulate_folded(
        self, step: Step, values: list[Any], env: dict[int, Value], seen: Seen
    ) -> dict[int, jax.Array]:
        """Run a layer with the BatchNorm behind it folded in."""
        node, norm = step.node, step.batch_norm
        assert node.layer is not None and norm is not None and norm.layer is not None
        x, named = values[0], dict(zip(node.layer.names, values[1:], strict=True))
        kernel = named["kernel"]
        module: Any = norm.layer.module
        rest = [_read(v, env).real for v in norm.inputs[1:]]
        old = dict(zip(norm.layer.names, rest, strict=True))
        no_bias = [jnp.zeros_like(v) for name, v in named.items() if name != "kernel"]
        frozen = self.frozen()
        fold = folding.one_conv if self.config.bn_fold == "one_conv" else folding.two_conv
        result = fold(
            lambda folded: node.run(x, folded.astype(kernel.dtype), *no_bias)[0],
            kernel,
            named.get("bias"),
            folding.batch_norm_state(old, module.epsilon),
            lambda folded: self.quantized_kernel(node, folded, seen),
            module.epsilon,
            _moments(module, old.get("mask")) if norm.layer.training else None,
            frozen,
        )
        out = result.output.astype(self.placement.graph.avals[norm.outputs[0]].dtype)
        results = {norm.outputs[0]: out}
        for v, name in zip(norm.outputs[1:], ("mean", "var"), strict=False):
            new = module.momentum * old[name] + (1 - module.momentum) * getattr(result, name)
            results[v] = new if frozen is None else jnp.where(frozen, old[name], new)
        return results

    def frozen(self) -> jax.Array | None:
        """Whether BatchNorm is frozen by now; None: never."""
        freeze = self.config.freeze_bn
        return None if freeze is None else self.stats["step"] >= freeze

    def run_node(self, node: Node, values: Sequence[Any]) -> Sequence[Any]:
        frozen, layer = self.frozen(), node.layer
        results = node.run(*values)
        if node.kind != "batch_norm" or layer is None or not layer.training or frozen is None:
            return results
        still = batch_norm(layer, *values, use_running_average=True)
        kept = [values[1 + layer.names.index(name)] for name in ("mean", "var")]
        return [jnp.where(frozen, a, b) for a, b in zip((*still, *kept), results, strict=True)]

    # Kernels ----------------------------------------------------------------------------------

    def is_quantized_layer(self, node: Node) -> bool:
        return (
            node.kind in LAYER_KINDS
            and node.layer is not None
            and node.layer.path in self.placement.weights
        )

    def kernel_quantizer(self, node: Node) -> Quantizer:
        assert node.layer is not None
        return self.placement.weights[node.layer.path]

    def kernel_range(
        self, quantizer: Quantizer, flat: jax.Array, seen: Seen | None
    ) -> tuple[ArrayLike, ArrayLike]:
        """Return the range of a kernel viewed as (inputs, channels); observe it if `seen`."""
        if not quantizer.has_state:  # a symmetric grid depends on the magnitude alone
            axis = None if quantizer.num_channels is None else 0
            magnitude = jnp.max(jnp.abs(jax.lax.stop_gradient(flat)), axis=axis)
            return -magnitude, magnitude
        if seen is not None:
            return self.observe(quantizer, _ends(quantizer, flat), seen)
        return self.stats[quantizer.name].lo, self.stats[quantizer.name].hi

    def quantized_kernel(self, node: Node, kernel: jax.Array, seen: Seen) -> jax.Array:
        quantizer, flat = self.kernel_quantizer(node), _flat_kernel(node, kernel)
        lo, hi = self.kernel_range(quantizer, flat, seen if self.training else None)
        rounded = fake_quant(flat, lo, hi, quantizer.spec).reshape(kernel.shape)
        return self.after_delay(quantizer.spec.quant_delay, rounded, kernel)

    def kernel_codes(self, node: Node, kernel: jax.Array) -> Codes:
        quantizer, flat = self.kernel_quantizer(node), _flat_kernel(node, kernel)
        params = quant_params(*self.kernel_range(quantizer, flat, None), quantizer.spec)
        codes = centered_codes(flat, params, quantizer.spec).reshape(kernel.shape)
        return Codes(codes, params, quantizer.spec)

    # Activations ------------------------------------------------------------------------------

    def after_delay(self, delay: int, quantized: jax.Array, real: jax.Array) -> jax.Array:
        """Return `quantized` once `delay` training steps have passed, `real` before."""
        return quantized if delay == 0 else jnp.where(self.stats["step"] >= delay, quantized, real)

    def observe(
        self, quantizer: Quantizer, ends: tuple[jax.Array, jax.Array], seen: Seen
    ) -> tuple[ArrayLike, ArrayLike]:
        """Take a tensor's extremes into its range, and return the range that it trains on.

        Tensors that share a range widen each other's. The first of them come before it is known:
        where it starts anew with each batch they train on what the last batch had, too.
        """
        lo, hi = ends
        if quantizer.role == "constant":
            return lo, hi
        if quantizer.nonnegative:
            lo = jnp.zeros_like(hi)
        if quantizer.name in seen:
            lowest, highest, _ = seen[quantizer.name]
            lo, hi = jnp.minimum(lo, lowest), jnp.maximum(hi, highest)
        state = update_range(self.stats[quantizer.name], lo, hi, quantizer.spec)
        if quantizer.nonnegative:
            state = state._replace(lo=self.stats[quantizer.name].lo)
        seen[quantizer.name] = lo, hi, state
        lo, hi = state.lo, state.hi
        if quantizer.spec.observer == "batch" and quantizer.name in self.shared:
            last = self.stats[quantizer.name]
            lo, hi = jnp.minimum(lo, last.lo), jnp.maximum(hi, last.hi)
        return np.zeros(hi.shape, np.float32) if quantizer.nonnegative else lo, hi

    def grid(self, quantizer: Quantizer, x: jax.Array) -> QuantParams:
        """Return the grid that evaluation uses; NaN where the range was never observed."""
        if quantizer.role == "constant":
            return quant_params(*_ends(quantizer, x), quantizer.spec)
        state = self.stats[quantizer.name]
        params = quant_params(state.lo, state.hi, quantizer.spec)
        return params._replace(scale=jnp.where(observed(state), params.scale, jnp.nan))

    def put_on_grid(
        self,
        quantizer: Quantizer,
        x: jax.Array,
        seen: Seen,
        ends: tuple[jax.Array, ...] | None = None,
    ) -> Value:
        """Quantize a tensor as it is: a model input, in training any tensor; `ends`: extremes."""
        spec = quantizer.spec
        if self.training:
            if x.size == 0:
                raise ValueError(
                    f"{quantizer.name}: an empty tensor of shape {x.shape} has no range. Train "
                    "with at least one example in a batch."
                )
            lo, hi = ends or _ends(quantizer, x)
            lo, hi = self.observe(quantizer, (lo, hi), seen)
            return Value(self.after_delay(spec.quant_delay, fake_quant(x, lo, hi, spec), x))
        params = self.grid(quantizer, x)
        return self.evaluated(quantizer, Codes(centered_codes(x, params, spec), params, spec), x)

    def evaluated(
        self, quantizer: Quantizer, codes: Codes, x: jax.Array, kernel_delay: int = 0
    ) -> Value:
        """Return a tensor of known codes, with the gradient of fake quantization of `x`."""
        constant = quantizer.role == "constant"
        lo, hi = _ends(quantizer, x) if constant else self.stats[quantizer.name][:2]
        simulated = fake_quant(x, lo, hi, codes.spec)
        real = straight_through(real_values(codes).astype(x.dtype), simulated)
        real = self.after_delay(kernel_delay, real, simulated)
        return Value(self.after_delay(codes.spec.quant_delay, real, x), codes.codes)

    # Exact evaluation -------------------------------------------------------------------------

    def exact(
        self,
        step: Step,
        quantizer: Quantizer,
        x: jax.Array,
        operands: list[Value],
        env: Mapping[int, Value],
    ) -> Value:
        """Quantize a step's result, computed in integers where the step has an integer form."""
        params, spec = self.grid(quantizer, x), quantizer.spec
        node, codes, layer, delay = step.node, None, None, 0
        values = [
            dict(zip(n.layer.names, (_read(v, env).real for v in n.inputs[1:]), strict=True))
            for n in step.nodes
            if n.layer is not None
        ]
        if step.quantized:
            inputs = [self.operand_codes(step, i, value) for i, value in enumerate(operands)]
            if self.is_quantized_layer(node):
                delay = self.kernel_quantizer(node).spec.quant_delay
            x_codes = inputs[0]
            if self.is_quantized_layer(node) and x_codes and not x_codes.spec.per_channel:
                layer = deployed_layer(
                    step,
                    values,
                    lambda kernel: self.kernel_codes(node, kernel),
                    self.config.bn_fold,
                    x_codes.params.scale,
                )
            reals = [value.real for value in operands]
            codes = integer_form(
                step,
                inputs,
                layer,
                values[0] if values else {},
                reals,
                params,
                spec,
                self.config.backend,
            )
        rounded = centered_codes(x, params, spec)
        codes = rounded if codes is None else jnp.where(jnp.isnan(codes), rounded, codes)
        return self.evaluated(quantizer, Codes(codes, params, spec), x, delay)

    def operand_codes(self, step: Step, position: int, value: Value) -> Codes | None:
        v = step.node.inputs[position]
        grid = self.placement.constants.get((step, position))
        grid = grid or (self.placement.grids.get(v) if isinstance(v, int) else None)
        if grid is None or value.codes is None:
            return None
        return Codes(value.codes, self.grid(grid, value.real), grid.spec)

    def moved(self, step: Step, v: int, x: jax.Array, operands: list[Value]) -> Value:
        """Return a tensor without a quantizer of its own.

        Values that lie on a grid and change type are made from their codes anew, so that logits of
        a bfloat16 model that are returned as float32 are those of the integer model.
        """
        codes = self.moved_codes(step, v, operands)
        if codes is None or x.dtype == operands[0].real.dtype:
            return Value(x, codes)
        quantizer = self.placement.grids[v]
        tensor = Codes(codes, self.grid(quantizer, x), quantizer.spec)
        delay = max(quantizer.spec.quant_delay, self.config.weight.quant_delay)
        real = straight_through(real_values(tensor).astype(x.dtype), x)
        return Value(self.after_delay(delay, real, x), codes)

    def moved_codes(self, step: Step, v: int, operands: list[Value]) -> jax.Array | None:
        """Return the codes of a tensor that keeps its input's grid, moved as its values are."""
        node = step.node
        if self.training or v not in self.placement.grids or operands[0].codes is None:
            return None
        if node.op == "dropout":  # active: it scales values off the grid
            return None
        dtype = operands[0].real.dtype
        if not (dtype == jnp.float32 or codes_fit(dtype, self.placement.grids[v].spec)):
            return None
        values = [
            operand.real if operand.codes is None else operand.codes.astype(dtype)
            for operand in operands
        ]
        return node.run(*values)[node.outputs.index(v)].astype(jnp.float32)
