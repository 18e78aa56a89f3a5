"""Which observer and how many images: accuracy of LeNet5 with ranges taken from few digits.

Example:
  python -m experiments.benchmarks.observers  # --data mnist, with TFDS_DATA_DIR
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.benchmarks.ptq import Workload, lenet5_on_digits
from experiments.data import in_batches, load

_AT_ONCE = 100
"""Examples of an evaluation."""


def _calibrated(
    observer: Literal["minmax", "percentile", "mse"],
) -> Callable[[Workload, np.ndarray], tuple[Any, Any]]:
    """Return a way to take ranges in evaluation, all images of a batch at once."""

    def quantized(work: Workload, images: np.ndarray) -> tuple[Any, Any]:
        activation = sq.QuantSpec.activation(observer=observer)
        qmodel = sq.SimQAT(sq.SimQATConfig(activation=activation)).apply(work.module)
        return qmodel, sq.calibrate(qmodel, work.variables, [images], progress=False)

    return quantized


def _in_training(work: Workload, images: np.ndarray) -> tuple[Any, Any]:
    """Take ranges with the moving average of the default, by calls of training on single images."""
    qmodel = sq.SimQAT().apply(work.module)
    variables: Any = {**qmodel.init(jax.random.key(0), images[:1]), **work.variables}

    @jax.jit
    def step(variables: Any, x: np.ndarray) -> Any:
        return {**variables, **qmodel.apply(variables, x, mutable=["quant_stats"])[1]}

    for i in range(len(images)):
        variables = step(variables, images[i : i + 1])
    return qmodel, variables


WAYS = {
    "calibrate, extremes": _calibrated("minmax"),
    "calibrate, percentile 99.99": _calibrated("percentile"),
    "calibrate, mse": _calibrated("mse"),
    "moving average, an image a step": _in_training,
}
"""To take ranges, by the name of a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    data: Literal["mnist5k", "mnist"] = "mnist5k"
    """Digits to train LeNet5 on, to take ranges from and to measure on."""
    epochs: int = 15
    """Of the float network."""
    seed: int = 0
    """Of the float network."""
    images: tuple[int, ...] = (1, 16, 256)
    """To take ranges from, one column each."""
    draws: int = 3
    """Of as many other images; the mean and the lowest of their accuracies are shown."""


def _accuracy(apply: Callable[..., Any], variables: Any, work: Workload) -> float:
    logits = in_batches(functools.partial(apply, variables), work.x, _AT_ONCE)
    return float(np.mean(logits.argmax(-1) == work.labels))


def measure(arguments: Arguments, console: Console) -> None:
    """Take ranges in every way, and print a table."""
    most = arguments.draws * max(arguments.images)
    work = lenet5_on_digits(load(arguments.data), most, arguments.seed, arguments.epochs)
    images, numbers = work.batches[0], arguments.images
    baseline = _accuracy(jax.jit(work.module.apply), work.variables, work)
    table = Table(title=f"LeNet5 on {arguments.data}, float {baseline:.2%}: mean (lowest)")
    table.add_column("ranges")
    for number in numbers:
        table.add_column(f"{number} images", justify="right")
    for name, way in WAYS.items():
        cells = []
        for number in numbers:
            found = []
            for i in range(arguments.draws):
                qmodel, variables = way(work, images[i * number : (i + 1) * number])
                found.append(_accuracy(qmodel.apply, variables, work))
            cells.append(f"{np.mean(found):.2%} ({min(found):.2%})")
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    measure(tyro.cli(Arguments, description=__doc__), Console())
