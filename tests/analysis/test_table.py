"""Tables fit a terminal."""

from simqat_jax.analysis.table import decibels, table


def test_a_table_has_eighty_columns():
    long = "/".join(f"Block_{k}" for k in range(12))
    lines = table(("layer", "bits"), [(long, "8"), ("short", "16"), ("left out", "4")], most=2)
    assert [len(line) for line in lines[:3]] == [80] * 3
    assert lines[1].startswith("...") and lines[1].endswith("Block_11     8")
    assert lines[2].split() == ["short", "16"] and lines[3] == "and 1 more"


def test_short_names_take_no_more_than_they_need():
    assert table(("layer", "bits"), [("a", "8")], most=5) == ["layer  bits", "a         8"]


def test_decibels():
    assert [decibels(v) for v in (12.345, -0.04, float("inf"))] == ["12.3 dB", "0.0 dB", "exact"]
    assert decibels(2.5, "+") == "+2.5 dB" and decibels(-float("inf")) == "-inf dB"
