"""Time of SimQAT training steps against the float one: running, tracing, compiling, and memory.

"step" and "trace", "compile" are ratios round by round, of wall time and of processor time, which
is what counts where others use the machine. Bytes are those that XLA counts. "float two_conv" folds
BatchNorm as SimQAT's two_conv does and quantizes nothing: what no implementation of it goes below.

Example:
  python -m experiments.benchmarks.train_step --models lenet5
  python -m experiments.benchmarks.train_step --models resnet20 resnet50 mobilenetv2 vit
  python -m experiments.benchmarks.train_step --models depth10 depth20 depth40 depth80 --rounds 5
  python -m experiments.benchmarks.train_step --models resnet20 --observers minmax mse percentile
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import tyro

import simqat_jax as sq
from experiments.benchmarks.folded import Folded
from experiments.benchmarks.records import HISTORY, Row, report
from experiments.benchmarks.timing import Figure, Times, timed
from experiments.benchmarks.trainer import Trainer
from experiments.errors import check_models, run_or_exit
from experiments.models import LeNet5, MobileNetV2, ResNet20, ResNet50, VisionTransformer
from simqat_jax.numerics.spec import ObserverName

Fold = Literal["none", "one_conv", "two_conv"]


class Chain(nn.Module):
    """Convolutions of 16 features in a row, each with BatchNorm and ReLU.

    Attributes:
      depth: how many.
    """

    depth: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Classify images of (N, H, W, C) into 10 classes."""
        for _ in range(self.depth):
            x = nn.Conv(16, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
      model: the float model.
      image: shape of one image.
      batch_sizes: images in a step.
      bn_folds: the modes of BatchNorm folding to compare; without BatchNorm all are the same.
      calls: steps in one timing.
    """

    model: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch_sizes: tuple[int, ...]
    bn_folds: tuple[Fold, ...] = ("none", "one_conv", "two_conv")
    calls: int = 1


_CIFAR = (32, 32, 3)
WORKLOADS = {
    "lenet5": Workload(LeNet5, (32, 32, 1), (32, 128), ("one_conv",), 5),
    "resnet20": Workload(ResNet20, _CIFAR, (64,)),
    "resnet50": Workload(ResNet50, _CIFAR, (8,)),
    "mobilenetv2": Workload(MobileNetV2, _CIFAR, (32,)),
    "vit": Workload(
        functools.partial(VisionTransformer, num_classes=10, patch=4, layers=4, width=128, heads=4),
        _CIFAR,
        (32,),
        ("one_conv",),
    ),
    **{
        f"depth{depth}": Workload(functools.partial(Chain, depth), _CIFAR, (8,), ("one_conv",))
        for depth in (10, 20, 40, 80)
    },
}


def _models(
    workload: Workload, folds: Sequence[Fold], observers: Sequence[ObserverName]
) -> dict[str, nn.Module]:
    """Return the float model and the quantized ones, by what the table calls them."""
    models: dict[str, nn.Module] = {"float": workload.model()}
    folds = folds or workload.bn_folds
    if "two_conv" in folds:
        models["float two_conv"] = Folded(workload.model())
    for fold in folds:
        config = sq.SimQATConfig(bn_fold=fold)
        models[f"SimQAT {fold}"] = sq.SimQAT(config).apply(workload.model())
    for observer in observers:
        config = sq.SimQATConfig(activation=sq.QuantSpec(observer=observer))
        models[f"SimQAT one_conv, {observer}"] = sq.SimQAT(config).apply(workload.model())
    return models


def _built(trainers: Mapping[str, Trainer], times: int) -> dict[str, dict[str, Times]]:
    """Trace and compile each step some times, one after the other; return what each took."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for _ in range(times):
        for name, trainer in trainers.items():
            for what, act in (("trace", trainer.trace), ("compile", trainer.compile)):
                start = time.perf_counter(), time.process_time()
                act()
                took = time.perf_counter() - start[0], time.process_time() - start[1]
                found.setdefault(name, {}).setdefault(what, []).append(took)
    return {
        name: {what: Times(*np.asarray(values).T) for what, values in parts.items()}
        for name, parts in found.items()
    }


def measure(
    workload: Workload,
    batch_size: int,
    models: Mapping[str, nn.Module],
    rounds: int,
    compilations: int,
) -> dict[str, dict[str, Figure]]:
    """Return the figures of each model's step, with ratios to that of the first.

    Args:
      workload: what is timed.
      batch_size: images in a step.
      models: the float one first.
      rounds: interleaved timings of each step.
      compilations: of each step.
    """
    trainers = {name: Trainer(m, workload.image, batch_size) for name, m in models.items()}
    built = _built(trainers, compilations)
    steps = timed(trainers, rounds, workload.calls)
    first = next(iter(models))
    figures = {}
    for name, trainer in trainers.items():
        step = steps[name]
        figures[name] = {
            "step, ms": Figure.of(step.wall).times(1e3),
            "step / float": step.ratio(steps[first]),
            "processor / float": step.processor_ratio(steps[first]),
        }
        for what, took in built[name].items():
            figures[name] |= {
                f"{what}, processor s": Figure.of(took.processor),
                f"{what} / float": took.processor_ratio(built[first][what]),
            }
        for what, (count, of_float) in {
            "accessed, GB": (_accessed(trainer), _accessed(trainers[first])),
            "temporary, MB": (_temporary(trainer), _temporary(trainers[first])),
        }.items():
            figures[name][what] = Figure.exactly(count)
            figures[name][f"{what.split(',')[0]} / float"] = Figure.exactly(count / of_float)
    return figures


def main(
    models: tuple[str, ...] = ("lenet5",),
    folds: tuple[Fold, ...] = (),
    observers: tuple[ObserverName, ...] = (),
    rounds: int = 40,
    compilations: int = 3,
    history: Path | None = HISTORY,
) -> None:
    """Print step, trace and compile times, memory, and their ratios to those of float.

    Args:
      models: lenet5, resnet20, resnet50 (CIFAR stem), mobilenetv2, vit, depth10 to depth80.
      folds: modes of BatchNorm folding; by default all where there is a BatchNorm.
      observers: of activations, to compare too; the default one is `ema`.
      rounds: interleaved timings of each step.
      compilations: of each step.
      history: JSON lines to add to; "None": nowhere.

    Raises:
      ExperimentError: an unknown model.
    """
    check_models(models, WORKLOADS)
    rows = []
    for name in models:
        workload = WORKLOADS[name]
        for batch_size in workload.batch_sizes:
            compared = _models(workload, folds, observers)
            found = measure(workload, batch_size, compared, rounds, compilations)
            rows += [
                Row(case={"model": name, "batch": str(batch_size), "step": step}, figures=figures)
                for step, figures in found.items()
            ]
    title = f"training steps on {jax.devices()[0]}, jax {jax.__version__}"
    report("train_step", title, rows, history)


def _accessed(trainer: Trainer) -> float:
    analysis: Any = trainer.compiled.cost_analysis()
    return analysis["bytes accessed"] / 1e9


def _temporary(trainer: Trainer) -> float:
    analysis: Any = trainer.compiled.memory_analysis()
    return analysis.temp_size_in_bytes / 1e6


if __name__ == "__main__":
    run_or_exit(lambda: tyro.cli(main))
