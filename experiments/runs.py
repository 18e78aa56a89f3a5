"""The directory of a run: its settings, its checkpoints and its results."""

import contextlib
import json
import platform
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax

import simqat_jax as sq
from experiments import configs, locks
from experiments.checkpoints import Progress
from experiments.configs import Experiment
from experiments.errors import ExperimentError
from simqat_jax.files import atomic_file

PLAN = "plan.txt"
"""In a run's directory."""
_LEFT_BEHIND = ("config.json.tmp", ".*.part")
"""What a process that was killed while it wrote a file of the run leaves behind."""


@contextlib.contextmanager
def open_run(runs_dir: Path, name: str, experiment: Experiment, resume: bool) -> Iterator[Path]:
    """Create the run's directory, or with `resume` find it and check that it fits.

    No other process can open it until this context ends.

    Raises:
      ExperimentError: a name that is no plain directory name; the directory cannot be
        written, is in use or holds something already; nothing to resume, or a run with other
        settings.
    """
    if name in ("", "..") or Path(name).name != name:
        raise ExperimentError(f"--name must be a plain directory name, got {name!r}.")
    run = runs_dir / name
    with contextlib.ExitStack() as stack:
        try:
            if resume:
                _check_settings(run, experiment)
            else:
                run.mkdir(parents=True, exist_ok=True)
                _check_empty(run)
            stack.enter_context(locks.locked(run))
            for path in _left_behind(run):
                path.unlink()
            if not resume:
                _check_empty(run)  # again: whoever was faster has ended by now
                write_json(run / "config.json", experiment.settings())
        except OSError as error:
            raise ExperimentError(
                f"cannot write the run directory {run}: {error.strerror or error}. Make it "
                "writable, or choose another --runs-dir."
            ) from error
        yield run


def load_experiment(run: Path) -> Experiment:
    """Return the experiment that the run's config.json names.

    Raises:
      ExperimentError: no or a damaged config.json; the config has changed since.
    """
    stored = _read_settings(run)
    experiment = configs.get(str(stored.get("config")), **configs.overrides(stored))
    if differences := _differences(stored, experiment.settings()):
        raise ExperimentError(
            f"config {experiment.config!r} is no longer what run {run} was trained with:\n"
            f"{differences}\nUse the version of the code that trained it."
        )
    return experiment


def check_shared(run: Path, experiment: Experiment) -> None:
    """Check that this process sees the run that process 0 has opened.

    Raises:
      ExperimentError: it does not.
    """
    with contextlib.suppress(ExperimentError):
        if not _differences(_read_settings(run), experiment.settings()):
            return
    raise ExperimentError(
        f"{run} on {socket.gethostname()} is not the directory that process 0 has opened: give "
        "all processes a --runs-dir on a file system that they share."
    )


def write_results(
    run: Path, experiment: Experiment, phases: dict[str, Progress], mesh: str = "data=1"
) -> Path:
    """Write results.json: figures of every phase, settings, versions, history of every epoch.

    Raises:
      ExperimentError: it cannot be written.
    """
    results: dict[str, Any] = {}
    for name, progress in phases.items():
        for metric in ("accuracy", "top5_accuracy"):
            results[f"{name}_{metric}"] = progress.history[-1][metric]
        results[f"{name}_seconds_per_step"] = seconds_per_step(progress)
        results[f"{name}_compile_seconds"] = progress.compile_seconds
    results["settings"] = experiment.settings()
    results |= {f: results["settings"][f] for f in ("config", "data", "seed", "epochs")}
    results["batch_size"] = experiment.batch_size
    results["mesh"], results["processes"] = mesh, jax.process_count()
    results["device"] = f"{jax.default_backend()}: {jax.devices()[0].device_kind}"
    results["versions"] = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "simqat_jax": sq.__version__,
    }
    results["history"] = {name: list(progress.history) for name, progress in phases.items()}
    path = run / "results.json"
    remedy = "The checkpoints are complete: put the cause right and write it with --resume."
    with _in_one_line(path, remedy):
        write_json(path, results)
    return path


def write_plan(run: Path, text: str) -> None:
    """Write plan.txt: what the SimQAT phases quantize.

    Raises:
      ExperimentError: it cannot be written.
    """
    path = run / PLAN
    remedy = "Put the cause right, and continue with --resume."
    with _in_one_line(path, remedy), atomic_file(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def _in_one_line(path: Path, remedy: str) -> Iterator[None]:
    """Let what a file system says of a file that cannot be written be an ExperimentError."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            f"cannot write {path}: {error.strerror or error}. {remedy}"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file that appears whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def seconds_per_step(progress: Progress) -> float:
    """Return the median over the epochs, seconds; compilation is not in it."""
    times = sorted(record["seconds_per_step"] for record in progress.history)
    middle = len(times) // 2
    return times[middle] if len(times) % 2 else (times[middle - 1] + times[middle]) / 2


def _left_behind(run: Path) -> list[Path]:
    return [path for pattern in _LEFT_BEHIND for path in run.glob(pattern)]


def _check_empty(run: Path) -> None:
    if {*run.iterdir()} - {*_left_behind(run), run / locks.NAME}:
        raise ExperimentError(
            f"{run} already holds another run. Continue it with --resume, choose another "
            "--name, or delete the directory."
        )


def _check_settings(run: Path, experiment: Experiment) -> None:
    if not (run / "config.json").is_file():
        raise ExperimentError(
            f"nothing to resume: {run} holds no run. Leave out --resume to start one, or give the "
            "--name and --runs-dir of the run to continue."
        )
    if differences := _differences(_read_settings(run), experiment.settings()):
        raise ExperimentError(
            f"run {run} was started with other settings:\n{differences}\n"
            "Resume with the settings of the run, or start another with another --name."
        )


def _differences(stored: dict, given: dict) -> str:
    """Return one line for each field that differs, empty if none does."""
    stored, absent = configs.completed(stored), "(absent)"
    return "\n".join(
        f"  {field}: {stored.get(field, absent)!r} in the run, {given.get(field, absent)!r} now"
        for field in sorted(stored.keys() | given.keys())
        if stored.get(field, absent) != given.get(field, absent)
    )


def _read_settings(run: Path) -> dict:
    path = run / "config.json"
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError as error:
        raise ExperimentError(f"{run} is no run: it has no config.json.") from error
    except (OSError, ValueError) as error:
        raise ExperimentError(
            f"{path} cannot be read: {error}. Restore it, or start again under another --name."
        ) from error
    return settings
