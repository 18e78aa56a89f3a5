"""The files of a run."""

import json
from pathlib import Path

import pytest

from experiments import configs, runs
from experiments.errors import ExperimentError


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    runs.write_json(path, {"accuracy": 0.5})
    assert path.read_text() == '{\n  "accuracy": 0.5\n}\n'
    with pytest.raises(TypeError):
        runs.write_json(path, {"accuracy": object()})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_start_leaves_an_empty_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = configs.get("lenet5_mnist")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(ExperimentError, match=r"cannot write .*: No space left on device"):
            runs.open_run(tmp_path, "run", experiment, resume=False)
    assert not list((tmp_path / "run").iterdir())
    run = runs.open_run(tmp_path, "run", experiment, resume=False)
    assert [p.name for p in run.iterdir()] == ["config.json"]
    assert runs.load_experiment(run) == experiment
