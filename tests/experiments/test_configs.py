"""Every experiment trains a step and is evaluated, with a smaller model on a few images."""

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_imagenet
from rich.console import Console

import simqat_jax as sq
from experiments import configs, data, evaluate, phases, quantization, train
from experiments.errors import ExperimentError
from experiments.models import LeNet5, MobileNetV2, ResNet20

RECIPES = Path(configs.__file__).parent / "recipes"
SMALLER = {
    "resnet20_cifar10": {"stage_sizes": (1,), "width": 4},
    "resnet18_cifar10": {"stage_sizes": (1,), "width": 4},
    "resnet50_cifar10": {"stage_sizes": (1,), "width": 4},
    "resnet50_imagenet": {"stage_sizes": (1,), "width": 4},
    "mobilenetv2_cifar10": {"groups": ((1, 16, 1, 1), (6, 24, 2, 2))},
    "mobilenetv2_strided_cifar10": {"groups": ((1, 16, 1, 1), (6, 24, 2, 2))},
    "vit_tiny_cifar10": {"layers": 1, "width": 8, "heads": 2, "patch": 16},
    "mixer_cifar10": {"layers": 1, "width": 8, "patch": 16},
    "lstm_mnist_rows": {"features": 4, "rows": 16},
}
PHASES = {
    "lenet5_mnist": ("float", "qat_finetune"),
    "resnet50_imagenet": ("float", "qat_finetune"),
    "mobilenetv2_cifar10": ("float",),
}
"""Of the other configs `qat`: compiling takes the time of these tests."""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine training and five test images of every set, where the real ones would be."""
    rng = np.random.default_rng(0)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("SIMQAT_CACHE_DIR", str(cache))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for file, shape in (("mnist-3.0.1.npz", (28, 28, 1)), ("cifar10-3.0.2.npz", (32, 32, 3))):
        arrays = {}
        for split, count in (("train", 9), ("test", 5)):
            arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
            arrays[f"{split}_labels"] = rng.integers(0, 10, count)
        np.savez(cache / file, **arrays)
    tiny_imagenet.write(tmp_path / "tfds", train=9, test=5)
    return tmp_path


AT_NIGHT = (
    *("resnet18_cifar10", "resnet50_cifar10", "mobilenetv2_cifar10", "mixer_cifar10"),
    *("mobilenetv2_strided_cifar10", "vit_tiny_cifar10"),
)
"""Those whose models other tests have as well."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.nightly) if name in AT_NIGHT else name
        for name in configs.CONFIGS
    ],
)
def test_one_step_of_every_config(name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = configs.CONFIGS[name]()
    model = functools.partial(full.model, **SMALLER[name]) if name in SMALLER else full.model
    size = 32 if full.data == "imagenet2012" else None
    small = dataclasses.replace(full, model=model, test_batch_size=4, image_size=size)
    monkeypatch.setitem(configs.CONFIGS, name, lambda: small)
    arguments = train.Arguments(
        config=name,
        phases=PHASES.get(name, ("qat",)),
        epochs=1,
        finetune_epochs=1,
        warmup_epochs=0,
        batch_size=8,
        runs_dir=tiny,
        name="run",
    )
    results = train.run_experiment(arguments, Console(quiet=True))
    written = json.loads((tiny / "run" / "results.json").read_text())
    for phase, progress in results.items():
        (record,) = progress.history
        assert np.isfinite(record["loss"])
        assert 0 <= record["accuracy"] <= record["top5_accuracy"] <= 1
        assert written[f"{phase}_accuracy"] == record["accuracy"]
        assert written[f"{phase}_top5_accuracy"] == record["top5_accuracy"]
    assert list(results) == list(arguments.phases)
    if len(results) == 1:
        return
    found = evaluate.evaluate(tiny / "run")
    assert [e.accuracy for e in found] == [r.history[-1]["accuracy"] for r in results.values()]


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_config_says_how_to_run_it_and_describes_its_model(name: str) -> None:
    function = configs.CONFIGS[name]
    text = inspect.getdoc(function) or ""
    assert f"python -m experiments.train --config {name}" in text
    assert "Expected" in text
    settings = function().settings()
    assert settings["config"] == name
    assert not re.search("object at|0x", str(settings))
    # What is written is enough to make the same experiment again.
    again = configs.get(name, **configs.overrides(settings))
    assert again.settings() == settings


def test_overrides_survive_the_round_trip() -> None:
    given = {"bn_fold": "two_conv", "freeze_bn_epoch": 3, "float_checkpoint": "runs/a"}
    experiment = configs.get("resnet20_cifar10", **given, dtype="bfloat16")
    assert experiment.quant.bn_fold == "two_conv"
    settings = experiment.settings()
    assert configs.get("resnet20_cifar10", **configs.overrides(settings)) == experiment


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_recipes_fit_their_models_and_survive_the_round_trip(path: Path) -> None:
    config = {"lenet5": "lenet5_mnist", "resnet20": "resnet20_cifar10"}[path.stem.split("_")[0]]
    experiment = configs.get(config, quant=quantization.read_recipe(path), step_learning_rate=0.5)
    settings = json.loads(json.dumps(experiment.settings()))
    assert configs.get(config, **configs.overrides(settings)) == experiment
    qmodel = sq.SimQAT(experiment.quant).apply(experiment.build_model(10))
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), x))
    assert qmodel.plan(variables, x).quantizers["input"].spec.num_bits == 8


def _phase(name: str, **options: object) -> phases.Phase:
    dataset = data.Dataset(
        name="tiny",
        train_images=np.zeros((24, 32, 32, 3), np.float32),
        train_labels=np.zeros(24, np.int32),
        test_images=np.zeros((1, 32, 32, 3), np.float32),
        test_labels=np.zeros(1, np.int32),
        num_classes=10,
    )
    experiment = configs.get("resnet20_cifar10", batch_size=8, **options)
    small = functools.partial(ResNet20, stage_sizes=(1,), width=4)
    return phases.build(name, dataclasses.replace(experiment, model=small), dataset, Path("x"))


def test_freezing_is_given_in_epochs_and_set_in_steps() -> None:
    assert _phase("qat", freeze_bn_epoch=2).model.config.freeze_bn == 6
    assert _phase("qat").model.config.freeze_bn is None


def test_dtype_is_that_of_the_computation_alone() -> None:
    state = phases.init_state(phase := _phase("qat", dtype="bfloat16"))
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    assert phase.model.module.dtype == jnp.bfloat16


def test_fine_tuning_has_its_own_epochs_and_learning_rate() -> None:
    options = {"epochs": 9, "finetune_epochs": 2, "learning_rate": 0.5}
    for name, epochs, rate in (("float", 9, 0.5), ("qat", 9, 0.5), ("qat_finetune", 2, 0.005)):
        phase = _phase(name, **options)
        assert (phase.epochs, phase.learning_rate) == (epochs, rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": 12}, "--warmup-epochs must be 0 or more and below --epochs 12, got 12"),
        ({"finetune_epochs": 0}, "--finetune-epochs must be 1 or more, got 0"),
        ({"finetune_learning_rate": 0.0}, "--finetune-learning-rate must be a finite number"),
        ({"weight_decay": -1.0}, "--weight-decay must be a finite number, 0 or more, got -1.0"),
        ({"label_smoothing": 1.0}, r"--label-smoothing must be in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "--schedule must be one of constant, cosine, polynomial"),
        ({"dtype": "float16"}, "--dtype must be one of float32, bfloat16, got 'float16'"),
        ({"bn_fold": "three"}, "--bn-fold must be one of none, one_conv, two_conv, got 'three'"),
        ({"freeze_bn_epoch": -1}, "--freeze-bn-epoch must be 0 or more, got -1"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        configs.get("resnet20_cifar10", **options)


def test_model_without_dtype_is_refused() -> None:
    with pytest.raises(ExperimentError, match="--dtype: LeNet5 computes in float32 only"):
        configs.get("lenet5_mnist", dtype="bfloat16")
    assert configs.get("mobilenetv2_cifar10", dtype="bfloat16").model is MobileNetV2
    assert configs.get("lenet5_mnist").model is LeNet5
