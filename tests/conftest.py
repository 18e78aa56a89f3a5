"""Every warning is an error, every silent rank promotion too."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn warnings into errors in every test, but for those of other packages' own imports."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("error"), append=False)
