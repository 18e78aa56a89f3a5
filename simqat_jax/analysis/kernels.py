"""The kernels of a planned call, in float and of any width."""

import dataclasses
from collections.abc import Mapping

import jax

from simqat_jax.analysis.measures import Measured, Summaries, joined
from simqat_jax.ir.graph import Product
from simqat_jax.ir.plan import Placement, Quantizer
from simqat_jax.numerics.affine import fake_quant, quant_params
from simqat_jax.numerics.observers import Range
from simqat_jax.training.ranges import Stats

Kernels = Mapping[int, jax.Array]
"""What steps multiply by, by the step's place in the plan."""


def rounded(placement: Placement, stats: Stats, real: Kernels, num_bits: int | None) -> Kernels:
    """Round kernels to their grids.

    Args:
      placement: the call.
      stats: its ranges.
      real: the kernels, real units.
      num_bits: width of the codes; None: that of each one's own spec.
    """

    def one(number: int, kernel: jax.Array) -> jax.Array:
        node, quantizer = _of(placement, number, num_bits)
        flat = kernel.reshape(-1, node.num_channels)
        ends = _range(placement, stats, number, quantizer, flat)
        return fake_quant(flat, *ends, quantizer.spec).reshape(kernel.shape)

    return jax.jit(lambda real: {n: one(n, kernel) for n, kernel in real.items()})(real)


def measured(placement: Placement, stats: Stats, aims: Kernels, real: Kernels) -> Summaries:
    """Measure kernels, by the names of their quantizers.

    Args:
      placement: the call.
      stats: its ranges.
      aims: the float model's kernels.
      real: those that are quantized, before they are.
    """

    def one(number: int, aim: jax.Array, kernel: jax.Array) -> Measured:
        node, quantizer = _of(placement, number, None)
        flat = kernel.reshape(-1, node.num_channels)
        params = quant_params(*_range(placement, stats, number, quantizer, flat), quantizer.spec)
        return Measured.of(aim.reshape(flat.shape), flat, params, quantizer.spec)

    found = jax.jit(lambda aims, real: {n: one(n, aims[n], kernel) for n, kernel in real.items()})
    result: Summaries = {}
    for number, value in found(aims, real).items():
        result = joined(result, {_of(placement, number, None)[1].name: value.summed()})
    return result


def _of(placement: Placement, number: int, num_bits: int | None) -> tuple[Product, Quantizer]:
    node = placement.steps[number].node
    assert isinstance(node, Product)
    quantizer = placement.weights[node]
    if num_bits is None:
        return node, quantizer
    spec = dataclasses.replace(quantizer.spec, num_bits=num_bits)
    return node, dataclasses.replace(quantizer, spec=spec)


def _range(
    placement: Placement, stats: Stats, number: int, quantizer: Quantizer, flat: jax.Array
) -> Range:
    """Return the range of a kernel; of another width than it has, that of calibration."""
    observer, own = quantizer.observer, placement.weights[placement.steps[number].node]
    if not quantizer.has_state:
        return observer.present_range(flat)
    if quantizer.spec == own.spec:
        return observer.range(stats[quantizer.name])
    return observer.training_range(observer.update(observer.init(), observer.measure(flat)))
