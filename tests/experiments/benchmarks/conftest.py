"""Benchmarks are only shown to run here: what they compile is not optimized."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do() -> None:
    """Not here."""
