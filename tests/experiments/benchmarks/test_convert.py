"""The benchmark of conversion measures every stage, and each model by its size."""

import pytest

from experiments.benchmarks import convert
from experiments.benchmarks.train_step import Chain
from experiments.errors import ExperimentError


@pytest.mark.nightly
def test_every_stage_is_measured(tmp_path):
    found = convert.measure(Chain(2), (8, 8, 3), tmp_path)
    assert found["size"] == {"MB": pytest.approx(0.0117, abs=1e-3), "layers": 3}
    assert {path.name for path in tmp_path.iterdir()} == {"int8.onnx", "int8.tflite"}
    row = convert._row("chain", found)
    assert row.case["layers"] == "3"
    each = row.figures["convert, ms a layer"].median
    assert each == pytest.approx(1e3 * row.figures["convert, s"].median / 3) and each > 0
    assert {f"{stage}, s" for stage in convert.STAGES} <= row.figures.keys()


def test_an_unknown_model_is_refused():
    with pytest.raises(ExperimentError, match="resnet51 is none of resnet8"):
        convert.main(("resnet51",))
