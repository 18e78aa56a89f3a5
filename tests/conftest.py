"""Every silent rank promotion is an error, as is every warning (pyproject.toml)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than running small models. Tests of bits ask for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import compilation
import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "simqat",
    deadline=None,
    max_examples=15 if os.environ.get("CI") else 40,
    derandomize=bool(os.environ.get("CI")),
)
hypothesis.settings.load_profile("simqat")


@pytest.fixture(scope="module")
def optimized():
    """Compile the tests of a module as users do: where what they promise depends on it."""
    jax.clear_caches()
    with compilation.optimized():
        yield
    jax.clear_caches()


def pytest_collection_modifyitems(items):
    """Mark what is compiled as users do: `make test` compiles all else with quicker flags."""
    for item in items:
        if "optimized" in item.fixturenames:
            item.add_marker("optimized")
