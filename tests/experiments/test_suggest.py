"""Suggested widths are those of the calibrated model, and keep what they promise."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.benchmarks.ptq import Workload
from experiments.suggest import Arguments, Row, Unmet, check


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def network():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    labels = np.argmax(Net().apply(variables, x), -1)
    return Workload(Net(), variables, [x[:32], x[32:]], x, labels)


def test_budgets_are_met():
    arguments = Arguments(network="net", shares=(0.75,), losses=(16.0,), drops=(0.1,))
    rows = [row for row in check(network(), arguments) if isinstance(row, Row)]
    whole, smaller, noisier, alike = rows
    assert (whole.budget, whole.nbytes) == ("8 bits", 6 * 8 + 8 * 3)
    assert smaller.nbytes <= 54 and noisier.nbytes < whole.nbytes
    assert noisier.promised >= whole.promised - 16
    assert alike.alike >= 0.9 and alike.nbytes < whole.nbytes
    for row in rows:
        assert row.in_model == row.nbytes
        assert row.kept == pytest.approx(row.promised, abs=0.05)
    assert whole.accuracy > 0.9


def test_what_no_widths_meet_leaves_the_other_budgets():
    arguments = Arguments(network="net", shares=(0.1, 0.75), losses=(), drops=())
    _, unmet, met = check(network(), arguments)
    assert isinstance(unmet, Unmet) and "Allow more bytes" in unmet.reason
    assert isinstance(met, Row) and met.nbytes <= 54
