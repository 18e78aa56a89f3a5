"""The benchmark of training steps runs, and notes down what it measures."""

import pytest

from experiments.benchmarks import train_step
from experiments.benchmarks.records import read
from experiments.errors import ExperimentError


def test_train_step(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(
        train_step.WORKLOADS,
        "small",
        train_step.Workload(lambda: train_step.Chain(1), (4, 4, 1), (2,)),
    )
    history = tmp_path / "history.jsonl"
    train_step.main(
        ("small",),
        folds=("none",),
        observers=("minmax",),
        rounds=2,
        compilations=1,
        history=history,
    )
    assert "training steps on" in capsys.readouterr().out
    records = read(history)
    assert [r.row.case["step"] for r in records] == [
        "float",
        "SimQAT none",
        "SimQAT one_conv, minmax",
    ]
    for name in ("step", "processor", "trace", "compile", "accessed", "temporary"):
        assert records[0].row.figures[f"{name} / float"].median == 1
        assert records[1].row.figures[f"{name} / float"].median > 0


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="lenet6 is none of lenet5"):
        train_step.main(("lenet6",))
