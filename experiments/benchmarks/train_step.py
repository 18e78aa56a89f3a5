"""Time of a SimQAT training step against the float one.

python -m experiments.benchmarks.train_step --batch-size 32
"""

import argparse
import time
from typing import Any

import jax
import optax
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments.benchmarks.timing import interleaved
from experiments.models.lenet import LeNet5


class Trainer:
    """A model with momentum SGD, whose jitted step is called again and again."""

    def __init__(self, model: Any, batch_size: int):
        self.model = model
        keys = jax.random.split(jax.random.key(0), 3)
        self.batch = (
            jax.random.uniform(keys[0], (batch_size, 32, 32, 1)),
            jax.random.randint(keys[1], (batch_size,), 0, 10),
        )
        variables = dict(model.init(keys[2], self.batch[0]))
        self.params, self.rest = variables.pop("params"), variables
        self.optimizer = optax.sgd(0.01, momentum=0.9)
        self.state = (self.params, self.rest, self.optimizer.init(self.params))

    def step(self, state, batch):
        params, rest, opt_state = state
        images, labels = batch

        def loss_fn(params):
            logits, updates = self.model.apply(
                {"params": params, **rest}, images, train=True, mutable=list(rest)
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        deltas, opt_state = self.optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, deltas), {**rest, **updates}, opt_state), loss

    def compile(self) -> float:
        """Trace and compile the step; return the seconds it took."""
        start = time.perf_counter()
        jitted = jax.jit(self.step, donate_argnums=0)
        self.compiled = jitted.lower(self.state, self.batch).compile()
        return time.perf_counter() - start

    def __call__(self) -> jax.Array:
        self.state, loss = self.compiled(self.state, self.batch)
        return loss


def main() -> None:
    """Print step and compile times, and their ratios to the float model's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=10)
    arguments = parser.parse_args()
    table = Table(
        title="LeNet5 training step", caption=f"jax {jax.__version__}, {jax.devices()[0]}"
    )
    for column in (
        "batch",
        "float ms",
        "SimQAT ms",
        "ratio",
        "compile float s",
        "SimQAT s",
        "ratio",
    ):
        table.add_column(column, justify="right")
    for batch_size in arguments.batch_size:
        models = {"float": LeNet5(), "simqat": sq.SimQAT().apply(LeNet5())}
        trainers = {name: Trainer(model, batch_size) for name, model in models.items()}
        compiling: dict[str, float] = {}
        for _ in range(3):  # the first compilation also loads the compiler
            for name, trainer in trainers.items():
                jax.clear_caches()
                compiling[name] = min(trainer.compile(), compiling.get(name, float("inf")))
        step = interleaved(trainers, arguments.rounds, arguments.calls)
        table.add_row(
            str(batch_size),
            *(f"{step[n] * 1e3:.2f}" for n in ("float", "simqat")),
            f"{step['simqat'] / step['float']:.3f}",
            *(f"{compiling[n]:.2f}" for n in ("float", "simqat")),
            f"{compiling['simqat'] / compiling['float']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
