"""The benchmark of training steps runs, and notes down what it measures."""

import pytest

from experiments.benchmarks import train_step
from experiments.benchmarks.records import read
from experiments.errors import ExperimentError


def test_train_step(capsys, tmp_path, monkeypatch):
    small = train_step.Workload(lambda: train_step.Chain(1), (4, 4, 1), (2,))
    monkeypatch.setitem(train_step.WORKLOADS, "small", small)
    history = tmp_path / "history.jsonl"
    train_step.main(("small",), ("none",), rounds=2, compilations=1, history=history)
    assert "training steps on" in capsys.readouterr().out
    records = read(history)
    assert [record.row.case["step"] for record in records] == ["float", "SimQAT none"]
    for name in ("step", "processor", "trace", "compile", "accessed", "temporary"):
        assert records[0].row.figures[f"{name} / float"].median == 1
        assert records[1].row.figures[f"{name} / float"].median > 0


def test_every_fold_mode_and_observer_is_a_step_to_compare():
    workload = train_step.WORKLOADS["resnet20"]
    assert list(train_step._models(workload, (), ("minmax", "mse"))) == [
        "float",
        "SimQAT none",
        "SimQAT one_conv",
        "SimQAT two_conv",
        "SimQAT one_conv, minmax",
        "SimQAT one_conv, mse",
    ]
    assert list(train_step._models(workload, ("two_conv",), ())) == ["float", "SimQAT two_conv"]


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="lenet6 is none of lenet5"):
        train_step.main(("lenet6",))
