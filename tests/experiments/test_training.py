"""The training loop on models and data of a few values."""

import dataclasses
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simqat_jax as sq
from experiments import checkpoints, configs, phases, training
from experiments.data import Dataset, augmentation
from experiments.errors import ExperimentError


class Tiny(nn.Module):
    """A convolution with BatchNorm and dropout: every kind of collection and a random key."""

    num_classes: int = 2
    width: int = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(self.width, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


def _dataset(train: int = 48, test: int = 10) -> Dataset:
    """Dark images of class 0, bright images of class 1."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, train + test).astype(np.int32)
    images = (
        rng.random((train + test, 6, 6, 1), np.float32) * 0.5 + 0.5 * labels[:, None, None, None]
    )
    images = images.astype(np.float32)
    return Dataset(
        name="tiny",
        train_images=images[:train],
        train_labels=labels[:train],
        test_images=images[train:],
        test_labels=labels[train:],
        num_classes=2,
    )


def _phase(directory: Path, name: str = "float", **options: object) -> phases.Phase:
    dataset = options.pop("dataset", _dataset())
    experiment = configs.Experiment(
        **{
            "config": "tiny",
            "model": Tiny,
            "data": "mnist5k",
            "batch_size": 8,
            "epochs": 2,
            "learning_rate": 0.1,
            "test_batch_size": 4,
        }
        | options
    )
    return phases.build(name, experiment, dataset, directory, keep=2, checkpoint_every=4)


def _train(phase: phases.Phase) -> tuple[phases.TrainState, checkpoints.Progress]:
    return training.train(phase, phases.init_state(phase), lambda progress, state: None)


@pytest.mark.parametrize("name", ["float", "qat"])
def test_every_collection_is_trained_saved_and_evaluated(tmp_path: Path, name: str) -> None:
    phase = _phase(tmp_path, name)
    first = jax.tree.map(np.asarray, phases.init_state(phase))
    state, progress = _train(phase)
    assert int(state.step) == 12
    assert set(state.collections) == {"batch_stats"} | ({"quant_stats"} if name == "qat" else set())
    changed = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), first.collections, state.collections
    )
    assert all(jax.tree.leaves(changed["batch_stats"]))
    if name == "qat":
        assert int(state.collections["quant_stats"]["step"]) == 12
    restored, again = checkpoints.restore(phase.directory, 12, phases.init_state(phase))
    assert again == progress
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    # Counted one image at a time, without padding or mask.
    variables = {"params": state.params, **state.collections}
    dataset = phase.dataset
    assert isinstance(dataset, Dataset)
    images, labels = dataset.test_images, dataset.test_labels
    logits = phase.model.apply(variables, images, train=False)
    correct = sum(int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True))
    assert progress.history[-1]["accuracy"] == correct / len(labels)


def test_learned_steps_start_from_data_and_are_trained(tmp_path: Path) -> None:
    quant = sq.LearnedStepSizeQuantizationAwareTraining().config
    phase = _phase(tmp_path, "qat", quant=quant, step_learning_rate=0.01)
    first = phases.init_state(phase)
    assert not any(np.any(step) for step in first.quant_params.values())
    start = jax.tree.map(np.asarray, training.set_steps(phase, first))
    assert int(start.collections["quant_stats"]["step"]) == 0
    state, _ = _train(phase)
    assert set(state.collections) == {"batch_stats", "quant_stats"}
    assert int(state.collections["quant_stats"]["step"]) == 12
    for name, step in state.quant_params.items():
        assert np.all(step > 0) and np.all(start.quant_params[name] > 0)
        assert not np.array_equal(step, start.quant_params[name])
    restored, _ = checkpoints.restore(phase.directory, 12, phases.init_state(phase))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def _delayed(directory: Path, **options: object) -> phases.Phase:
    """The last of 12 steps quantizes, with learned steps that stay where they start."""
    specs = {"observer": "learned", "num_bits": 4, "quant_delay": 11}
    weight, activation = sq.QuantSpec.weight(**specs), sq.QuantSpec.activation(**specs)
    quant = sq.SimQATConfig(weight=weight, activation=activation)
    return _phase(directory, "qat", quant=quant, step_learning_rate=1e-30, **options)


@pytest.mark.parametrize("dispatched", [pytest.param(1, marks=pytest.mark.nightly), 3])
def test_learned_steps_start_when_their_delay_is_over(tmp_path: Path, dispatched: int) -> None:
    phase = _delayed(tmp_path, steps_per_dispatch=dispatched)
    first = training.set_steps(phase, phases.init_state(phase))
    assert not any(map(np.any, first.quant_params.values()))
    state, _ = _train(phase)
    for name, steps in state.quant_params.items():
        assert np.all(steps > 0), name


def test_delayed_steps_start_where_calibrate_finds_them(tmp_path: Path) -> None:
    phase = _delayed(tmp_path)
    step = training.make_train_step(phase)
    state = phases.init_state(phase)
    for batch in training._dispatches(phase, 0, 0):
        state, _ = step(state, batch)
    assert training.start_delayed_steps(phase, state, 1, 4) is state  # a step too early
    images, _ = next(phase.dataset.train_batches(8, phase.experiment.seed, 1, 5))
    images = phase.dataset.transform(jnp.asarray(images), None)
    stats = {**state.collections["quant_stats"], "step": jnp.int32(11)}
    variables = {**state.variables, "quant_stats": stats}
    want = sq.calibrate(phase.model, variables, [images], train=False, progress=False)
    started = training.start_delayed_steps(phase, state, 1, 5)
    for name, steps in want["quant_params"].items():
        np.testing.assert_array_equal(started.quant_params[name], steps)
    assert int(started.collections["quant_stats"]["step"]) == 6  # as many as were trained


def test_a_delay_leaves_alone_what_is_learned_without_one(tmp_path: Path) -> None:
    late = sq.QuantSpec(observer="learned", quant_delay=6)
    quant = sq.SimQATConfig(weight=sq.QuantSpec.weight(observer="learned"), activation=late)
    phase = _phase(tmp_path, "qat", quant=quant, step_learning_rate=1e-30)
    start = jax.tree.map(np.asarray, training.set_steps(phase, phases.init_state(phase)))
    state, _ = _train(phase)
    kernels = [name for name, step in start.quant_params.items() if np.all(step > 0)]
    assert kernels and len(kernels) < len(start.quant_params)
    for name, step in state.quant_params.items():
        assert np.all(step > 0)
        if name in kernels:  # as they were before training, though parameters moved
            np.testing.assert_array_equal(step, start.quant_params[name])


def test_several_steps_in_a_dispatch_train_the_same(tmp_path: Path) -> None:
    one, _ = _train(_phase(tmp_path / "one"))
    phase = _phase(tmp_path / "three", steps_per_dispatch=3)
    three, progress = _train(phase)
    assert progress.epoch == 2
    assert checkpoints.latest(phase.directory) == 12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one.params,
        three.params,
    )


def test_start_from_float_parameters(tmp_path: Path) -> None:
    trained, _ = _train(_phase(tmp_path))
    fresh = phases.init_state(_phase(tmp_path, "qat_finetune"))
    started = phases.start_from(fresh, trained)
    jax.tree.map(np.testing.assert_array_equal, started.params, trained.params)
    expected = trained.collections["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, started.collections["batch_stats"], expected)
    assert int(started.collections["quant_stats"]["step"]) == 0


def test_start_from_another_architecture_lists_the_keys(tmp_path: Path) -> None:
    fresh = phases.init_state(_phase(tmp_path, "qat_finetune"))
    other = phases.init_state(_phase(tmp_path))
    params = dict(other.params)
    params["Dense_7"] = params.pop("Dense_0")
    with pytest.raises(ExperimentError) as error:
        phases.start_from(fresh, dataclasses.replace(other, params=params))
    for line in ("missing: params/Dense_0/kernel (4, 2)", "extra:   params/Dense_7/bias (2,)"):
        assert line in str(error.value)


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def _colour_dataset() -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 34).astype(np.int32)
    images = rng.integers(0, 128, (34, 6, 6, 3)) + 127 * labels[:, None, None, None]
    return Dataset(
        name="colour",
        train_images=images[:24].astype(np.uint8),
        train_labels=labels[:24],
        test_images=images[24:].astype(np.uint8),
        test_labels=labels[24:],
        num_classes=2,
        transform=augmentation.cifar10,
    )


def test_resume_with_augmentation_and_schedule_is_bit_identical(tmp_path: Path) -> None:
    options = {
        "dataset": _colour_dataset(),
        "batch_size": 2,
        "schedule": "cosine",
        "warmup_epochs": 1,
        "weight_decay": 1e-3,
        "label_smoothing": 0.1,
    }
    whole, expected = _train(_phase(tmp_path / "whole", "qat", **options))
    phase = _phase(tmp_path / "stopped", "qat", **options)

    def stop(progress: checkpoints.Progress, _: phases.TrainState) -> None:
        if progress.epoch == 1 and progress.step == 8:
            raise Interrupted

    with pytest.raises(Interrupted):
        training.train(phase, phases.init_state(phase), stop)
    assert checkpoints.latest(phase.directory) == 20
    state, progress = _train(phase)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    for one, other in zip(expected.history, progress.history, strict=True):
        for figure in ("loss", "accuracy", "top5_accuracy"):
            assert one[figure] == other[figure]


def test_each_step_augments_differently_and_evaluation_not_at_all(tmp_path: Path) -> None:
    keys = []

    def transform(images: jax.Array, key: jax.Array | None) -> jax.Array:
        if key is not None:
            jax.debug.callback(lambda data: keys.append(data.tobytes()), jax.random.key_data(key))
        return images

    dataset = dataclasses.replace(_dataset(), transform=transform)
    _train(_phase(tmp_path, dataset=dataset))
    jax.effects_barrier()
    # Once more in the warm-up, with the first step's key.
    assert len(keys) == 13
    assert len(set(keys)) == 12


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_top_k_equals_numpy(classes: int) -> None:
    rng = np.random.default_rng(classes)
    # Few values: many logits are equal, as they are after quantization.
    logits = rng.integers(0, 4, (200, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 200)
    order = np.argsort(-logits, axis=-1, kind="stable")
    for k in (1, 5):
        expected = [label in row[:k] for label, row in zip(labels, order, strict=True)]
        np.testing.assert_array_equal(training.in_top(jnp.asarray(logits), labels, k), expected)
    top1 = training.in_top(jnp.asarray(logits), labels, 1)
    np.testing.assert_array_equal(top1, np.argmax(logits, axis=-1) == labels)


def test_metrics_count_every_test_image_once(tmp_path: Path) -> None:
    class Given(nn.Module):
        """The logits are the image."""

        num_classes: int

        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            return (
                nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(x[:, 0, 0])
                + (x[:, 0, 0])
            )

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(11, 1, 1, 9)).astype(np.float32)
    labels = rng.integers(0, 9, 11).astype(np.int32)
    dataset = Dataset(
        name="given",
        train_images=logits,
        train_labels=labels,
        test_images=logits,
        test_labels=labels,
        num_classes=9,
    )
    phase = _phase(tmp_path, dataset=dataset, model=Given)
    metrics = training.make_evaluation(phase)(phases.init_state(phase))
    rank = (logits[:, 0, 0] > logits[np.arange(11), 0, 0, labels][:, None]).sum(-1)
    assert metrics == (np.mean(rank == 0), np.mean(rank < 5))
    assert 0 < metrics.accuracy < metrics.top5_accuracy < 1


@pytest.mark.parametrize("name", ["float", "qat"])
def test_non_finite_loss_stops_and_says_where(tmp_path: Path, name: str) -> None:
    dataset = _dataset()
    images = dataset.train_images.copy()
    images[17] = np.nan
    phase = _phase(tmp_path, name, dataset=dataclasses.replace(dataset, train_images=images))
    order = np.random.default_rng((0, 0)).permutation(48).tolist()
    step = order.index(17) // 8 + 1
    with pytest.raises(ExperimentError, match=f"phase {name}, epoch 1, step {step} of 6") as error:
        _train(phase)
    assert ("input: " in str(error.value)) == (name == "qat")
    assert (checkpoints.latest(phase.directory) or 0) < step


def test_phases_share_their_first_parameters(tmp_path: Path) -> None:
    states = [phases.init_state(_phase(tmp_path, name)) for name in phases.NAMES]
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0].params, state.params)


def test_settings_hold_every_field_and_survive_json() -> None:
    experiment = configs.get("lenet5_mnist", seed=4, epochs=None)
    settings = experiment.settings()
    assert set(settings) == {field.name for field in dataclasses.fields(experiment)}
    assert (settings["model"], settings["seed"], settings["epochs"]) == ("LeNet5", 4, 10)
    assert settings["quant"]["activation"]["num_bits"] == 8
    assert not re.search("object at", str(settings))
    assert isinstance(experiment.quant, sq.SimQATConfig)
