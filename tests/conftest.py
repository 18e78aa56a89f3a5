"""Every silent rank promotion is an error, as is every warning (pyproject.toml)."""

import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than running small models. Tests of bits ask for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What has been compiled serves all workers, the commands that they start, and the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

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


def pytest_configure(config):
    """Forget what was compiled days ago, once a run."""
    if not hasattr(config, "workerinput"):
        old = time.time() - 3 * 24 * 3600
        for file in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*"):
            if file.stat().st_mtime < old:
                file.unlink(missing_ok=True)


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
