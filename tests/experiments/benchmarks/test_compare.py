"""What became slower is shown, and what only spreads is not."""

import dataclasses

import pytest

from experiments.benchmarks import compare, records
from experiments.benchmarks.records import Row
from experiments.benchmarks.timing import Figure
from experiments.errors import ExperimentError


def noted(tmp_path, monkeypatch, commit, machine="one", **figures):
    monkeypatch.setattr(records, "_commit", lambda: commit)
    monkeypatch.setattr(records, "_machine", lambda: machine)
    rows = [Row(case={"model": "small"}, figures=figures)]
    records.report("test", "a title", rows, tmp_path / "history.jsonl")
    return tmp_path / "history.jsonl"


def test_slower_is_what_lies_above_all_that_it_was(tmp_path, monkeypatch, capsys):
    before = {"a, ms": Figure(10, 9, 11), "b, ms": Figure(10, 9, 12), "c, kB": Figure.exactly(100)}
    after = {"a, ms": Figure(13, 12, 14), "b, ms": Figure(13, 11, 14), "c, kB": Figure.exactly(90)}
    noted(tmp_path, monkeypatch, "abc1", **before)
    history = noted(tmp_path, monkeypatch, "def2", **after)
    assert records.read(history)[0].row.figures == before
    capsys.readouterr()
    assert compare.compare("abc", "def", history, everything=False)
    printed = capsys.readouterr().out
    assert "1 of 3" in printed and printed.count("slower") == 2 and printed.count("faster") == 1
    assert not compare.compare("abc", "abc1", history, everything=True)
    for pair in (("abc", "def"), ("def", "abc")):  # one is slower, the other larger by 11 %
        with pytest.raises(SystemExit):
            compare.main(*pair, history)


def test_other_machines_have_ratios_in_common(tmp_path, monkeypatch):
    figures = {"a, ms": Figure(10, 9, 11), "a / float": Figure(1, 0.9, 1.1)}
    noted(tmp_path, monkeypatch, "abc", "one", **figures)
    doubled = {name: figure.times(2) for name, figure in figures.items()}
    history = noted(tmp_path, monkeypatch, "def", "two", **doubled)
    (change,) = compare.changes(*(compare.records_of(c, history) for c in ("abc", "def")))
    assert change.what == "test: model small: a / float" and change.slower


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    history = noted(tmp_path, monkeypatch, "abc", **{"a, ms": Figure.exactly(1)})
    with pytest.raises(ExperimentError, match="no commit 123: it has abc"):
        compare.records_of("123", history)
    with pytest.raises(ExperimentError, match="does not exist"):
        records.read(tmp_path / "none.jsonl")
    history.write_text("{}\n")
    with pytest.raises(ExperimentError, match="is no history"):
        records.read(history)
    old = records.Record(
        benchmark="a", row=Row(case={}, figures={}), commit="1", machine="", versions={}, when=""
    )
    assert compare.changes([old], [dataclasses.replace(old, benchmark="b")]) == []
