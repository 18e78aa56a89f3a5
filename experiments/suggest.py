"""Suggest widths for a trained network, and check that a calibrated model keeps what they promise.

Example:
  python -m experiments.suggest runs/NAME --shares 0.75 0.5
  python -m experiments.suggest lenet5
"""

import dataclasses
from collections.abc import Iterator
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
    losses: tuple[float, ...] = (6.0,)
    """Budgets: dB below the SQNR of 8 bits, one row each."""
    drops: tuple[float, ...] = (0.02,)
    """Budgets: share of the calibration data whose class may be another than float's, one row
    each. Of 50 examples one is 2 %."""
    calibration: int = 400
    """Examples to calibrate and to analyze on."""
    examples: int = 1000
    """Examples to measure accuracy on."""


def of_run(run: Path, arguments: Arguments) -> ptq.Workload:
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
    return ptq.Workload(phase.model, state.variables, batches, x, labels)


def of_benchmark(name: str, arguments: Arguments) -> ptq.Workload:
    """Return a network of `experiments.benchmarks.ptq`."""
    model: Any = name
    asked = ptq.Arguments(model=model, calibration=arguments.calibration)
    work = ptq.WORKLOADS[name](asked)
    batches = [b[k : k + _BATCH] for b in work.batches for k in range(0, len(b), _BATCH)]
    return work._replace(batches=batches)


class Unmet(NamedTuple):
    """A budget that no widths meet.

    Attributes:
      budget: what was asked for.
      reason: as `suggest` says it.
    """

    budget: str
    reason: str


class Row(NamedTuple):
    """What a budget comes to.

    Attributes:
      budget: what was asked for.
      nbytes: of all kernels, as suggested.
      in_model: of those of the integer model.
      promised: SQNR of the outputs with these widths, dB, as the suggestion says.
      kept: SQNR of the model that was calibrated with them, dB, on the same data.
      alike: share of these data whose class is that of the float model.
      accuracy: its share of right answers, on other data.
    """

    budget: str
    nbytes: int
    in_model: int
    promised: float
    kept: float
    alike: float
    accuracy: float


def check(network: ptq.Workload, arguments: Arguments) -> Iterator[Row | Unmet]:
    """Suggest widths for each budget, and calibrate with them; the first row is that of 8 bits."""
    given = np.concatenate(network.batches)
    x, labels = network.x[: arguments.examples], network.labels[: arguments.examples]
    aims = _logits(network.module, network.variables, given)

    def row(budget: str, nbytes: int, promised: float, config: sq.SimQATConfig) -> Row:
        qmodel = sq.SimQAT(config).apply(network.module)
        variables = sq.calibrate(qmodel, network.variables, network.batches)
        got = _logits(qmodel, variables, given)
        noise = np.sum((got - aims) ** 2, dtype=np.float64)
        return Row(
            budget=budget,
            nbytes=nbytes,
            in_model=_kernel_bytes(qmodel, variables, x[:1]),
            promised=promised,
            kept=10 * float(np.log10(np.sum(aims**2, dtype=np.float64) / noise)),
            alike=float(np.mean(got.argmax(-1) == aims.argmax(-1))),
            accuracy=float(np.mean(_logits(qmodel, variables, x).argmax(-1) == labels)),
        )

    qmodel = sq.SimQAT().apply(network.module)
    variables = sq.calibrate(qmodel, network.variables, network.batches)
    analysis = sq.analyze(qmodel, variables, network.batches, network.variables)
    most = sq.suggest(analysis, sq.MaxBytes(10**12), widths=(8,)).nbytes
    yield row("8 bits", most, analysis.sqnr, sq.SimQATConfig())
    sizes = [int(share * most) for share in arguments.shares]
    least = [analysis.sqnr - loss for loss in arguments.losses]
    budgets = [(f"{size:,} bytes", sq.MaxBytes(size)) for size in sizes]
    budgets += [(f"{decibels:.2f} dB", sq.MinSqnr(decibels)) for decibels in least]
    budgets += [(f"{drop:.1%} drop", sq.MaxDrop(drop)) for drop in arguments.drops]
    for name, budget in budgets:
        try:
            found = sq.suggest(analysis, budget)
        except ValueError as error:
            yield Unmet(name, str(error))
        else:
            yield row(name, found.nbytes, found.sqnr, found.config)


def _logits(module: nn.Module, variables: Any, x: np.ndarray) -> np.ndarray:
    run: Any = jax.jit(module.apply)
    return data.in_batches(lambda x: run(variables, x), x, _BATCH)


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
    x, labels = network.x[: arguments.examples], network.labels[: arguments.examples]
    top = np.mean(_logits(network.module, network.variables, x).argmax(-1) == labels)
    table = Table(title=f"{arguments.network}, {len(x):,} examples, float {top:.2%}")
    for column in ("budget", "bytes", "in model", "promised", "kept", "as float", "top-1"):
        table.add_column(column, justify="right")
    console = Console(width=80)
    for row in check(network, arguments):
        if isinstance(row, Unmet):
            table.add_row(row.budget, "unmet")
            console.print(f"{row.budget}: {row.reason}", highlight=False)
            continue
        console.print(f"{row.budget}: {row.accuracy:.2%}", highlight=False)
        sizes = f"{row.nbytes:,}", f"{row.in_model:,}"
        noise = f"{row.promised:.2f} dB", f"{row.kept:.2f} dB"
        shares = f"{row.alike:.2%}", f"{row.accuracy:.2%}"
        table.add_row(row.budget, *sizes, *noise, *shares)
    console.print(table)


if __name__ == "__main__":
    run_or_exit(main)
