"""The benchmark of observers runs, and measures every way to take ranges."""

import io

import pytest
from rich.console import Console

from experiments.benchmarks import observers


@pytest.mark.nightly
def test_observers():
    console = Console(file=io.StringIO(), width=200)
    observers.measure(observers.Arguments(epochs=1, images=(2,), draws=1), console)
    printed = console.file.getvalue()
    assert all(way in printed for way in observers.WAYS)
