"""Every silent rank promotion is an error, as is every warning (pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "simqat", deadline=None, max_examples=40, derandomize=bool(os.environ.get("CI"))
)
hypothesis.settings.load_profile("simqat")


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiling takes longer than running small models: leave most optimizations out."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
