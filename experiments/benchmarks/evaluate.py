"""Time of evaluation in JAX: of the float model, the simulation and the integer model.

Each is one compiled call, without Python's time to start it.

Example:
  python -m experiments.benchmarks.evaluate --models resnet20
  python -m experiments.benchmarks.evaluate --models resnet50 --rounds 20
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

import simqat_jax as sq
from experiments.benchmarks.deploy import trained
from experiments.benchmarks.records import HISTORY, Row, report
from experiments.benchmarks.timing import Figure, timed
from experiments.benchmarks.workloads import WORKLOADS, Workload
from experiments.errors import ExperimentError, run_or_exit


def measure(
    workload: Workload, batch: int, calls: int, rounds: int
) -> tuple[dict[str, dict[str, Figure]], int]:
    """Return the figures of each way to evaluate, and how many codes two of them differ in.

    Args:
      workload: what is timed.
      batch: images in a call.
      calls: calls in one timing.
      rounds: interleaved timings.
    """
    qmodel, variables, images = trained(workload, "tflite")
    x = images[:batch]
    floats = {name: tree for name, tree in variables.items() if name != "quant_stats"}
    integer = sq.convert(qmodel, variables, x, train=False)
    evaluations: dict[str, tuple[Callable[..., Any], tuple]] = {
        "float": (functools.partial(workload.model().apply, train=False), (floats, x)),
        "simulation": (functools.partial(qmodel.apply, train=False), (variables, x)),
        "integer model": (integer, (x,)),
    }
    compiled = {
        name: functools.partial(jax.jit(f).lower(*args).compile(), *args)
        for name, (f, args) in evaluations.items()
    }
    times = timed(compiled, rounds, calls)
    figures = {
        name: {
            "call, ms": Figure.of(taken.wall).times(1e3),
            "call / float": taken.ratio(times["float"]),
            "processor / float": taken.processor_ratio(times["float"]),
        }
        for name, taken in times.items()
    }
    differing = compiled["simulation"]() != compiled["integer model"]()
    return figures, int(differing.sum())


def main(
    models: tuple[str, ...] = ("lenet5",), rounds: int = 40, history: Path | None = HISTORY
) -> None:
    """Print what a call takes, and its ratio to the float model's.

    Args:
      models: lenet5, resnet20, resnet50 (224x224) or vit_s (224x224).
      rounds: interleaved timings of each call.
      history: JSON lines to add to; "None": nowhere.

    Raises:
      ExperimentError: an unknown model.
    """
    unknown = [name for name in models if name not in WORKLOADS]
    if unknown:
        raise ExperimentError(f"--models {unknown[0]} is none of {', '.join(WORKLOADS)}.")
    rows = []
    for name in models:
        workload = WORKLOADS[name]
        for batch, calls in zip(workload.batches, workload.calls, strict=True):
            found, differing = measure(workload, batch, calls, rounds)
            for what, figures in found.items():
                case = {"model": name, "batch": str(batch), "evaluation": what}
                rows.append(Row(case=case, figures=figures))
            print(f"{name}, batch {batch}: {differing} numbers differ")
    title = f"evaluation on {jax.devices()[0]}, jax {jax.__version__}; random weights"
    report("evaluate", title, rows, history)


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))
