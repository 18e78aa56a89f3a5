"""Experiments are compiled as users do: most of their tests train, for which it pays."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do(optimized: None) -> Iterator[None]:
    """Also in the processes that a test starts: what both compute is the same to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield
