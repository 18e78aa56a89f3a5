"""Suggested widths meet their budget once the model is calibrated with them."""

import pytest

import simqat_jax as sq
from simqat_jax.numerics.packing import packed_bytes


@pytest.fixture(scope="module")
def by_bytes(analyzed):
    """What is suggested for kernels of 30 and 24 weights."""
    budgets = (14, 21, 27, 40, 54)
    return {n: sq.suggest(analyzed.analysis, sq.MaxBytes(n), progress=False) for n in budgets}


def test_bytes(by_bytes):
    for nbytes, found in by_bytes.items():
        sizes = {"first/kernel": 30, "last/kernel": 24}
        parts = [-(-sizes[name] * bits // 8) for name, bits in found.widths.items()]
        assert sum(parts) == found.nbytes <= nbytes
    assert set(by_bytes[14].widths.values()) == {2} and set(by_bytes[54].widths.values()) == {8}
    assert by_bytes[14].sqnr < by_bytes[27].sqnr < by_bytes[54].sqnr


def test_the_calibrated_model_is_as_good_and_as_small(analyzed, by_bytes):
    found = by_bytes[40]
    assert len(set(found.widths.values())) == 2
    qmodel = sq.SimQAT(found.config).apply(analyzed.qmodel.module)
    variables = sq.calibrate(qmodel, analyzed.floats, analyzed.batches[:1], progress=False)
    after = sq.analyze(qmodel, variables, analyzed.batches, progress=False)
    assert after.sqnr == pytest.approx(found.sqnr, abs=1e-3)
    bits = {name: t.spec.num_bits for name, t in after.tensors.items() if t.role == "weight"}
    assert bits == found.widths
    ops = sq.convert(qmodel, variables, analyzed.batches[0]).ops
    arrays = [op.arrays["kernel"] for op in ops if "kernel" in op.arrays]
    assert len(arrays) == 2 and sum(map(packed_bytes, arrays)) <= found.nbytes


def test_decibels(analyzed, by_bytes):
    best = by_bytes[54]
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
    with pytest.raises(TypeError, match=r"budget must be MaxBytes\(...\), MinSqnr"):
        sq.suggest(analyzed.analysis, 1000, progress=False)
    with pytest.raises(TypeError, match="MinSqnr takes a number"):
        sq.MinSqnr("20")
    with pytest.raises(ValueError, match="MaxBytes must be a whole number"):
        sq.MaxBytes(0)
    with pytest.raises(ValueError, match="widths is empty"):
        sq.suggest(analyzed.analysis, sq.MaxBytes(100), widths=(), progress=False)
    with pytest.raises(ValueError, match="widths must be a whole number, 2 or more"):
        sq.suggest(analyzed.analysis, sq.MaxBytes(100), widths=(1, 8), progress=False)
