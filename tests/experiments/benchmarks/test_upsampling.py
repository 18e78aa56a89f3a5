"""The benchmark of upsampling runs, and its files have the codes of their models."""

import re

import pytest

from experiments.benchmarks import upsampling


@pytest.mark.nightly
def test_upsampling(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    upsampling.main(channels=4, size=3, rounds=1, calls=1)
    printed = capsys.readouterr().out
    assert len(re.findall(r"\D 0\s+\S$", printed, re.MULTILINE)) == 3
