"""Time of SimQAT training steps against the float one.

Example:
  python -m experiments.benchmarks.train_step --model lenet5
  python -m experiments.benchmarks.train_step --model resnet20
  python -m experiments.benchmarks.train_step --model vit
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import optax
import tyro
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.benchmarks.timing import interleaved
from experiments.models import LeNet5, ResNet20, VisionTransformer

State = tuple[Any, dict[str, Any], optax.OptState]
"""Parameters, other collections and the optimizer's state."""
Batch = tuple[jax.Array, jax.Array]
"""Images and labels."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
      model: the float model.
      image: shape of one image.
      batch_sizes: images in a step.
      bn_folds: the modes of BatchNorm folding to compare; without BatchNorm all are the same.
    """

    model: Callable[[], nn.Module]
    image: tuple[int, int, int]
    batch_sizes: tuple[int, ...]
    bn_folds: tuple[Literal["none", "one_conv", "two_conv"], ...]


WORKLOADS = {
    "lenet5": Workload(LeNet5, (32, 32, 1), (32, 128), ("one_conv",)),
    "resnet20": Workload(ResNet20, (32, 32, 3), (64,), ("none", "one_conv", "two_conv")),
    "vit": Workload(
        functools.partial(VisionTransformer, num_classes=10, patch=4, layers=4, width=128, heads=4),
        (32, 32, 3),
        (32,),
        ("one_conv",),
    ),
}


class Trainer:
    """A model with momentum SGD, whose compiled step is called again and again."""

    def __init__(self, model: nn.Module, image: tuple[int, int, int], batch_size: int):
        self.model = model
        keys = jax.random.split(jax.random.key(0), 3)
        self.batch = (
            jax.random.normal(keys[0], (batch_size, *image)),
            jax.random.randint(keys[1], (batch_size,), 0, 10),
        )
        variables = dict(jax.jit(model.init)(keys[2], self.batch[0]))
        params = variables.pop("params")
        self.optimizer = optax.sgd(0.01, momentum=0.9)
        self.state: State = (params, variables, self.optimizer.init(params))

    def step(self, state: State, batch: Batch) -> tuple[State, jax.Array]:
        """Take one optimizer step on a batch; return the new state and the loss."""
        params, collections, opt_state = state
        images, labels = batch

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = self.model.apply(
                {"params": params, **collections}, images, train=True, mutable=list(collections)
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        deltas, opt_state = self.optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, deltas), {**collections, **updates}, opt_state), loss

    def compile(self) -> float:
        """Trace and compile the step; return the seconds it took."""
        jax.clear_caches()
        start = time.perf_counter()
        self.compiled = jax.jit(self.step, donate_argnums=0).lower(self.state, self.batch).compile()
        return time.perf_counter() - start

    def __call__(self) -> jax.Array:
        """Run the compiled step once; return the loss, not waited for."""
        self.state, loss = self.compiled(self.state, self.batch)
        return loss


def main(model: str = "lenet5", rounds: int = 40, calls: int = 5, compilations: int = 3) -> None:
    """Print step times, compile times (the fastest of some) and memory, with ratios.

    "compile s" includes tracing; "GB" are accessed in a step, "MB" are temporary.

    Args:
      model: lenet5, resnet20 or vit.
      rounds: interleaved timings of each step.
      calls: steps in one timing.
      compilations: of each step.
    """
    workload = WORKLOADS[model]
    title = f"{model}: training step on {jax.devices()[0]}, jax {jax.__version__}"
    measures = [column for name in ("ms", "compile s", "GB", "MB") for column in (name, "ratio")]
    table = Table("batch", "step", *measures, title=title)
    for batch_size in workload.batch_sizes:
        models = {"float": workload.model()}
        for fold in workload.bn_folds:
            qat = sq.SimQAT(sq.SimQATConfig(bn_fold=fold))
            models[f"SimQAT {fold}"] = qat.apply(workload.model())
        trainers = {name: Trainer(m, workload.image, batch_size) for name, m in models.items()}
        compiling = [{n: t.compile() for n, t in trainers.items()} for _ in range(compilations)]
        seconds = interleaved(trainers, rounds, calls)
        for name, trainer in trainers.items():
            table.add_row(
                str(batch_size),
                name,
                *_with_ratio(seconds[name] * 1e3, seconds["float"] * 1e3),
                *_with_ratio(*(min(c[n] for c in compiling) for n in (name, "float"))),
                *_with_ratio(_gigabytes(trainer), _gigabytes(trainers["float"])),
                *_with_ratio(_temporary(trainer), _temporary(trainers["float"])),
            )
    Console().print(table)


def _with_ratio(value: float, base: float) -> tuple[str, str]:
    return f"{value:.2f}", f"{value / base:.3f}"


def _gigabytes(trainer: Trainer) -> float:
    analysis: Any = trainer.compiled.cost_analysis()
    return analysis["bytes accessed"] / 1e9


def _temporary(trainer: Trainer) -> float:
    analysis: Any = trainer.compiled.memory_analysis()
    return analysis.temp_size_in_bytes / 1e6


if __name__ == "__main__":
    tyro.cli(main)
