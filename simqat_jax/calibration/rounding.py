"""Round kernels adaptively: each weight up or down, as its layer's output asks for."""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict
from jax import lax

from simqat_jax.calibration.batches import Batches
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.patches import columns, kernel_of, patches
from simqat_jax.calibration.walk import Stop, Walk
from simqat_jax.ir.graph import Product
from simqat_jax.ir.plan import Quantizer
from simqat_jax.ir.program import PyTree
from simqat_jax.numerics.folding import batch_norm_state, folding_scale
from simqat_jax.ops.products import kernel_codes
from simqat_jax.training.module import Method, QuantizedModule

_SWEEPS = 50
"""At most so often each weight is looked at; most layers settle within ten."""
_DAMPING = 0.01
"""What a code away from the weight costs besides, as a share of the mean square of the inputs: few
data do not tell what weights of inputs that go together are to be."""
_ROWS = 2**15
"""Of more rows in a batch, an evenly spread part of about so many is looked at."""
_INSIDE = 0.25
"""Codes by which a weight rounded to an end of the range stays inside of it."""


def round_adaptively(
    qmodule: QuantizedModule,
    variables: VariableDict,
    batches: Batches,
    *,
    reference: VariableDict | None = None,
    method: Method = None,
    progress: bool = True,
    **kwargs: PyTree,
) -> dict[str, Any]:
    """Round each weight up or down, so that its layer computes what the float layer does.

    For each output channel, with `x` what the quantized layer reads and `z` what the float one
    does, `sum((x @ (scale * codes) - z @ weights)**2` over all data is lowered by choosing between
    the two codes next to each weight, one layer after the other. It is never larger than with the
    nearest codes. The largest weight of each range keeps its code, so that the range stays. Kernels
    come back on their grid, where evaluation and `convert` round them to the codes that were
    chosen. Of large feature maps an evenly spread part is looked at.

    Kernels that are no parameter as they stand (tied, normalized, of a scan) keep nearest codes.
    Correct biases afterwards, with the variables from before as `reference`.

    Args:
      qmodule: what `SimQAT.apply` returned.
      variables: calibrated ones.
      batches: yields the call's arguments, as in `calibrate`; all of them are held in memory.
      reference: the float model's variables to come close to; by default `variables`.
      method: of the float model, by name or function; by default its `__call__`.
      progress: write to stderr how far it is.
      kwargs: keyword arguments of the call in evaluation: `train=False`.

    Returns:
      The variables, with other kernels in `params`.

    Raises:
      TypeError: no QuantizedModule, no dictionary of variables, an array in the place of batches.
      ValueError: no batch, an empty one, ranges never observed, a call of training, no kernel that
        is a parameter.

    Source:
      Nagel et al., arXiv:2004.10568: the objective of section 3.2, of quantized inputs as in
      section 3.4. The paper relaxes it to continuous variables; here it is descended as it stands,
      one weight of all channels at a time, from the nearest codes.
    """
    call = EvaluationCall(qmodule, method, kwargs)
    walk = Walk(call, variables, batches, reference, what="round_adaptively", progress=progress)
    if not sum([round_kernel(stop) for stop in walk]):
        raise ValueError(
            "round_adaptively: no quantized kernel of this model is a parameter as it stands. "
            "Leave the call out."
        )
    return walk.variables()


def round_kernel(stop: Stop) -> bool:
    """Round the kernel of a step; return whether it has one that can be."""
    quantizer = stop.quantizer
    if quantizer is None or not stop.is_free(stop.step.node.inputs[1]):
        return False
    layer = _Layer(stop, quantizer)
    kernel, codes = layer.rounded(stop)
    if layer.is_quantized_to(kernel, codes):
        stop.set(layer.node.inputs[1], kernel)
    else:
        warnings.warn(
            f"{quantizer.name}: its range would move with its values, so that it is left at the "
            "nearest codes. Use the observer 'batch' or 'minmax' for weights.",
            stacklevel=3,
        )
    return True


class _Layer:
    """A product with its kernel, as it is deployed.

    Args:
      stop: where the walk is.
      quantizer: the kernel's.
    """

    def __init__(self, stop: Stop, quantizer: Quantizer):
        assert isinstance(stop.step.node, Product)
        self.node: Product = stop.step.node
        self._spec = quantizer.spec
        self._kernel = stop.value(self.node.inputs[1])
        self._factor = jnp.ones(self.node.num_channels)
        norm = stop.step.norm
        if norm is not None and stop.step.fold != "none":
            values = {n: stop.value(v) for n, v in norm.layer.named(norm.inputs[1:]).items()}
            self._factor = folding_scale(batch_norm_state(values, norm.module.epsilon))
        ends = stop.range(quantizer)

        @jax.jit
        def deployed(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            flat = kernel.reshape(-1, self.node.num_channels)
            codes = kernel_codes(quantizer, flat.shape[1], ends, flat, self._factor)
            return codes.codes, jnp.broadcast_to(codes.grid.params.scale, flat.shape)

        self._deployed = deployed
        self._nearest, self._scale = map(np.asarray, deployed(self._kernel))

    def rounded(self, stop: Stop) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel on the chosen codes, and these, viewed as (inputs, channels)."""
        spec, nearest = self._spec, self._nearest
        flat = np.asarray(self._kernel, np.float32).reshape(nearest.shape)
        real = flat * np.asarray(self._factor) / self._scale
        size = np.abs(flat * np.asarray(self._factor))
        ends = size == size.max(axis=0 if spec.per_channel else None)
        low = np.where(ends, nearest, np.clip(np.floor(real), spec.qmin, spec.qmax))
        high = np.where(ends, nearest, np.clip(np.floor(real) + 1, spec.qmin, spec.qmax))
        choice = _Choice(*(jnp.asarray(columns(self.node, v)) for v in (real, nearest, low, high)))
        found = np.asarray(_chosen(_sums(self.node, stop), choice))
        chosen = kernel_of(found, nearest.shape)
        outer = (chosen <= spec.qmin) | (chosen >= spec.qmax)
        inside = np.where(outer, chosen - _INSIDE * np.sign(chosen), chosen)
        kernel = np.where(
            outer & (chosen == nearest), flat, inside * self._scale / np.asarray(self._factor)
        )
        return kernel.astype(self._kernel.dtype).reshape(self._kernel.shape), chosen

    def is_quantized_to(self, kernel: np.ndarray, codes: np.ndarray) -> bool:
        """Whether a kernel is quantized to these codes, on the grid of the old one."""
        found, scale = self._deployed(jnp.asarray(kernel))
        return np.array_equal(found, codes) and np.array_equal(scale, self._scale)


class _Sums(NamedTuple):
    """Sums over the rows of all data, for each group of channels, shape (G, K, K).

    Attributes:
      squares: `x.T @ x` of what the quantized layer reads.
      mixed: `x.T @ z` of that and what the float layer reads.
    """

    squares: jax.Array
    mixed: jax.Array


class _Choice(NamedTuple):
    """Between which codes is chosen, shape (G, K, C / G).

    Attributes:
      real: the weights, in units of codes.
      nearest: their nearest codes.
      low: the lower of both codes.
      high: the higher.
    """

    real: jax.Array
    nearest: jax.Array
    low: jax.Array
    high: jax.Array


def _sums(node: Product, stop: Stop) -> _Sums:
    @jax.jit
    def of_batch(exact: jax.Array, real: jax.Array) -> _Sums:
        x, z = patches(node, exact), patches(node, real)
        # An odd number: images have even widths, and all columns are to be seen.
        x, z = (v[:, :: (v.shape[1] // _ROWS) | 1] for v in (x, z))
        product = functools.partial(jnp.einsum, "gnk,gnl->gkl", precision=lax.Precision.HIGHEST)
        return _Sums(product(x, x), product(x, z))

    return functools.reduce(
        lambda a, b: jax.tree.map(jnp.add, a, b), (of_batch(*inputs) for inputs in stop.inputs())
    )


@jax.jit
def _chosen(sums: _Sums, choice: _Choice) -> jax.Array:
    """Return the chosen codes: of each channel the nearest ones if nothing better was found."""
    level = _DAMPING * jnp.mean(jnp.diagonal(sums.squares, axis1=1, axis2=2), axis=1)
    level, wanted = level[:, None, None], sums.mixed @ choice.real
    damped = sums.squares + level * jnp.eye(sums.squares.shape[-1])[None]
    found = jax.vmap(_descended)(damped, wanted + level * choice.real, choice)

    def error(codes: jax.Array) -> jax.Array:  # but for what no codes change
        return jnp.sum(codes * (sums.squares @ codes - 2 * wanted), axis=1, keepdims=True)

    return jnp.where(error(found) < error(choice.nearest), found, choice.nearest)


def _descended(squares: jax.Array, wanted: jax.Array, choice: _Choice) -> jax.Array:
    """Lower `q.T @ squares @ q - 2 q.T @ wanted` of each column, one row of codes at a time."""

    def visit(k: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        codes, slope = state
        step = jnp.where(squares[k, k] > 0, slope[k] / squares[k, k], 0.0)
        new = jnp.clip(jnp.round(codes[k] - step), choice.low[k], choice.high[k])
        return codes.at[k].set(new), slope + squares[:, k, None] * (new - codes[k])[None]

    def sweep(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        count, codes, slope, _ = state
        new, slope = lax.fori_loop(0, len(codes), visit, (codes, slope))
        return count + 1, new, slope, jnp.any(new != codes)

    start = squares @ choice.nearest - wanted
    state = jnp.int32(0), choice.nearest, start, jnp.bool_(True)
    return lax.while_loop(lambda s: s[3] & (s[0] < _SWEEPS), sweep, state)[1]
