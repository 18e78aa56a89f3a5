"""Oscillation damping: a loss that draws weights to the codes which they are rounded to."""

import jax
import jax.numpy as jnp
from flax.typing import VariableDict
from jax import lax
from jax.typing import ArrayLike

from simqat_jax.ir.graph import Product
from simqat_jax.ir.plan import Quantizer
from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.affine import along_channel, fake_quant, quant_params
from simqat_jax.numerics.arguments import check_kind
from simqat_jax.numerics.folding import scaled_kernel
from simqat_jax.numerics.requantize import Bounds
from simqat_jax.numerics.spec import QuantSpec
from simqat_jax.training.arguments import check_variables
from simqat_jax.training.module import Method, QuantizedModule, trace
from simqat_jax.training.planner import place_quantizers
from simqat_jax.training.ranges import ranges_and_steps, restored
from simqat_jax.training.simulation import Simulation
from simqat_jax.training.values import Observation, Seen, Value


def oscillation_damping(
    qmodule: QuantizedModule,
    variables: VariableDict,
    *args: PyTree,
    method: Method = None,
    **kwargs: PyTree,
) -> jax.Array:
    """Return how far kernels are off their grids, to be added to the loss.

    A weight of few bits whose best value lies between two codes moves to the border between them
    and crosses it every few steps; BatchNorm's statistics fit neither side. With `s` the scale of a
    grid of codes `qmin` to `qmax`, and `w` a kernel as it is quantized (BatchNorm folded in)::

        sum over all kernels of |clip(w, qmin * s, qmax * s) - fake_quant(w)|^2

    The rounded values and the scale have no gradient, so that it is `2 * (w - fake_quant(w))`
    within the grid and zero outside. Under `jax.jit` nothing of the call but kernels is computed.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: those of the training step.
      args: a sample of the model's arguments, one example is enough.
      method: of the float model, by name or function; by default its `__call__`.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      A float32 scalar. A kernel whose range is not known yet counts nothing.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables.
      ValueError: what the call itself would raise.

    Examples:
      >>> qmodel = SimQAT().apply(nn.Dense(1, use_bias=False))
      >>> variables = {"params": {"kernel": jnp.array([[127.0], [2.25]])}}
      >>> oscillation_damping(qmodel, variables, jnp.ones((1, 2)))
      Array(0.0625, dtype=float32)

    Source:
      Nagel et al., Overcoming oscillations in quantization-aware training, arXiv:2203.11086,
      section 4.1.
    """
    check_kind("qmodule", qmodule, QuantizedModule, "SimQAT(...).apply(model) returns one.")
    check_variables(variables, "Pass what init returned, or a trained version of it.")
    rngs = {"params": jax.random.key(0)}
    captured = trace(qmodule, variables, args, kwargs, method, rngs=rngs, dry=True)
    placement = place_quantizers(captured.graph, qmodule.config)
    run, seen = _Distances(placement, restored(placement, *ranges_and_steps(variables))), Seen()
    pairs = zip(placement.graph.inputs, captured.inputs, strict=True)
    run.steps(placement.steps, {v: Value(x) for v, x in pairs}, seen)
    return jnp.sum(jnp.stack([observation.measured for observation in seen.values()]))


class _Distances(Simulation):
    """A run of the float model: `seen` collects how far each kernel is off its grid."""

    def put_on_grid(self, quantizer: Quantizer, x: jax.Array, seen: Seen) -> Value:
        return Value(x)

    def observed(
        self, quantizer: Quantizer, x: jax.Array, seen: Seen, unclamped: jax.Array, bounds: Bounds
    ) -> Value:
        return Value(x)

    def quantized_kernel(
        self, node: Product, kernel: jax.Array, factor: jax.Array | None, seen: Seen
    ) -> jax.Array:
        quantizer, kernel = self.placement.weights[node], scaled_kernel(kernel, factor)
        observer, flat = quantizer.observer, kernel.reshape(-1, node.num_channels)
        state = self.stats.get(quantizer.name, observer.init())
        kept = quantizer.has_state
        lo, hi = observer.range(state) if kept else observer.present_range(flat)
        seen[quantizer.name] = Observation(distance(flat, lo, hi, quantizer.spec), state)
        return kernel


def distance(w: jax.Array, lo: ArrayLike, hi: ArrayLike, spec: QuantSpec) -> jax.Array:
    """Return the squared distance of a kernel to its rounded values, within its grid.

    Args:
      w: shape (N, C), real units.
      lo: lowest value of the range, shape () or (C,); above `hi`: none is known, which counts 0.
      hi: highest value, same shape.
      spec: of the grid.

    Returns:
      float32, scalar.
    """
    w, known = w.astype(jnp.float32), jnp.asarray(lo) <= jnp.asarray(hi)
    lo, hi = jnp.where(known, lo, -1), jnp.where(known, hi, 1)
    rounded = lax.stop_gradient(fake_quant(w, lo, hi, spec))
    scale = lax.stop_gradient(quant_params(lo, hi, spec).scale)
    scale, known = (along_channel(v, w.ndim, -1) for v in (scale, known))
    inside = jnp.clip(w, spec.qmin * scale, spec.qmax * scale)
    return jnp.sum(jnp.where(known, jnp.square(inside - rounded), 0))
