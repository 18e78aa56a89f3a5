"""XNNPACK, which LiteRT computes with: sums in fixed point, rounding half up.

Its square root is not correctly rounded, and is made of other operations.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import true_divide
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.norms import heron
from simqat_jax.numerics.requantize import scaled
from simqat_jax.numerics.rounding.rounding import Grids, Norm, Product, Rounding, Sum


def sum_multipliers(grids: Grids, sign: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(ma, mb, sh)` of `fixed_point_sum`, int32.

    `ma = rint(ra * 2^sh)` with `ra = s_a / s_c` and `sh = 20 - floor(log2(max(ra, rb)))`.

    Args:
      grids: of both operands and of the output.
      sign: -1 for a subtraction.
    """
    a, b, y = (grid.params.scale for grid in grids)
    ratios = [true_divide(s, y) for s in (a, sign * b)]
    _, exponent = jnp.frexp(jnp.maximum(ratios[0], jnp.abs(ratios[1])))
    shift = jnp.clip(21 - exponent, 1, 30).astype(jnp.int32)
    ma, mb = (jnp.round(jnp.ldexp(r, shift)).astype(jnp.int32) for r in ratios)
    return ma, mb, shift


def fixed_point_sum(
    a: jax.Array, b: jax.Array, constants: Sequence[ArrayLike], grids: Grids
) -> jax.Array:
    """Add centered codes of up to 8 bits: `(a * ma + b * mb + 2^(sh-1)) >> sh`.

    Source:
      XNNPACK, quantized addition.
    """
    del grids
    ma, mb, shift = (jnp.asarray(v, jnp.int32) for v in constants)
    total = a * ma + b * mb + (1 << (shift - 1))
    return (total >> shift).astype(jnp.float32)


def product(products: jax.Array, multiplier: ArrayLike, grid: Grid) -> jax.Array:
    """Scale products as a layer scales its sums."""
    del grid
    return scaled(products, multiplier)


XNNPACK = Rounding(
    name="tflite",
    add=Sum("add", sum_multipliers, fixed_point_sum),
    subtract=Sum("add", partial(sum_multipliers, sign=-1), fixed_point_sum),
    multiply=Product("mul", product),
    norm=Norm("norm", "spread", heron),
)
