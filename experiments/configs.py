"""One frozen config for each experiment: everything that decides its figures."""

import dataclasses
import json
import math
from collections.abc import Callable

import flax.linen as nn
import optax

import simqat_jax as sq
from experiments import data
from experiments.errors import ExperimentError
from experiments.models import LeNet5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data and its training.

    Raises: ExperimentError: a value out of range, at construction.
    """

    config: str
    """Name in CONFIGS."""
    model: Callable[..., nn.Module]
    """Called with `num_classes`."""
    data: str
    """Name of a data set, see experiments.data."""
    batch_size: int
    """Images in a training batch; what is left over at an epoch's end is left out."""
    epochs: int
    """Of each phase: float, SimQAT from scratch, SimQAT from the float parameters."""
    learning_rate: float
    momentum: float = 0.9
    seed: int = 0
    """Of the first parameters and the order of the images; all phases share it."""
    steps_per_dispatch: int = 1
    """Training steps compiled into one `lax.scan`. On CPU one is fastest by far: XLA runs
    convolutions inside a loop without its multi-threaded kernels."""
    test_batch_size: int = 500
    quant: sq.SimQATConfig = dataclasses.field(default_factory=sq.SimQATConfig)

    def __post_init__(self) -> None:
        data.check_name(self.data)
        for field in ("batch_size", "epochs", "steps_per_dispatch", "test_batch_size"):
            _require(self, field, getattr(self, field) >= 1, "1 or more")
        _require(self, "seed", 0 <= self.seed < 2**31, "0 to 2**31 - 1")
        valid = math.isfinite(self.learning_rate) and self.learning_rate > 0
        _require(self, "learning_rate", valid, "a finite number above 0")
        _require(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")

    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer of a phase."""
        return optax.sgd(self.learning_rate, momentum=self.momentum)

    def settings(self) -> dict:
        """Return every field as JSON values: what `--resume` compares."""
        fields = dataclasses.asdict(self) | {"model": self.model.__name__}
        return json.loads(json.dumps(fields))


def _require(experiment: Experiment, field: str, valid: bool, wanted: str) -> None:
    if not valid:
        option = "--" + field.replace("_", "-")
        raise ExperimentError(f"{option} must be {wanted}, got {getattr(experiment, field)!r}.")


def lenet5_mnist() -> Experiment:
    """LeNet-5 on the full MNIST, the source system's recipe.

    python -m experiments.train --config lenet5_mnist

    Expected on the 10,000 test digits: 98.9 % and more in each of the three phases.
    With `--data mnist5k`, which needs no download: 96 % and more of the 1,000 held-out digits.
    """
    return Experiment(
        config="lenet5_mnist",
        model=LeNet5,
        data="mnist",
        batch_size=32,
        epochs=10,
        learning_rate=0.01,
        momentum=0.9,
    )


CONFIGS: dict[str, Callable[[], Experiment]] = {"lenet5_mnist": lenet5_mnist}


OVERRIDABLE = ("data", "batch_size", "epochs", "learning_rate", "seed", "steps_per_dispatch")
"""Fields that the command line may replace."""


def get(name: str, **overrides: object) -> Experiment:
    """Return the named experiment with every override that is not None in place of its value.

    Raises: ExperimentError: unknown name; a value out of range.
    """
    if name not in CONFIGS:
        raise ExperimentError(f"unknown config {name!r}; known: {', '.join(CONFIGS)}.")
    given = {field: value for field, value in overrides.items() if value is not None}
    return dataclasses.replace(CONFIGS[name](), **given)
