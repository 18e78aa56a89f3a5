"""The benchmark of files runs, and what it compares is the same network."""

import pytest

from experiments.benchmarks import deploy


# OpenVINO, where it is installed, starts a process of its own.
@pytest.mark.filterwarnings("ignore:os.fork")
def test_deploy(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    deploy.main("lenet5", rounds=1, images=8, folder=tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("0 of 80") == 4  # two files and two integer models
    assert len(list(tmp_path.iterdir())) == 4
    files = list(tmp_path.glob("int8.*"))  # of 61,470 weights
    assert files and all(file.stat().st_size <= 70_500 for file in files)
