"""ONNX Runtime: sums and products in float32, the zero point added before rounding.

Its square root is correctly rounded.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from simqat_jax.numerics.affine import own_rounding, rounded_product, true_divide
from simqat_jax.numerics.grid import Grid
from simqat_jax.numerics.rounding.rounding import Grids, Norm, Product, Rounding, Sum


def _fused_multiply_add(x: ArrayLike, y: ArrayLike, addend: ArrayLike) -> jax.Array:
    """Return `x * y + addend` of float32, rounded once.

    In float64 the product is exact, and the sum is rounded to odd before it is rounded to float32.
    """
    with jax.enable_x64(True):
        product, addend = (
            jnp.asarray(x).astype(jnp.float64) * jnp.asarray(y).astype(jnp.float64),
            jnp.asarray(addend).astype(jnp.float64),
        )
        total = product + addend
        part = total - product
        error = (product - (total - part)) + (addend - part)
        bits = jax.lax.bitcast_convert_type(total, jnp.int64)
        outward = (error > 0) == (total > 0)
        odd = bits + jnp.where(outward, 1, -1).astype(jnp.int64)
        inexact = (error != 0) & (bits & 1 == 0)
        total = jnp.where(inexact, jax.lax.bitcast_convert_type(odd, jnp.float64), total)
        return total.astype(jnp.float32)


def sum_multipliers(grids: Grids) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `(ra, rb, z)` of `fused_sum`, float32.

    `z = z_c - fma(ra, z_a, f32(rb * z_b))`, as the x86-64 build of ONNX Runtime contracts it.
    """
    a, b, y = grids
    ra, rb = (true_divide(grid.params.scale, y.params.scale) for grid in (a, b))
    return ra, rb, y.zero - _fused_multiply_add(ra, a.zero, rounded_product(rb, b.zero))


def fused_sum(
    a: jax.Array, b: jax.Array, constants: Sequence[ArrayLike], grids: Grids
) -> jax.Array:
    """Add centered codes of up to 8 bits: `rint(fma(q_a, ra, fma(q_b, rb, z))) - z_c`.

    `q` are codes whose zero point is not subtracted.

    Source:
      ONNX Runtime, QLinearAdd; each `fma` rounds once, to float32.
    """
    ra, rb, z = (jnp.asarray(v, jnp.float32) for v in constants)
    qa, qb = (v + grid.params.zero_point for v, grid in zip((a, b), grids[:2], strict=True))
    return jnp.round(_fused_multiply_add(qa, ra, _fused_multiply_add(qb, rb, z))) - grids[2].zero


def real_difference(
    a: jax.Array, b: jax.Array, constants: Sequence[ArrayLike], grids: Grids
) -> jax.Array:
    """Subtract real values: `rint((a * s_a - b * s_b) / s_c)`.

    Source:
      ONNX Runtime, which has no integer subtraction.
    """
    del constants
    x, y = (
        rounded_product(v.astype(jnp.float32), grid.params.scale)
        for v, grid in zip((a, b), grids[:2], strict=True)
    )
    return jnp.round(true_divide(x - y, grids[2].params.scale))


def product(products: jax.Array, multiplier: ArrayLike, grid: Grid) -> jax.Array:
    """Scale products: `rint(f32(product * m) + z_c) - z_c`; adding first moves ties.

    Source:
      ONNX Runtime, QLinearMul.
    """
    scaled = rounded_product(products.astype(jnp.float32), multiplier)
    return jnp.round(scaled + grid.zero) - grid.zero


ONNXRUNTIME = Rounding(
    name="onnx",
    add=Sum("add_onnx", sum_multipliers, fused_sum),
    subtract=Sum("sub_onnx", lambda grids: (), real_difference),
    multiply=Product("mul_onnx", product),
    norm=Norm("norm_onnx", "spread_onnx", lambda v, epsilon: own_rounding(jnp.sqrt(v))),
)
