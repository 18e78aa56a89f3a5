"""The square root of norms, of every variance that codes have."""

import jax.numpy as jnp
import numpy as np
import pytest

from simqat_jax.numerics.norms import MOST_ELEMENTS, heron

LEAST, LARGEST = (1 - 1 / MOST_ELEMENTS) / MOST_ELEMENTS, 127.5**2
"""Variances of codes of which one differs by 1, and of codes at both ends."""


@pytest.mark.parametrize("epsilon", [2.0**-40, 1e-6, 1e-3, 1.0, 1e3, 1e7, 1e30])
def test_herons_iteration_arrives(epsilon):
    """Within one and a half times the rounding of a square root."""
    variances = np.geomspace(LEAST, LARGEST, 20_000).astype(np.float32) + np.float32(epsilon)
    got = np.asarray(heron(jnp.asarray(variances), jnp.float32(epsilon)))
    np.testing.assert_allclose(got, np.sqrt(variances.astype(np.float64)), rtol=1.6 * 2.0**-24)
