"""One frozen config for each experiment: everything that decides its figures."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

import simqat_jax as sq
from experiments import data
from experiments.errors import ExperimentError
from experiments.models import (
    LeNet5,
    MLPMixer,
    MobileNetV2,
    ResNet18,
    ResNet20,
    ResNet50,
    RowLSTM,
    VisionTransformer,
)
from experiments.optimization import Optimizer, Schedule

Dtype = Literal["float32", "bfloat16"]
BatchNormFold = Literal["none", "one_conv", "two_conv"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A model, its data and its training.

    Raises:
      ExperimentError: a value out of range, at construction.
    """

    config: str
    """Name in CONFIGS."""
    model: Callable[..., nn.Module]
    """Called with `num_classes`, and with `dtype` where that is not float32."""
    data: str
    """Name of a data set, see experiments.data."""
    image_size: int | None = None
    """Side of the crops of ImageNet, pixels; None: 224. Other sets have their own."""
    batch_size: int
    """Images in a training batch; what is left over at an epoch's end is left out."""
    epochs: int
    """Of the float phase and of SimQAT from scratch."""
    finetune_epochs: int | None = None
    """Of SimQAT from the float parameters; None: `epochs`."""
    learning_rate: float
    """Highest learning rate of the float phase and of SimQAT from scratch."""
    finetune_learning_rate: float | None = None
    """Of SimQAT from the float parameters; None: `learning_rate`."""
    step_learning_rate: float | None = None
    """Highest learning rate of learned steps; None: that of the phase."""
    schedule: Schedule = "constant"
    """How the learning rate falls, see experiments.optimization."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises to `learning_rate`; none in fine-tuning."""
    optimizer: Optimizer = "sgd"
    """SGD with momentum, or AdamW, as transformers want it."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """L2 of SGD, decoupled of AdamW; on kernels alone."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in training."""
    dtype: Dtype = "float32"
    """Of the computation; parameters and statistics stay float32."""
    seed: int = 0
    """Of the first parameters, the order of the images and their augmentation, for all phases."""
    steps_per_dispatch: int = 1
    """Training steps compiled into one `lax.scan`. On CPU one is fastest by far: XLA runs
    convolutions inside a loop without its multi-threaded kernels."""
    accumulate: int = 1
    """Parts of a batch that go through the model one after the other, before one step of the
    optimizer: less memory. BatchNorm's statistics and ranges are those of each part in turn."""
    test_batch_size: int = 500
    quant: sq.SimQATConfig = dataclasses.field(default_factory=sq.SimQATConfig)
    freeze_bn_epoch: int | None = None
    """Epochs of a SimQAT phase after which BatchNorm uses its running statistics and leaves them
    alone; None: never."""
    float_checkpoint: str | None = None
    """Where fine-tuning starts, instead of this run's own float phase."""

    def __post_init__(self) -> None:
        data.check_name(self.data)
        for field in (
            "batch_size",
            "epochs",
            "steps_per_dispatch",
            "accumulate",
            "test_batch_size",
        ):
            _require(self, field, getattr(self, field) >= 1, "1 or more")
        for field in ("finetune_epochs", "image_size"):
            value = getattr(self, field)
            _require(self, field, value is None or value >= 1, "1 or more")
        _require(self, "seed", 0 <= self.seed < 2**31, "0 to 2**31 - 1")
        for field in ("learning_rate", "finetune_learning_rate", "step_learning_rate"):
            rate = self.learning_rate if getattr(self, field) is None else getattr(self, field)
            _require(self, field, math.isfinite(rate) and rate > 0, "a finite number above 0")
        _require(self, "optimizer", self.optimizer in get_args(Optimizer), _one_of(Optimizer))
        _require(self, "schedule", self.schedule in get_args(Schedule), _one_of(Schedule))
        warm = self.warmup_epochs == 0 or 0 < self.warmup_epochs < self.epochs
        _require(self, "warmup_epochs", warm, f"0 or more and below --epochs {self.epochs}")
        for field in ("momentum", "label_smoothing"):
            _require(self, field, 0 <= getattr(self, field) < 1, "in [0, 1)")
        valid = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        _require(self, "weight_decay", valid, "a finite number, 0 or more")
        _require(self, "dtype", self.dtype in get_args(Dtype), _one_of(Dtype))
        if self.dtype != "float32" and "dtype" not in _fields(self.model):
            raise ExperimentError(f"--dtype: {_describe(self.model)} computes in float32 only.")
        _require(self, "freeze_bn_epoch", (self.freeze_bn_epoch or 0) >= 0, "0 or more")

    def build_model(self, num_classes: int) -> nn.Module:
        """Return the float model."""
        options = {} if self.dtype == "float32" else {"dtype": jnp.dtype(self.dtype)}
        return self.model(num_classes=num_classes, **options)

    def settings(self) -> dict[str, Any]:
        """Return every field as JSON values: what `--resume` compares."""
        quant = self.quant.to_dict()
        fields = dataclasses.asdict(self) | {"model": _describe(self.model), "quant": quant}
        return json.loads(json.dumps(fields))


def _one_of(choices: object) -> str:
    return "one of " + ", ".join(get_args(choices))


def _fields(model: Any) -> set[str]:
    while isinstance(model, functools.partial):
        model = model.func
    return {field.name for field in dataclasses.fields(model)}


def _describe(value: object) -> str:
    """Return the name of a class, or of a partial one with its arguments."""
    if isinstance(value, functools.partial):
        options = (f"{name}={_describe(given)}" for name, given in value.keywords.items())
        return f"{_describe(value.func)}({', '.join(options)})"
    return getattr(value, "__name__", None) or repr(value)


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


def resnet20_cifar10() -> Experiment:
    """ResNet-20 on CIFAR-10, short enough for two CPU cores.

    python -m experiments.train --config resnet20_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    return Experiment(
        config="resnet20_cifar10",
        model=ResNet20,
        data="cifar10",
        batch_size=64,
        epochs=12,
        learning_rate=0.05,
        finetune_learning_rate=0.005,
        schedule="cosine",
        warmup_epochs=1,
        weight_decay=5e-4,
    )


def _cifar10_on_gpu(config: str, model: Callable[..., nn.Module]) -> Experiment:
    return Experiment(
        config=config,
        model=model,
        data="cifar10",
        batch_size=128,
        epochs=100,
        finetune_epochs=10,
        learning_rate=0.1,
        finetune_learning_rate=0.005,
        schedule="cosine",
        warmup_epochs=5,
        weight_decay=5e-4,
    )


def resnet18_cifar10() -> Experiment:
    """ResNet-18 with the CIFAR stem on CIFAR-10; for a GPU.

    python -m experiments.train --config resnet18_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    return _cifar10_on_gpu("resnet18_cifar10", ResNet18)


def resnet50_cifar10() -> Experiment:
    """ResNet-50 with the CIFAR stem on CIFAR-10; for a GPU.

    python -m experiments.train --config resnet50_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    return _cifar10_on_gpu("resnet50_cifar10", ResNet50)


def mobilenetv2_cifar10() -> Experiment:
    """MobileNetV2 with the CIFAR stem on CIFAR-10; for a GPU.

    python -m experiments.train --config mobilenetv2_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    return _cifar10_on_gpu("mobilenetv2_cifar10", MobileNetV2)


def mobilenetv2_strided_cifar10() -> Experiment:
    """MobileNetV2 with its ImageNet strides on CIFAR-10, short enough for two CPU cores.

    python -m experiments.train --config mobilenetv2_strided_cifar10 --phases float qat_finetune

    Images are 16 pixels wide behind the stem and one behind the last blocks: a check of the
    operations, not of what the architecture can reach.

    Expected: see experiments/README.md.
    """
    return Experiment(
        config="mobilenetv2_strided_cifar10",
        model=functools.partial(MobileNetV2, cifar_stem=False),
        data="cifar10",
        batch_size=64,
        epochs=3,
        finetune_epochs=2,
        learning_rate=0.05,
        finetune_learning_rate=0.005,
        schedule="cosine",
        warmup_epochs=1,
        weight_decay=1e-4,
    )


def resnet50_imagenet() -> Experiment:
    """ResNet-50 on ImageNet 2012, the source system's recipe on one device; for a GPU.

    python -m experiments.train --config resnet50_imagenet --workers 16

    Batch 32, momentum 0.9, weight decay 1e-4, 5 of 180 epochs of warm-up, polynomial decay. The
    learning rate is ours: 0.1 for 256 images, in proportion to the batch.

    Expected: see the table in experiments/README.md.
    """
    return Experiment(
        config="resnet50_imagenet",
        model=functools.partial(ResNet50, cifar_stem=False),
        data="imagenet2012",
        batch_size=32,
        epochs=180,
        finetune_epochs=10,
        learning_rate=0.0125,
        finetune_learning_rate=0.00125,
        schedule="polynomial",
        warmup_epochs=5,
        weight_decay=1e-4,
        test_batch_size=250,
    )


def lstm_mnist_rows() -> Experiment:
    """An LSTM that reads the rows of digits, on the full MNIST.

    python -m experiments.train --config lstm_mnist_rows --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    return Experiment(
        config="lstm_mnist_rows",
        model=RowLSTM,
        data="mnist",
        batch_size=64,
        epochs=5,
        finetune_epochs=2,
        learning_rate=2e-3,
        finetune_learning_rate=2e-4,
        optimizer="adamw",
        schedule="cosine",
        weight_decay=1e-4,
    )


def _patches(config: str, model: Callable[..., nn.Module]) -> Experiment:
    return Experiment(
        config=config,
        model=model,
        data="cifar10",
        batch_size=64,
        epochs=20,
        finetune_epochs=2,
        learning_rate=1e-3,
        finetune_learning_rate=1e-4,
        optimizer="adamw",
        schedule="cosine",
        warmup_epochs=2,
        weight_decay=0.05,
    )


def vit_tiny_cifar10() -> Experiment:
    """A small Vision Transformer on CIFAR-10: 64 patches of 4x4, 6 layers, 128 wide.

    python -m experiments.train --config vit_tiny_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    model = functools.partial(VisionTransformer, patch=4, layers=6, width=128, heads=4)
    return _patches("vit_tiny_cifar10", model)


def mixer_cifar10() -> Experiment:
    """A small MLP-Mixer on CIFAR-10: 64 patches of 4x4, 6 layers, 128 wide.

    python -m experiments.train --config mixer_cifar10 --phases float qat_finetune

    Expected: see the table in experiments/README.md.
    """
    sizes = {"patch": 4, "layers": 6, "width": 128, "across_patches": 64, "across_features": 512}
    return _patches("mixer_cifar10", functools.partial(MLPMixer, **sizes))


CONFIGS: dict[str, Callable[[], Experiment]] = {
    "lenet5_mnist": lenet5_mnist,
    "resnet20_cifar10": resnet20_cifar10,
    "resnet18_cifar10": resnet18_cifar10,
    "resnet50_cifar10": resnet50_cifar10,
    "mobilenetv2_cifar10": mobilenetv2_cifar10,
    "mobilenetv2_strided_cifar10": mobilenetv2_strided_cifar10,
    "resnet50_imagenet": resnet50_imagenet,
    "lstm_mnist_rows": lstm_mnist_rows,
    "vit_tiny_cifar10": vit_tiny_cifar10,
    "mixer_cifar10": mixer_cifar10,
}


OVERRIDABLE = (
    *("data", "epochs", "finetune_epochs", "batch_size", "learning_rate"),
    *("finetune_learning_rate", "step_learning_rate", "schedule", "warmup_epochs", "weight_decay"),
    *("label_smoothing", "dtype", "seed", "steps_per_dispatch", "accumulate", "quant", "bn_fold"),
    *("freeze_bn_epoch", "float_checkpoint"),
)
"""Fields that the command line may replace; `bn_fold` is one of `quant`."""


def get(name: str, **overrides: object) -> Experiment:
    """Return the named experiment with every override that is not None in place of its value.

    Raises:
      ExperimentError: unknown name; a value out of range.
    """
    if name not in CONFIGS:
        raise ExperimentError(f"unknown config {name!r}; known: {', '.join(CONFIGS)}.")
    experiment = CONFIGS[name]()
    given: dict[str, Any] = {f: value for f, value in overrides.items() if value is not None}
    if "bn_fold" in given:
        bn_fold = given.pop("bn_fold")
        if bn_fold not in get_args(BatchNormFold):
            raise ExperimentError(f"--bn-fold must be {_one_of(BatchNormFold)}, got {bn_fold!r}.")
        quant = given.get("quant", experiment.quant)
        given["quant"] = dataclasses.replace(quant, bn_fold=bn_fold)
    return dataclasses.replace(experiment, **given)


def overrides(settings: dict[str, Any]) -> dict[str, object]:
    """Return what `get` takes to make an experiment of these settings, see Experiment.settings."""
    quant = sq.SimQATConfig.from_dict(completed(settings)["quant"])
    given: dict[str, object] = {field: settings.get(field) for field in OVERRIDABLE}
    return given | {"quant": quant}


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with the default of every field that is newer than the run."""
    with_defaults = (
        f for f in dataclasses.fields(Experiment) if f.default is not dataclasses.MISSING
    )
    defaults = {field.name: field.default for field in with_defaults}
    defaults["quant"] = sq.SimQATConfig().to_dict()
    return _over(json.loads(json.dumps(defaults)), settings)


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    nested = {
        name: _over(defaults[name], value)
        for name, value in given.items()
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
    }
    return defaults | given | nested
