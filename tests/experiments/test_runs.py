"""The files of a run."""

import json
from pathlib import Path

import pytest

from experiments import configs, locks, runs
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
        with (
            pytest.raises(ExperimentError, match=r"cannot write .*: No space left on device"),
            runs.open_run(tmp_path, "run", experiment, resume=False),
        ):
            pytest.fail("there is no room for a run")
    assert _visible(tmp_path / "run") == []
    with runs.open_run(tmp_path, "run", experiment, resume=False) as run:
        assert _visible(run) == ["config.json"]
    assert runs.load_experiment(run) == experiment


def _visible(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir() if p.name != locks.NAME)


LEFT_BEHIND = ("config.json.tmp", ".config.json.0123456789abcdef.part", locks.NAME)
"""By processes that were killed while they started a run, of this version and earlier ones."""


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_process_left_is_no_run(resume: bool, tmp_path: Path) -> None:
    experiment = configs.get("lenet5_mnist")
    if resume:
        with runs.open_run(tmp_path, "run", experiment, resume=False):
            pass
    (tmp_path / "run").mkdir(exist_ok=True)
    for name in LEFT_BEHIND:
        (tmp_path / "run" / name).write_text("{")
    with runs.open_run(tmp_path, "run", experiment, resume=resume) as run:
        assert _visible(run) == ["config.json"]
    assert runs.load_experiment(run) == experiment


def test_what_is_no_leftover_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (*LEFT_BEHIND, "notes.txt"):
        (tmp_path / "run" / name).write_text("")
    before = sorted((tmp_path / "run").iterdir())
    with (
        pytest.raises(ExperimentError, match="already holds another run"),
        runs.open_run(tmp_path, "run", configs.get("lenet5_mnist"), resume=False),
    ):
        pytest.fail("there is something already")
    assert sorted((tmp_path / "run").iterdir()) == before


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(ExperimentError, match=r"cannot write .*results\.json: .*--resume"):
        runs.write_results(tmp_path, configs.get("lenet5_mnist"), {})


def test_a_run_of_an_earlier_version_lacks_newer_settings(tmp_path: Path) -> None:
    experiment = configs.get("lenet5_mnist", seed=3)
    with runs.open_run(tmp_path, "run", experiment, resume=False) as run:
        settings = json.loads((run / "config.json").read_text())
    del settings["optimizer"], settings["quant"]["rules"], settings["quant"]["weight"]["observer"]
    runs.write_json(run / "config.json", settings)
    assert runs.load_experiment(run) == experiment
    settings["optimizer"] = "adamw"
    runs.write_json(run / "config.json", settings)
    with pytest.raises(ExperimentError, match="optimizer: 'adamw' in the run, 'sgd' now"):
        runs.load_experiment(run)
