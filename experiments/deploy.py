"""Convert what a run has trained to an ONNX and a TFLite file, and check them on the test set.

Example: python -m experiments.deploy runs/NAME
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import ArrayLike
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments import checkpoints, data, phases, runs
from experiments.errors import ExperimentError, run_or_exit

_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    run: tyro.conf.Positional[Path]
    """The run: runs/NAME."""
    phase: str | None = None
    """Which phase to deploy; by default the last quantized one that was trained."""
    examples: int | None = None
    """How many test images to check on; by default all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the model."""

    what: str
    accuracy: float
    differing: int | None
    """Output codes that are not those of quantized evaluation; None for the float model."""
    bytes: int
    latency_us: tuple[float, float, float]
    """Smallest, median and 99th percentile of one image, microseconds."""


def deploy(run: Path, phase_name: str | None = None, examples: int | None = None) -> list[Row]:
    """Write `model.onnx`, `model.tflite`, both integer models and `deploy.json` into `run/deploy`.

    Args:
      run: the run's directory.
      phase_name: "qat" or "qat_finetune"; None: the later of them that was trained.
      examples: how many test images to check on; None: all.

    Raises:
      ExperimentError: nothing quantized was trained there; the files cannot be written.
    """
    experiment = runs.load_experiment(run)
    dataset = data.load(experiment.data, experiment.image_size)
    if phase_name is None:
        trained = [n for n in ("qat_finetune", "qat") if checkpoints.latest(run / n) is not None]
        phase_name = trained[0] if trained else "qat"
    phase = phases.build(phase_name, experiment, dataset, run)
    step = checkpoints.latest(phase.directory)
    if step is None or phase_name == "float":
        raise ExperimentError(
            f"nothing to deploy in {run}: train it first, with --phases float qat_finetune."
        )
    state, _ = checkpoints.restore(phase.directory, step, phases.init_state(phase))
    variables = {"params": state.params, **state.collections}
    x, labels = _test_set(dataset, examples)
    folder = run / "deploy"
    try:
        folder.mkdir(exist_ok=True)
        rows = [_float_row(phase, variables, x, labels)]
        for backend in ("tflite", "onnx"):
            rows += _rows(phase, variables, backend, folder / f"model.{backend}", x, labels)
        report = [dataclasses.asdict(row) for row in rows]
        content = {"phase": phase_name, "step": step, "images": len(x), "rows": report}
        runs.write_json(folder / "deploy.json", content)
    except OSError as error:
        raise ExperimentError(
            f"cannot write {folder}: {error.strerror or error}. Make room, or make it writable, "
            "and give the command again."
        ) from error
    return rows


def _test_set(dataset: data.ImageData, examples: int | None) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for batch, wanted, mask in dataset.test_batches(_BATCH):
        images.append(np.asarray(dataset.transform(jnp.asarray(batch), None))[mask])
        labels.append(wanted[mask])
    return np.concatenate(images)[:examples], np.concatenate(labels)[:examples]


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=-1) == labels))


def _latency(
    function: Callable[[np.ndarray], ArrayLike], image: np.ndarray
) -> tuple[float, float, float]:
    for _ in range(10):
        function(image)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        jax.block_until_ready(function(image))
        times.append(1e6 * (time.perf_counter() - start))
    return min(times), float(np.median(times)), float(np.percentile(times, 99))


def _float_row(phase: phases.Phase, variables: dict, x: np.ndarray, labels: np.ndarray) -> Row:
    model = phase.model
    assert isinstance(model, sq.QuantizedModule), "the phase is a quantized one"
    floats = {k: v for k, v in variables.items() if k != "quant_stats"}
    apply = jax.jit(functools.partial(model.module.apply, train=False))
    run = functools.partial(apply, floats)
    return Row(
        what="float, JAX",
        accuracy=_accuracy(data.in_batches(run, x, _BATCH), labels),
        differing=None,
        bytes=sum(a.nbytes for a in jax.tree.leaves(floats)),
        latency_us=_latency(run, x[:1]),
    )


def _rows(
    phase: phases.Phase,
    variables: dict,
    backend: Literal["tflite", "onnx"],
    path: Path,
    x: np.ndarray,
    labels: np.ndarray,
) -> list[Row]:
    """Evaluate, convert and export for one runtime."""
    model = phase.model
    assert isinstance(model, sq.QuantizedModule), "the phase is a quantized one"
    quant = dataclasses.replace(model.config, backend=backend)
    qmodel = sq.SimQAT(quant).apply(model.module)
    apply = jax.jit(functools.partial(qmodel.apply, train=False))
    evaluate = functools.partial(apply, variables)
    want = data.in_batches(evaluate, x, _BATCH)
    integer = sq.convert(qmodel, variables, x[:1], train=False)
    integer.save(path.with_suffix(f".{backend}.integer"))
    export = sq.export_onnx if backend == "onnx" else sq.export_tflite
    export(integer, path)
    file = sq.open_file(path, isolated=False)
    size = sum(a.nbytes for a in jax.tree.leaves(variables["params"]))
    ways = (
        (f"SimQAT evaluation ({backend}), JAX", evaluate, size),
        (f"integer model ({backend}), JAX", integer, integer.nbytes),
        (file.name, lambda x: file.run([np.asarray(x)])[0], path.stat().st_size),
    )
    rows = []
    for what, function, number in ways:
        logits = data.in_batches(function, x, _BATCH)
        rows.append(
            Row(
                what=what,
                accuracy=_accuracy(logits, labels),
                differing=int((logits != want).sum()),
                bytes=number,
                latency_us=_latency(function, x[:1]),
            )
        )
    return rows


def show(rows: list[Row], run: Path, console: Console | None = None) -> None:
    """Print the table of a deployment."""
    table = Table(title=f"{run}: the same codes everywhere", title_justify="left")
    for column in ("", "top-1", "codes that differ", "kB", "µs an image (min, median, p99)"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            row.what,
            f"{row.accuracy:.2%}",
            "" if row.differing is None else f"{row.differing:,}",
            f"{row.bytes / 1000:,.0f}",
            ", ".join(f"{t:,.0f}" for t in row.latency_us),
        )
    (console or Console()).print(table)


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.deploy", description=__doc__)
    rows = deploy(arguments.run, arguments.phase, arguments.examples)
    show(rows, arguments.run)
    if any(row.differing for row in rows):
        raise ExperimentError("some codes differ: see the table.")


if __name__ == "__main__":
    run_or_exit(main)
