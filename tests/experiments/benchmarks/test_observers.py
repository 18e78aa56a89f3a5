"""The benchmark of observers runs, and measures every way to take ranges."""

import io

import pytest
from rich.console import Console

from experiments.benchmarks import observers


@pytest.mark.nightly
def test_observers():
    printed = io.StringIO()
    arguments = observers.Arguments(epochs=1, images=(2,), draws=1)
    observers.measure(arguments, Console(file=printed, width=200))
    assert all(way in printed.getvalue() for way in observers.WAYS)
