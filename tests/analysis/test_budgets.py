"""Budgets of accuracy: what is suggested keeps them, measured by NumPy on the calibrated model."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

import simqat_jax as sq


@pytest.fixture(scope="module")
def wide(analyzed):
    """A model of 8 bits, analyzed on the 200 examples that it is calibrated on."""
    rng = np.random.default_rng(5)
    batches = [rng.normal(size=(n, 5)).astype(np.float32) for n in (120, 80)]
    qmodel = sq.SimQAT().apply(analyzed.qmodel.module)
    variables = sq.calibrate(qmodel, analyzed.floats, batches, progress=False)
    analysis = sq.analyze(qmodel, variables, batches, progress=False)
    return analyzed._replace(qmodel=qmodel, variables=variables, batches=batches, analysis=analysis)


@pytest.fixture(scope="module")
def labels(wide):
    """The float model's classes, a fifth of them wrong."""
    x = np.concatenate(wide.batches)
    y = np.asarray(wide.qmodel.module.apply(wide.floats, x)).argmax(-1)
    return np.where(np.arange(len(y)) % 5 == 0, (y + 1) % 4, y)


def outputs(wide, config) -> Any:
    """The float model's outputs, and those of a model that is calibrated with a configuration."""
    qmodel = sq.SimQAT(config).apply(wide.qmodel.module)
    variables = sq.calibrate(qmodel, wide.floats, wide.batches, progress=False)
    x = np.concatenate(wide.batches)
    return qmodel.module.apply(wide.floats, x), qmodel.apply(variables, x)


@pytest.mark.parametrize("drop", [0.05, 0.3])
def test_agreement_with_float(wide, drop):
    found = sq.suggest(wide.analysis, sq.MaxDrop(drop), progress=False)
    aims, got = outputs(wide, found.config)
    lost = 1 - np.mean(got.argmax(-1) == aims.argmax(-1))
    assert lost == pytest.approx(found.drop, abs=1e-6) and lost <= drop + 1e-6
    assert found.drop is not None and f"{100 * found.drop:.2f} points lost" in str(found)


def test_a_score_of_labels(wide, labels):
    def score(logits):
        assert isinstance(logits, np.ndarray) and len(logits) == len(labels)
        return (logits.argmax(-1) == labels).mean()

    found = sq.suggest(wide.analysis, sq.MaxDrop(0.3, score), progress=False)
    aims, got = outputs(wide, found.config)
    lost = np.mean(aims.argmax(-1) == labels) - np.mean(got.argmax(-1) == labels)
    assert lost == pytest.approx(found.drop, abs=1e-6) and lost <= 0.3
    strict = sq.suggest(wide.analysis, sq.MaxDrop(0.02, score), progress=False)
    assert found.nbytes < strict.nbytes


def test_no_kernel_is_measured_again(wide, capsys):
    sq.suggest(wide.analysis, sq.MaxBytes(40), widths=(2, 8), progress=False)
    sq.suggest(wide.analysis, sq.MaxDrop(0.5), widths=(2, 8))
    assert capsys.readouterr().err == ""


def test_a_drop_that_nothing_meets(wide):
    def score(logits):
        return -float(np.abs(logits - aims).max())

    aims = np.concatenate([wide.qmodel.module.apply(wide.floats, x) for x in wide.batches])
    with pytest.raises(ValueError, match=r"8 bits the score falls by .*MaxDrop is 1e-05. Look at"):
        sq.suggest(wide.analysis, sq.MaxDrop(1e-5, score), progress=False)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x), nn.Dense(3)(x)


def test_what_cannot_be_judged(wide):
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 3)))
    qmodel, variables = sq.SimQAT().apply(TwoHeads()), TwoHeads().init(jax.random.key(1), x)
    variables = sq.calibrate(qmodel, variables, [x], progress=False)
    two = sq.analyze(qmodel, variables, [x], progress=False)
    with pytest.raises(ValueError, match="MaxDrop judges one output, and this call returns 2"):
        sq.suggest(two, sq.MaxDrop(0.1), progress=False)
    module, binary = nn.Dense(1), sq.SimQAT().apply(nn.Dense(1))
    one = sq.calibrate(binary, module.init(jax.random.key(2), x), [x], progress=False)
    analysis = sq.analyze(binary, one, [x], progress=False)
    with pytest.raises(ValueError, match=r"outputs of shape \(4, 1\) have none.*Pass score="):
        sq.suggest(analysis, sq.MaxDrop(0.1), progress=False)
    positive = np.asarray(module.apply(one, x))[:, 0] > 0
    remedy = sq.MaxDrop(0.5, lambda logits: ((logits[:, 0] > 0) == positive).mean())
    found = sq.suggest(analysis, remedy, progress=False)
    assert found.drop is not None and found.drop <= 0.5
    budget = sq.MaxDrop(0.1, lambda logits: np.nan)
    with pytest.raises(ValueError, match="must return a finite number, got nan"):
        sq.suggest(wide.analysis, budget, progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("1 %",), TypeError, "MaxDrop takes a share, half a point is 0.005, got '1 %'"),
        ((-0.1,), ValueError, "MaxDrop must be 0 or more, got -0.1"),
        ((float("nan"),), ValueError, "MaxDrop must be 0 or more, got nan"),
        ((0.1, 0.9), TypeError, "MaxDrop.score must be a function of the outputs, got 0.9"),
    ],
)
def test_what_is_no_drop(given, error, message):
    with pytest.raises(error, match=message):
        sq.MaxDrop(*given)
