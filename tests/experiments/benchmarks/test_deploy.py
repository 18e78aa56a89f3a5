"""The benchmark of files runs, and what it compares is the same network."""

import pytest

from experiments.benchmarks import deploy
from experiments.benchmarks.records import read


@pytest.mark.nightly
# OpenVINO, where it is installed, starts a process of its own.
@pytest.mark.filterwarnings("ignore:os.fork")
def test_deploy(capsys, tmp_path):
    history, files = tmp_path / "history.jsonl", tmp_path / "files"
    deploy.main("lenet5", (1,), rounds=1, images=8, folder=files, history=history)
    assert capsys.readouterr().out.count("of the integer model 0 of 80 codes differ") == 2
    rows = [record.row for record in read(history)]
    int8 = [row for row in rows if row.case["file"] == "int8"]
    assert len(int8) >= 4 and 2 * len(int8) == len(rows)  # two files, two batch sizes
    own = [row for row in int8 if "OpenVINO" not in row.case["runtime"]]
    for row in own:
        assert row.figures["differing of 80"].median == 0
        assert row.figures["p99, µs"].median >= row.figures["p50, µs"].median > 0
        assert row.figures["kB"].median <= 74.5  # 61,470 weights; in ONNX 3,360 zeros more
    assert len(list(files.iterdir())) == 4
