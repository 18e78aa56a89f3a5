"""Suggested widths meet their budget once the model is calibrated with them."""

import pytest

import simqat_jax as sq
from simqat_jax.numerics.packing import packed_bytes


def calibrated(analyzed, config):
    """The model with another configuration, on the same data."""
    qmodel = sq.SimQAT(config).apply(analyzed.qmodel.module)
    return qmodel, sq.calibrate(qmodel, analyzed.floats, analyzed.batches[:1], progress=False)


def kernels(analyzed, config):
    """The bytes that an integer model's kernels take, and its output's error."""
    qmodel, variables = calibrated(analyzed, config)
    model = sq.convert(qmodel, variables, analyzed.batches[0])
    return sum(packed_bytes(op.arrays["kernel"]) for op in model.ops if "kernel" in op.arrays)


@pytest.mark.parametrize("nbytes", [14, 21, 27, 40, 54, 1000])
def test_bytes(analyzed, nbytes):
    """Kernels of 30 and 24 weights."""
    found = sq.suggest(analyzed.analysis, sq.MaxBytes(nbytes), progress=False)
    assert found.nbytes <= nbytes
    assert kernels(analyzed, found.config) <= found.nbytes
    qmodel, variables = calibrated(analyzed, found.config)
    after = sq.analyze(qmodel, variables, analyzed.batches, progress=False)
    assert after.sqnr == pytest.approx(found.sqnr, abs=1e-3)
    bits = {name: t.spec.num_bits for name, t in after.tensors.items() if t.role == "weight"}
    assert bits == found.widths


def test_more_bytes_are_no_worse(analyzed):
    found = [
        sq.suggest(analyzed.analysis, sq.MaxBytes(n), progress=False).sqnr for n in (14, 27, 54)
    ]
    assert found == sorted(found) and found[0] < found[-1]


def test_decibels(analyzed):
    best = sq.suggest(analyzed.analysis, sq.MaxBytes(1000), progress=False)
    for least in (best.sqnr, best.sqnr - 1, best.sqnr - 4):
        found = sq.suggest(analyzed.analysis, sq.MinSqnr(least), progress=False)
        assert found.sqnr >= least and found.nbytes <= best.nbytes
    assert found.nbytes < best.nbytes
    assert f"{found.nbytes:,} bytes" in str(found) and "first/kernel" in str(found)


def test_budgets_that_nothing_meets(analyzed):
    with pytest.raises(ValueError, match="kernels of 2 bits take 14 bytes, and MaxBytes is 13"):
        sq.suggest(analyzed.analysis, sq.MaxBytes(13), progress=False)
    with pytest.raises(ValueError, match=r"MinSqnr is 90. Look at analysis.layers"):
        sq.suggest(analyzed.analysis, sq.MinSqnr(90), progress=False)


def test_what_is_no_budget(analyzed):
    with pytest.raises(TypeError, match=r"budget must be MaxBytes\(...\) or MinSqnr\(...\)"):
        sq.suggest(analyzed.analysis, 1000, progress=False)
    with pytest.raises(TypeError, match="MinSqnr takes a number"):
        sq.MinSqnr("20")
    with pytest.raises(ValueError, match="MaxBytes must be a whole number"):
        sq.MaxBytes(0)
    with pytest.raises(ValueError, match="widths must be a whole number, 2 or more"):
        sq.suggest(analyzed.analysis, sq.MaxBytes(100), widths=(1, 8), progress=False)
