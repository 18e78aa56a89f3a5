"""Training end to end: the three phases, resume after a kill, evaluation, wrong input."""

import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments import (
    checkpoints,
    comparison,
    configs,
    data,
    deploy,
    errors,
    evaluate,
    phases,
    runs,
    train,
)

ROOT = Path(__file__).parents[2]
ARGUMENTS = train.Arguments(
    config="lenet5_mnist",
    data="mnist5k",
    epochs=2,
    batch_size=100,
    learning_rate=0.05,
    checkpoint_every=15,
)
STEPS = 80


@pytest.fixture(scope="module", autouse=True)
def compiled_as_users_do(optimized: None) -> Iterator[None]:
    """Also in the processes that a test starts: what both compute is the same to the bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
        yield


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory of runs, the same in all processes that run tests; decoded data are cached."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMQAT_CACHE_DIR", str(tmp_path_factory.mktemp("experiments") / "cache"))
        yield shared / "runs"


@pytest.fixture(scope="module")
def finished(runs_dir: Path) -> Path:
    """A run that nothing has interrupted, trained by the first process that asks for it."""
    runs_dir.mkdir(exist_ok=True)
    with (runs_dir.parent / "finished.lock").open("a") as trained:
        fcntl.flock(trained, fcntl.LOCK_EX)
        if not Path(trained.name).stat().st_size:
            arguments = dataclasses.replace(ARGUMENTS, runs_dir=runs_dir, name="finished")
            train.run_experiment(arguments, Console(quiet=True))
            trained.write("yes")
    return runs_dir / "finished"


def _results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def _command(runs_dir: Path, name: str) -> list[str]:
    options = f"--config lenet5_mnist --data mnist5k --epochs 2 --batch-size 100 --name {name}"
    options += f" --learning-rate 0.05 --checkpoint-every 15 --runs-dir {runs_dir}"
    return [sys.executable, "-m", "experiments.train", *options.split()]


def _kill_when(path: Path, command: list[str]) -> None:
    """Start the command and end it with SIGKILL as soon as `path` exists."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not path.exists():
            assert process.poll() is None, f"ended before {path} was written"
            assert time.monotonic() < deadline, f"{path} was not written"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _final_state(run: Path, name: str) -> phases.TrainState:
    experiment = runs.load_experiment(run)
    phase = phases.build(name, experiment, data.load(experiment.data), run)
    assert checkpoints.latest(phase.directory) == STEPS
    return checkpoints.restore(phase.directory, STEPS, phases.init_state(phase))[0]


def _assert_same_state(one: phases.TrainState, other: phases.TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    found = dict(jax.tree_util.tree_leaves_with_path(other))
    for path, leaf in jax.tree_util.tree_leaves_with_path(one):
        assert np.asarray(leaf).tobytes() == np.asarray(found[path]).tobytes(), path


def _without_times(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if "seconds" not in k} for record in history]


def test_resume_after_kills_equals_an_uninterrupted_run(finished: Path, runs_dir: Path) -> None:
    killed = runs_dir / "killed"
    _kill_when(killed / "float" / "15", _command(runs_dir, "killed"))
    assert checkpoints.latest(killed / "float") != STEPS
    _kill_when(killed / "qat" / "55", [*_command(runs_dir, "killed"), "--resume"])
    assert checkpoints.latest(killed / "qat") != STEPS
    assert not (killed / "results.json").exists()
    float_directory = killed / "float" / str(STEPS)
    written = float_directory.stat().st_mtime_ns
    arguments = dataclasses.replace(ARGUMENTS, runs_dir=runs_dir, name="killed", resume=True)
    train.run_experiment(arguments, Console(quiet=True))
    assert float_directory.stat().st_mtime_ns == written, "a finished phase was trained again"

    for name in phases.NAMES:
        one, other = _final_state(finished, name), _final_state(killed, name)
        _assert_same_state(one, other)
        assert ("quant_stats" in one.collections) == (name != "float")
        history = _results(finished)["history"][name]
        assert _without_times(history) == _without_times(_results(killed)["history"][name])


def test_results_and_what_is_kept(finished: Path) -> None:
    results = _results(finished)
    for name in phases.NAMES:
        assert results[f"{name}_accuracy"] > 0.5
        assert 0 < results[f"{name}_seconds_per_step"] < 1
        assert [record["epoch"] for record in results["history"][name]] == [1, 2]
        losses = [record["loss"] for record in results["history"][name]]
        assert losses[1] < losses[0]
        assert sorted(int(p.name) for p in (finished / name).iterdir()) == [70, 80]
    # Fine-tuning starts from what the float phase has learned.
    assert results["history"]["qat_finetune"][0]["loss"] < results["history"]["qat"][0]["loss"] / 2
    expected = {"seed": 0, "epochs": 2, "data": "mnist5k", "batch_size": 100}
    assert {key: results[key] for key in expected} == expected
    assert set(results["versions"]) == {"python", "jax", "flax", "simqat_jax"}


def test_the_plan_is_in_a_file(finished: Path) -> None:
    plan = (finished / "plan.txt").read_text()
    assert plan.startswith("SimQAT plan: bn_fold=") and "Dense_2" in plan
    assert "per channel (axis -1, 10), batch" in plan, "with its details"


def test_fine_tuning_from_another_runs_float_phase(finished: Path, runs_dir: Path) -> None:
    arguments = dataclasses.replace(
        ARGUMENTS,
        runs_dir=runs_dir,
        name="tuned",
        phases=("qat_finetune",),
        float_checkpoint=str(finished),
    )
    train.run_experiment(arguments, Console(quiet=True))
    run = runs_dir / "tuned"
    _assert_same_state(_final_state(finished, "qat_finetune"), _final_state(run, "qat_finetune"))
    assert not (run / "float").exists()
    results = _results(run)
    assert results["settings"]["float_checkpoint"] == str(finished)
    for phase in ("float", "qat_finetune"):
        assert results[f"{phase}_accuracy"] == _results(finished)[f"{phase}_accuracy"]


def test_a_float_checkpoint_is_a_run_a_phase_or_one_checkpoint(finished: Path) -> None:
    expected = _final_state(finished, "float")
    for path in (finished, finished / "float", finished / "float" / str(STEPS)):
        trained, progress = phases.read_float(path)
        jax.tree.map(np.testing.assert_array_equal, trained.params, expected.params)
        assert progress.epoch == 2
    assert phases.read_float(finished / "float" / "70")[1].step == 30


def test_phases_can_be_trained_one_by_one(finished: Path, runs_dir: Path) -> None:
    arguments = dataclasses.replace(ARGUMENTS, runs_dir=runs_dir, name="parts", phases=("float",))
    train.run_experiment(arguments, Console(quiet=True))
    assert set(_results(runs_dir / "parts")["history"]) == {"float"}
    later = dataclasses.replace(arguments, phases=("qat_finetune",), resume=True)
    train.run_experiment(later, Console(quiet=True))
    run = runs_dir / "parts"
    assert list(_results(run)["history"]) == ["float", "qat_finetune"]
    _assert_same_state(_final_state(finished, "qat_finetune"), _final_state(run, "qat_finetune"))


def test_float_checkpoint_of_another_architecture(finished: Path, tmp_path: Path) -> None:
    arguments = dataclasses.replace(
        ARGUMENTS,
        config="resnet20_cifar10",
        warmup_epochs=0,
        float_checkpoint=str(finished),
        runs_dir=tmp_path,
    )
    with pytest.raises(
        errors.ExperimentError, match=r"--float-checkpoint .* does not fit"
    ) as error:
        train.run_experiment(arguments, Console(quiet=True))
    lines = [line.strip() for line in str(error.value).splitlines()]
    for line in (
        "missing: params/BasicBlock_0/Conv_0/kernel (3, 3, 16, 16)",
        "missing: batch_stats/norm_stem/mean (16,)",
        "extra:   params/Conv_1/kernel (5, 5, 6, 16)",
        "extra:   params/Dense_2/bias (10,)",
        "shape:   params/Dense_0/kernel is (400, 120), the model has (64, 10)",
    ):
        assert line in lines
    assert sum(line.startswith("extra:") for line in lines) == 6
    assert not list(tmp_path.iterdir())


def test_unfit_starts_of_fine_tuning(finished: Path, tmp_path: Path) -> None:
    place = {"runs_dir": tmp_path, "name": "x"}
    _expect("has no float parameters to start from", phases=("qat_finetune",), **place)
    _expect(
        "takes the place of the float phase",
        phases=("float", "qat_finetune"),
        float_checkpoint=str(finished),
        **place,
    )
    for path in (tmp_path, tmp_path / "absent", finished / "qat", finished / "float" / "7"):
        _expect(re.escape(f"no float checkpoint at {path}"), float_checkpoint=str(path), **place)
    shutil.copytree(finished / "float", tmp_path / "float")
    (tmp_path / "float" / str(STEPS) / "state" / "_METADATA").write_text("{")
    _expect(f"{STEPS} is corrupt", float_checkpoint=str(tmp_path), **place)
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_evaluate_finds_the_trained_accuracy(finished: Path) -> None:
    results = _results(finished)
    found = evaluate.evaluate(finished)
    assert [(e.phase, e.step) for e in found] == [(name, STEPS) for name in phases.NAMES]
    assert [e.accuracy for e in found] == [results[f"{n}_accuracy"] for n in phases.NAMES]
    assert evaluate.evaluate(finished / "qat") == [found[1]]
    assert evaluate.evaluate(finished / "qat" / "80") == [found[1]]


def test_evaluation_writes_nothing_into_the_run(finished: Path) -> None:
    """So that a run on a read-only disk can be evaluated."""
    paths = (finished, *finished.rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    evaluate.evaluate(finished / "qat")
    paths = (finished, *finished.rglob("*"))
    assert {path: path.stat().st_mtime_ns for path in paths} == before


def test_files_that_cannot_be_written_are_one_line(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "deploy").write_text("no directory")
    with pytest.raises(errors.ExperimentError, match=rf"^cannot write {run}/deploy: .*\.$"):
        deploy.deploy(run, examples=10)


def test_deployed_files_compute_what_evaluation_shows(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    rows = deploy.deploy(run, examples=200)
    assert [row.what for row in rows[:2]] == [
        "float baseline, JAX",
        "SimQAT's parameters in float, JAX",
    ]
    assert [row.differing for row in rows] == [None, None, *[0] * 6]
    assert len({row.accuracy for row in rows[2:]}) == 1
    for name in ("model.onnx", "model.tflite"):
        assert (run / "deploy" / name).stat().st_size < 75_000
    report = json.loads((run / "deploy" / "deploy.json").read_text())
    assert (report["phase"], report["images"], len(report["rows"])) == ("qat_finetune", 200, 8)
    shown = io.StringIO()
    comparison.show(rows, str(run), Console(file=shown, width=200))
    assert 'against the row "SimQAT\'s parameters in float, JAX"' in shown.getvalue()


def test_the_baseline_of_a_deployment_is_the_float_phase(finished: Path, tmp_path: Path) -> None:
    """That of the run, or of the run that it started from, while that is there."""
    experiment = runs.load_experiment(finished)
    dataset = data.load(experiment.data)
    found = deploy.baseline(experiment, dataset, finished)
    assert found is not None
    _assert_same_state(_final_state(finished, "float").params, found["params"])
    started = dataclasses.replace(experiment, float_checkpoint=str(finished))
    again = deploy.baseline(started, dataset, tmp_path)
    assert again is not None
    _assert_same_state(found["params"], again["params"])
    for elsewhere in (None, str(tmp_path / "gone")):
        moved = dataclasses.replace(experiment, float_checkpoint=elsewhere)
        assert deploy.baseline(moved, dataset, tmp_path) is None


def test_deploy_refuses_what_holds_nothing_quantized(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("qat", "qat_finetune"):
        shutil.rmtree(run / name)
    with pytest.raises(errors.ExperimentError, match=r"nothing to deploy in .*qat_finetune"):
        deploy.deploy(run)


def test_evaluate_refuses_what_is_no_run(finished: Path, tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "absent", "no such directory"),
        (tmp_path, "give a run, such as runs/NAME"),
        (finished / "qat" / "70000", "no such directory"),
    ):
        with pytest.raises(errors.ExperimentError, match=message):
            evaluate.evaluate(path)
    shutil.copytree(finished / "qat", tmp_path / "qat")
    with pytest.raises(errors.ExperimentError, match=r"it has no config\.json"):
        evaluate.evaluate(tmp_path)
    for content in ("{", "[]", '{"config": "lenet6"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(errors.ExperimentError, match=r"cannot be read|unknown config"):
            evaluate.evaluate(tmp_path)


def _expect(message: str, **options: object) -> None:
    arguments = dataclasses.replace(ARGUMENTS, **options)
    with pytest.raises(errors.ExperimentError, match=message):
        train.run_experiment(arguments, Console(quiet=True))


def test_run_directories_are_never_overwritten(finished: Path, runs_dir: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    _expect("already holds another run.*--resume.*--name", runs_dir=runs_dir, name="finished")
    _expect(
        r"(?s)epochs: 2 in the run, 3 now.*learning_rate: 0.05 in the run, 0.02 now",
        runs_dir=runs_dir,
        name="finished",
        epochs=3,
        learning_rate=0.02,
        resume=True,
    )
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_resume_refuses_a_corrupt_checkpoint(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished, run)
    (run / "qat" / "80" / "state" / "_METADATA").write_text("{")
    message = re.escape(f"{run / 'qat' / '80'} is corrupt")
    _expect(message, runs_dir=tmp_path, name="copy", resume=True)


def test_unfit_directories(runs_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _expect("cannot write the run directory", runs_dir=tmp_path / "file")
    _expect("cannot write the run directory", runs_dir=tmp_path, name="file")
    _expect("nothing to resume", runs_dir=tmp_path, name="absent", resume=True)
    for name in ("", "..", "a/b", "/a"):
        _expect("plain directory name", runs_dir=tmp_path, name=name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("config", "lenet6", "unknown config 'lenet6'; known: lenet5_mnist"),
        ("data", "svhn", "unknown data set 'svhn'; known: mnist, mnist5k"),
        ("epochs", 0, "--epochs must be 1 or more, got 0"),
        ("batch_size", -1, "--batch-size must be 1 or more, got -1"),
        ("batch_size", 4001, "--batch-size 4001 .* more than the 4000 training images"),
        ("learning_rate", -0.1, "--learning-rate must be a finite number above 0, got -0.1"),
        ("learning_rate", float("nan"), "--learning-rate must be a finite number above 0"),
        ("seed", -1, "--seed must be 0 to"),
        ("steps_per_dispatch", 0, "--steps-per-dispatch must be 1 or more"),
        ("checkpoint_every", 0, "--checkpoint-every must be 1 or more, got 0"),
        ("workers", -1, "--workers must be 0 or more, got -1"),
        ("keep", 0, "--keep must be 1 or more, got 0"),
    ],
)
def test_wrong_values(
    runs_dir: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    _expect(message, **{"runs_dir": tmp_path, field: value})
    assert not list(tmp_path.iterdir())


def test_command_shows_a_message_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", "--config", "lenet6"]
    environment = os.environ | {"SIMQAT_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    known = ", ".join(configs.CONFIGS)
    assert done.stderr == f"error: unknown config 'lenet6'; known: {known}.\n"


def test_evaluate_command(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished / "float")])
    errors.run_or_exit(evaluate.main)
    assert f"{_results(finished)['float_accuracy']:.2%}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate", str(finished / "absent")])
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        errors.run_or_exit(evaluate.main)
