"""Suggest widths for a trained network, and check that a calibrated model keeps what they promise.

Example:
  python -m experiments.suggest runs/NAME --shares 0.75 0.5
  python -m experiments.suggest lenet5
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments import checkpoints, data, phases, runs
from experiments.benchmarks import ptq
from experiments.errors import ExperimentError, run_or_exit
from simqat_jax.numerics.packing import packed_bytes

_BATCH = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    network: tyro.conf.Positional[str]
    """A run, runs/NAME, with a float phase; or lenet5 or lite0, as in benchmarks.ptq."""
    shares: tuple[float, ...] = (0.75, 0.5)
    """Budgets: of the bytes of 8-bit kernels, one row each."""
    losses: tuple[float, ...] = (3.0, 6.0)
    """Budgets: dB below the SQNR of 8 bits, one row each."""
    calibration: int = 400
    """Examples to calibrate and to analyze on."""
    examples: int = 1000
    """Examples to measure accuracy on."""


class Network(NamedTuple):
    """A trained float network, batches to analyze it on, and what it is measured on."""

    module: nn.Module
    variables: Any
    batches: Sequence[np.ndarray]
    x: np.ndarray
    labels: np.ndarray


def of_run(run: Path, arguments: Arguments) -> Network:
    """Return the float network of a run.

    Raises:
      ExperimentError: none was trained there.
    """
    experiment = runs.load_experiment(run)
    dataset = data.load(experiment.data, experiment.image_size)
    phase = phases.build("float", experiment, dataset, run)
    step = checkpoints.latest(phase.directory)
    if step is None:
        raise ExperimentError(f"no float network in {run}: train it first, with --phases float.")
    state, _ = checkpoints.restore(phase.directory, step, phases.init_state(phase))

    def prepared(images: np.ndarray) -> np.ndarray:
        return np.asarray(dataset.transform(jnp.asarray(images), None))

    shuffled = dataset.train_batches(_BATCH, experiment.seed, 0)
    count = -(-arguments.calibration // _BATCH)
    batches = [prepared(images) for (images, _), _ in zip(shuffled, range(count), strict=False)]
    tests = [(prepared(x)[m], y[m]) for x, y, m in dataset.test_batches(_BATCH)]
    x, labels = map(np.concatenate, zip(*tests, strict=True))
    return Network(phase.model, state.variables, batches, x, labels)


def of_benchmark(name: str, arguments: Arguments) -> Network:
    """Return a network of `experiments.benchmarks.ptq`."""
    model: Any = name
    asked = ptq.Arguments(model=model, calibration=arguments.calibration)
    work = ptq.WORKLOADS[name](asked)
    batches = [b[k : k + _BATCH] for b in work.batches for k in range(0, len(b), _BATCH)]
    return Network(work.module, work.variables, batches, work.x, work.labels)


def check(network: Network, arguments: Arguments, console: Console) -> None:
    """Suggest widths for each budget, calibrate with them, and print what was promised and kept."""
    x, labels = network.x[: arguments.examples], network.labels[: arguments.examples]

    given = np.concatenate(network.batches)

    def looked_at(module: nn.Module, variables: Any) -> tuple[np.ndarray, str]:
        """Return the logits of what was analyzed, and the accuracy of the others."""
        run: Any = jax.jit(module.apply)
        of_given, logits = (
            data.in_batches(lambda x: run(variables, x), i, _BATCH) for i in (given, x)
        )
        return of_given, f"{np.mean(logits.argmax(-1) == labels):.2%}"

    def sqnr(logits: np.ndarray) -> str:
        noise = np.sum((logits - aims) ** 2, dtype=np.float64)
        return f"{10 * np.log10(np.sum(aims**2, dtype=np.float64) / noise):.2f}"

    def calibrated(config: sq.SimQATConfig) -> tuple[sq.QuantizedModule, Any]:
        qmodel = sq.SimQAT(config).apply(network.module)
        return qmodel, sq.calibrate(qmodel, network.variables, network.batches)

    whole = calibrated(sq.SimQATConfig())
    analysis = sq.analyze(*whole, network.batches, network.variables)
    most = sq.suggest(analysis, sq.MaxBytes(10**12), widths=(8,)).nbytes
    table = Table(title=f"{arguments.network}, {len(x):,} examples")
    for column in ("budget", "bytes", "in model", "SQNR", "calibrated", "top-1"):
        table.add_column(column, justify="right")
    aims, top = looked_at(network.module, network.variables)
    table.add_row("float", "", "", "", "", top)
    logits, top = looked_at(*whole)
    size = f"{_kernel_bytes(*whole, x[:1]):,}"
    table.add_row("8 bits", f"{most:,}", size, f"{analysis.sqnr:.2f}", sqnr(logits), top)
    budgets: list[sq.MaxBytes | sq.MinSqnr] = [sq.MaxBytes(int(s * most)) for s in arguments.shares]
    budgets += [sq.MinSqnr(analysis.sqnr - loss) for loss in arguments.losses]
    for budget in budgets:
        found = sq.suggest(analysis, budget)
        model = calibrated(found.config)
        logits, top = looked_at(*model)
        size = f"{_kernel_bytes(*model, x[:1]):,}"
        text = f"{budget.nbytes:,} bytes" if isinstance(budget, sq.MaxBytes) else ""
        text = text or f"{budget.decibels:.2f} dB"
        table.add_row(text, f"{found.nbytes:,}", size, f"{found.sqnr:.2f}", sqnr(logits), top)
    console.print(table)


def _kernel_bytes(qmodel: sq.QuantizedModule, variables: Any, x: np.ndarray) -> int:
    """Return the bytes of the kernels of the integer model."""
    ops = sq.convert(qmodel, variables, x).ops
    return sum(packed_bytes(op.arrays["kernel"]) for op in ops if "kernel" in op.arrays)


def main() -> None:
    """Run the command."""
    arguments = tyro.cli(Arguments, prog="python -m experiments.suggest", description=__doc__)
    if arguments.network in ptq.WORKLOADS:
        network = of_benchmark(arguments.network, arguments)
    else:
        network = of_run(Path(arguments.network), arguments)
    check(network, arguments, Console(width=80))


if __name__ == "__main__":
    run_or_exit(main)
