"""Ratios as text."""

from simqat_jax.analysis.measures import decibels


def test_decibels():
    assert [decibels(v) for v in (12.345, -0.04, float("inf"))] == ["12.3 dB", "0.0 dB", "exact"]
    assert decibels(2.5, "+") == "+2.5 dB" and decibels(-float("inf")) == "-inf dB"
