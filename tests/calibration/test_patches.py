"""Products as matrix products, whatever they are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.calibration.call import EvaluationCall
from simqat_jax.calibration.patches import columns, kernel_of, patches
from simqat_jax.ir.graph import Product
from simqat_jax.numerics.contraction import partial_sums


class Einsum(nn.Module):
    """A kernel for each group of features."""

    @nn.compact
    def __call__(self, x):
        return jnp.einsum(
            "ngk,gkc->ngc", x, self.param("kernel", nn.initializers.normal(), (2, 3, 5))
        )


CASES = {
    "dense": (nn.Dense(5), (3, 4)),
    "rows": (nn.Dense(5), (3, 2, 4)),
    "general": (nn.DenseGeneral((2, 3), axis=(1, 2)), (3, 4, 5)),
    "groups of a product": (Einsum(), (4, 2, 3)),
    "conv": (nn.Conv(4, (3, 2)), (2, 6, 5, 3)),
    "strides": (nn.Conv(4, (3, 3), strides=2), (2, 7, 6, 3)),
    "valid": (nn.Conv(4, (2, 3), padding="VALID"), (2, 5, 6, 3)),
    "dilated": (nn.Conv(4, (3, 3), kernel_dilation=2, padding=((3, 0), (1, 2))), (2, 8, 7, 3)),
    "groups": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 5, 5, 4)),
    "depthwise": (nn.Conv(8, (3, 3), strides=2, feature_group_count=4), (2, 6, 6, 4)),
    "one axis": (nn.Conv(4, (3,)), (2, 6, 3)),
    "transposed": (nn.ConvTranspose(4, (3, 3), strides=(2, 2)), (2, 4, 4, 3)),
    "circular": (nn.Conv(4, (3, 3), padding="CIRCULAR"), (2, 5, 5, 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_patches_times_columns_are_the_product(case):
    module, shape = CASES[case]
    x = jax.random.normal(jax.random.key(1), shape)
    variables = module.init(jax.random.key(0), x)
    captured = EvaluationCall(sq.SimQAT().apply(module), None, {}).captured(variables, (x,))
    (node,) = (n for n in captured.graph.nodes if isinstance(n, Product))
    env = dict(zip(captured.graph.inputs, captured.inputs, strict=True))
    for made in captured.graph.nodes[: captured.graph.nodes.index(node)]:
        env.update(zip(made.outputs, made.run(*(env[v] for v in made.inputs)), strict=True))
    kernel = env[node.inputs[1]]

    @jax.jit
    def both(x, kernel):
        (product,) = node.multiplied(partial_sums, x, kernel, 1)
        return patches(node, x) @ columns(node, kernel), product

    got, want = both(env[node.inputs[0]], kernel)
    assert got.size == want.size
    # The same numbers, in the order of groups, rows and channels.
    np.testing.assert_allclose(np.sort(got, axis=None), np.sort(want, axis=None), atol=1e-5)
    np.testing.assert_array_equal(kernel_of(columns(node, kernel), kernel.shape), kernel)
    if node.channels_last:
        rows = got.transpose(1, 0, 2).reshape(want.shape)
        np.testing.assert_allclose(rows, want, atol=1e-5)
