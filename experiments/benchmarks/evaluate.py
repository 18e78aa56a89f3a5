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
from experiments.errors import check_models, run_or_exit

Evaluations = dict[str, tuple[Callable[..., Any], tuple]]
"""By name: a function, and its arguments in front of the images."""


def evaluations(workload: Workload) -> tuple[Evaluations, jax.Array]:
    """Return the ways to evaluate a network, the float one first, and images."""
    qmodel, variables, images = trained(workload, "tflite")
    floats = {name: tree for name, tree in variables.items() if name != "quant_stats"}
    found: Evaluations = {
        "float": (functools.partial(workload.model().apply, train=False), (floats,)),
        "simulation": (functools.partial(qmodel.apply, train=False), (variables,)),
        "integer model": (sq.convert(qmodel, variables, images[:1], train=False), ()),
    }
    return found, images


def measure(
    ways: Evaluations, x: jax.Array, calls: int, rounds: int
) -> tuple[dict[str, dict[str, Figure]], int]:
    """Return the figures of each way to evaluate, and how many codes two of them differ in.

    Args:
      ways: what `evaluations` returned.
      x: the images of a call.
      calls: calls in one timing.
      rounds: interleaved timings.
    """
    compiled = {
        name: functools.partial(jax.jit(f).lower(*args, x).compile(), *args, x)
        for name, (f, args) in ways.items()
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
    check_models(models, WORKLOADS)
    rows = []
    for name in models:
        workload = WORKLOADS[name]
        ways, images = evaluations(workload)
        for batch, calls in zip(workload.batches, workload.calls, strict=True):
            found, differing = measure(ways, images[:batch], calls, rounds)
            for what, figures in found.items():
                case = {"model": name, "batch": str(batch), "evaluation": what}
                rows.append(Row(case=case, figures=figures))
            print(f"{name}, batch {batch}: {differing} numbers differ")
    title = f"evaluation on {jax.devices()[0]}, jax {jax.__version__}; random weights"
    report("evaluate", title, rows, history)


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))
