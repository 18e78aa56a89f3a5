"""The benchmark of training steps runs."""

import pytest

from experiments.benchmarks import train_step


@pytest.mark.nightly
def test_train_step(capsys):
    train_step.main("lenet5", rounds=1, calls=1, compilations=1)
    assert "lenet5: training step" in capsys.readouterr().out
