"""The best choices are those that trying all of them finds."""

import itertools

import numpy as np
import pytest

from simqat_jax.analysis import frontier
from simqat_jax.analysis.frontier import Frontier, Option


def tried(parts, cap):
    """The least noise of all choices that fit."""
    fitting = [c for c in itertools.product(*parts) if sum(o.size for o in c) <= cap]
    return min((sum(o.noise for o in c) for c in fitting), default=None)


@pytest.mark.parametrize("seed", range(5))
def test_every_size(seed):
    rng = np.random.default_rng(seed)
    parts = [
        [Option(int(rng.integers(1, 20)), float(rng.integers(1, 1000))) for _ in range(3)]
        for _ in range(4)
    ]
    found, best = Frontier(parts), None
    for cap in range(80):
        aim = tried(parts, cap)
        assert (cap in found.caps) == (aim is not None and aim != best)
        best = aim
        if aim is not None:
            chosen = [part[n] for part, n in zip(parts, found.choice(cap), strict=True)]
            assert sum(o.size for o in chosen) <= cap
            assert sum(o.noise for o in chosen) == aim


def test_large_sizes_are_rounded_up(monkeypatch):
    monkeypatch.setattr(frontier, "_UNITS", 10)
    found = Frontier([[Option(25, 4.0), Option(101, 1.0)], [Option(30, 8.0), Option(99, 2.0)]])
    assert found.caps[0] >= 55 and found.choice(found.caps[0]) == [0, 0]
    assert found.choice(10_000) == [1, 1]
    for cap in found.caps:
        sizes = [(25, 101)[found.choice(cap)[0]], (30, 99)[found.choice(cap)[1]]]
        assert sum(sizes) <= cap
