"""What TensorBoard gets: read back as the records that it reads."""

import dataclasses
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import configs, phases, summaries
from experiments.checkpoints import Progress
from experiments.data import Dataset
from experiments.errors import ExperimentError

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


class Linear(nn.Module):
    """A layer."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def _phase(run: Path) -> phases.Phase:
    images, labels = np.zeros((8, 2, 2, 1), np.float32), np.zeros(8, np.int32)
    dataset = Dataset(
        name="tiny",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        num_classes=2,
    )
    experiment = configs.Experiment(
        config="tiny", model=Linear, data="mnist5k", batch_size=2, epochs=2, learning_rate=0.1
    )
    return phases.build("qat", experiment, dataset, run)


def _observed(phase: phases.Phase) -> phases.TrainState:
    state = phases.init_state(phase)
    x = jnp.array([[-1.0, 0, 2, 3]]).reshape(1, 2, 2, 1)
    _, updates = phase.model.apply(state.variables, x, train=True, mutable=["quant_stats"])
    return dataclasses.replace(state, collections=dict(updates))


def _records(folder: Path) -> Iterator[tuple[int, str, float]]:
    """Step, name and value of each scalar."""
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            yield from ((event.step, v.tag, v.simple_value) for v in event.summary.value)
            at += 16 + length


def test_losses_accuracies_and_ranges(tmp_path: Path) -> None:
    phase = _phase(tmp_path)
    state = _observed(phase)
    record = {"epoch": 1, "loss": 0.5, "accuracy": 0.25, "top5_accuracy": 1.0}
    with summaries.written(phase, tmp_path) as report:
        report(Progress(seed=0), state)
        report(Progress(seed=0, step=2, loss_sum=3.0), state)
        report(Progress(seed=0, epoch=1, history=(record,)), state)
        report(Progress(seed=0, epoch=1, step=1, loss_sum=0.25, history=(record,)), state)
    found = list(_records(tmp_path / "tensorboard" / "qat"))
    assert [v for v in found if not v[1].startswith("range/")] == [
        (2, "loss/running", 1.5),
        (4, "loss/epoch", 0.5),
        (4, "accuracy/top-1", 0.25),
        (4, "accuracy/top-5", 1.0),
        (5, "loss/running", 0.25),
    ]
    ranges = {tag: value for step, tag, value in found if tag.startswith("range/") and step == 4}
    assert (ranges["range/input/lo"], ranges["range/input/hi"]) == (-1.0, 3.0)
    assert {tag.split("/")[1] for tag in ranges} == {"input", "Dense_0"}


def test_a_continued_run_does_not_tell_its_past_again(tmp_path: Path) -> None:
    phase = _phase(tmp_path)
    record = {"epoch": 1, "loss": 0.5, "accuracy": 0.25, "top5_accuracy": 1.0}
    with summaries.written(phase, tmp_path) as report:
        report(Progress(seed=0, epoch=1, history=(record,)), phases.init_state(phase))
    assert not list(_records(tmp_path / "tensorboard" / "qat"))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ExperimentError, match=r"--tensorboard needs tensorboardX: .*\[tensorbo"):
        summaries.writer_package()
