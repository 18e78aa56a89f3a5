"""The benchmark of evaluation runs, and what it compares gives the same numbers."""

import pytest

from experiments.benchmarks import evaluate
from experiments.benchmarks.records import read
from experiments.errors import ExperimentError


def test_evaluate(capsys, tmp_path):
    history = tmp_path / "history.jsonl"
    evaluate.main(("lenet5",), rounds=1, history=history)
    assert capsys.readouterr().out.count(": 0 numbers differ") == 2
    rows = [record.row for record in read(history)]
    assert [row.case["evaluation"] for row in rows[:3]] == ["float", "simulation", "integer model"]
    for row in rows:
        is_float = row.case["evaluation"] == "float"
        assert (row.figures["processor / float"].median == 1) == is_float


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="lenet6 is none of lenet5"):
        evaluate.main(("lenet6",))
