r"""What quantization without training costs: accuracy and distance from the float network.

Calibration data are training images, and the test set is what is measured on; EfficientNet-Lite0
has published weights, and photos for both.

Example:
  TFDS_DATA_DIR=tfds python -m experiments.benchmarks.ptq --model lenet5
  make peers; SIMQAT_PHOTOS=photos python -m experiments.benchmarks.ptq --model lite0 \
    --peers .venv-peers/bin/python
"""

import dataclasses
import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from flax import serialization
from rich.console import Console
from rich.table import Table

import simqat_jax as sq
from experiments import lite0, pretrained
from experiments.data import ImageData, in_batches, load, photos
from experiments.distillation import distil
from experiments.errors import run_or_exit
from experiments.models import EfficientNetLite0, LeNet5

_EPOCHS, _BATCH, _RATE = 3, 128, 2e-3
"""Of the float LeNet5, with a cosine schedule of Adam."""
_AT_ONCE = 32
"""Examples of an evaluation."""

Recipe = Literal["calibrate", "fast", "accurate", "distilled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options of the command."""

    model: Literal["lenet5", "lite0"] = "lenet5"
    """LeNet5 on MNIST, trained here; EfficientNet-Lite0 on the photos of SIMQAT_PHOTOS."""
    weight_bits: tuple[int, ...] = (8, 4, 3, 2)
    """Widths of the kernels, one row each."""
    activation_bits: int = 8
    """Width of activations."""
    per_tensor: bool = False
    """One range for each kernel, not one for each output channel."""
    calibration: int | None = None
    """Examples to calibrate on; by default 512 of MNIST, 96 photos."""
    examples: int | None = None
    """Examples to measure on; by default all."""
    recipes: tuple[Recipe, ...] = ("calibrate", "fast", "accurate")
    """Ways to quantize, one row each: ranges alone, the recipes of `post_training_quantize`, and
    "distilled": "accurate", then training on the calibration data without their labels."""
    observer: str | None = None
    """Observer of kernels, as "mse"."""
    ends: int | None = None
    """Width of the first and the last layer's kernels; by default that of the others."""
    distillation_steps: int = 120
    """Of 16 examples."""
    peers: Path | None = None
    """Python of `make peers`: what AI Edge Quantizer and qwix make of the same data, at 8 bits."""
    seed: int = 0
    """Of the float LeNet5."""


class Workload(NamedTuple):
    """A trained float network, batches to calibrate on, and what it is measured on."""

    module: nn.Module
    variables: Any
    batches: list[np.ndarray]
    x: np.ndarray
    labels: np.ndarray
    ends: tuple[str, ...] = ()
    """Paths of the first and the last layer, as far as they are wanted."""


def trained_lenet5(data: ImageData, seed: int, epochs: int = _EPOCHS) -> Any:
    """Return the variables of a LeNet5 trained on digits."""
    module = LeNet5()
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, epochs * data.train_size // _BATCH))
    variables = module.init(jax.random.key(seed), data.sample())
    state = optimizer.init(variables)

    @jax.jit
    def step(variables: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        def loss(variables: Any) -> jax.Array:
            logits: Any = module.apply(variables, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        deltas, new = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, deltas), new

    for epoch in range(epochs):
        for x, y in data.train_batches(_BATCH, seed, epoch):
            variables, state = step(variables, state, x, y)
    return variables


def lenet5_on_digits(
    data: ImageData, calibration: int, seed: int, epochs: int = _EPOCHS
) -> Workload:
    """Train LeNet5 on digits; take the first training images to calibrate on."""
    variables = trained_lenet5(data, seed, epochs)
    images, labels, real = map(np.concatenate, zip(*data.test_batches(1000), strict=True))
    first = next(iter(data.train_batches(calibration, seed, 0)))[0]
    ends = ("Conv_0", "Dense_2")
    return Workload(LeNet5(), variables, [first], images[real], labels[real], ends)


def lenet5(arguments: Arguments) -> Workload:
    """Train LeNet5 on MNIST."""
    return lenet5_on_digits(load("mnist"), arguments.calibration or 512, arguments.seed)


def lite0_on_photos(arguments: Arguments) -> Workload:
    """Take the published EfficientNet-Lite0, and photos."""
    chosen, others = photos.load().split(arguments.calibration or 96)
    x = lite0.preprocess(chosen.pixels)
    return Workload(
        EfficientNetLite0(),
        pretrained.efficientnet_lite0(),
        [x[i : i + 32] for i in range(0, len(x), 32)],
        lite0.preprocess(others.pixels[: arguments.examples]),
        others.labels[: arguments.examples],
        ("stem", "classifier"),
    )


WORKLOADS: dict[str, Callable[[Arguments], Workload]] = {
    "lenet5": lenet5,
    "lite0": lite0_on_photos,
}
"""By the name that the command takes."""


def _config(arguments: Arguments, work: Workload, bits: int) -> sq.SimQATConfig:
    weight = dataclasses.replace(
        sq.SimQATConfig().weight,
        num_bits=bits,
        per_channel=not arguments.per_tensor,
        **({} if arguments.observer is None else {"observer": arguments.observer}),
    )
    config = sq.SimQATConfig(
        weight=weight, activation=sq.QuantSpec(num_bits=arguments.activation_bits)
    )
    if arguments.ends is None:
        return config
    wider = dataclasses.replace(weight, num_bits=arguments.ends)
    rules = [sq.Rule(path=path, weight=wider) for path in work.ends]
    return dataclasses.replace(config, rules=rules)


def quantize(
    work: Workload, recipe: Recipe, config: sq.SimQATConfig, arguments: Arguments
) -> tuple[sq.QuantizedModule, Any]:
    """Return the quantized network and its variables, by one of the recipes."""
    if recipe == "calibrate":
        qmodel = sq.SimQAT(config).apply(work.module)
        return qmodel, sq.calibrate(qmodel, work.variables, work.batches)
    known = "accurate" if recipe == "distilled" else recipe
    qmodel, variables = sq.post_training_quantize(
        work.module, work.variables, work.batches, config=config, recipe=known
    )
    if recipe == "distilled":
        teacher: Any = functools.partial(work.module.apply, work.variables)
        variables = distil(
            qmodel,
            variables,
            teacher,
            np.concatenate(work.batches),
            steps=arguments.distillation_steps,
            seed=arguments.seed,
        )
    return qmodel, variables


def _columns(got: np.ndarray, logits: np.ndarray, labels: np.ndarray) -> tuple[str, str, str]:
    noise = np.sum((got - logits) ** 2, dtype=np.float64)
    return (
        f"{np.mean(got.argmax(-1) == labels):.2%}",
        f"{np.mean(got.argmax(-1) == logits.argmax(-1)):.2%}",
        f"{10 * np.log10(np.sum(logits**2, dtype=np.float64) / noise):.2f}",
    )


def _of_peers(python: Path, model: str, work: Workload, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the logits that the tools of another environment come to, at 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder, "variables.msgpack")
        values.write_bytes(serialization.to_bytes(work.variables))
        np.savez(Path(folder, "images.npz"), chosen=np.concatenate(work.batches), x=x)
        command = [python, "-m", "experiments.benchmarks.peers.ptq", model, folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
        return {path.stem: np.load(path) for path in sorted(Path(folder).glob("*.npy"))}


def _peak_gb() -> float:
    """Return the most memory that this process has taken so far, what came before included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def measure(arguments: Arguments, console: Console) -> None:
    """Quantize in every way, and print a table."""
    work = WORKLOADS[arguments.model](arguments)
    x, labels = work.x[: arguments.examples], work.labels[: arguments.examples]
    run: Any = jax.jit(work.module.apply)
    logits = in_batches(lambda x: run(work.variables, x), x, _AT_ONCE)
    table = Table(title=f"{arguments.model}, float {np.mean(logits.argmax(-1) == labels):.2%}")
    for column in ("weight bits", "recipe", "top-1", "as float", "SQNR, dB", "s", "GB"):
        table.add_column(column, justify="right")
    for bits in arguments.weight_bits:
        for recipe in arguments.recipes:
            start = time.perf_counter()
            qmodel, variables = quantize(work, recipe, _config(arguments, work, bits), arguments)
            cost = f"{time.perf_counter() - start:.0f}", f"{_peak_gb():.1f}"
            evaluate: Any = functools.partial(qmodel.apply, variables)
            got = in_batches(evaluate, x, _AT_ONCE)
            table.add_row(str(bits), recipe, *_columns(got, logits, labels), *cost)
    if arguments.peers is not None:
        for tool, got in _of_peers(arguments.peers, arguments.model, work, x).items():
            table.add_row("8", tool, *_columns(got, logits, labels))
    console.print(table)


def main() -> None:
    """Run the command."""
    measure(tyro.cli(Arguments, description=__doc__), Console())


if __name__ == "__main__":
    run_or_exit(main)
