"""The benchmark of training steps runs, and notes down what it measures."""

import jax
import numpy as np
import pytest

import simqat_jax as sq
from experiments.benchmarks import train_step
from experiments.benchmarks.folded import Folded
from experiments.benchmarks.records import read
from experiments.benchmarks.trainer import Trainer
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
        "float two_conv",
        "SimQAT none",
        "SimQAT one_conv",
        "SimQAT two_conv",
        "SimQAT one_conv, minmax",
        "SimQAT one_conv, mse",
    ]
    assert list(train_step._models(workload, ("one_conv",), ())) == ["float", "SimQAT one_conv"]


@pytest.mark.nightly
def test_a_folded_float_network_computes_the_same_with_the_convolutions_of_two_conv():
    chain = train_step.Chain(2)
    quantized = sq.SimQAT(sq.SimQATConfig(bn_fold="two_conv")).apply(chain)
    plain, twice, simulated = (
        Trainer(model, (4, 4, 1), 3) for model in (chain, Folded(chain), quantized)
    )
    for trainer in (plain, twice, simulated):
        trainer.trace()
    counts = [t.lowered.as_text().count("convolution(") for t in (plain, twice, simulated)]
    assert counts[0] < counts[1] == counts[2]
    images, labels = plain.batch
    state = {"model": plain.state[0]}, {"batch_stats": {"model": plain.state[1]["batch_stats"]}}
    after, loss = twice.step((*state, twice.optimizer.init(state[0])), (images, labels))
    want, expected = plain.step(plain.state, (images, labels))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        (after[0]["model"], after[1]["batch_stats"]["model"]),
        (want[0], want[1]["batch_stats"]),
    )


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="lenet6 is none of lenet5"):
        train_step.main(("lenet6",))
