"""What a run shows fits a terminal of 80 columns, and a pipe."""

import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import simqat_jax as sq
from experiments import configs, phases, reporting
from experiments.checkpoints import Progress
from experiments.data import Dataset

RECORD = {
    "epoch": 180,
    "loss": 12.3456,
    "accuracy": 1.0,
    "top5_accuracy": 1.0,
    "epoch_seconds": 12345.6,
    "seconds_per_step": 0.5,
}

STATE: Any = None  # nothing of it is shown


@pytest.fixture
def phase(tmp_path: Path) -> phases.Phase:
    """A phase of many epochs and steps, which nobody trains."""
    images, labels = np.zeros((4000, 1, 1, 1), np.float32), np.zeros(4000, np.int32)
    dataset = Dataset(
        name="tiny",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        num_classes=10,
    )
    experiment = configs.get("lenet5_mnist", epochs=180, batch_size=1)
    return phases.build("qat_finetune", experiment, dataset, tmp_path)


def _shown(phase: phases.Phase, *, terminal: bool) -> list[str]:
    """What is on the screen once the last epoch but one has ended, and some steps since."""
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    history = tuple(RECORD | {"epoch": epoch} for epoch in range(1, 180))
    progress = Progress(seed=0, epoch=179, step=3200, loss_sum=39506.0, history=history)
    with reporting.shown(phase, console) as report:
        report(progress, STATE)
        report(dataclasses.replace(progress, step=3300), STATE)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_in_a_pipe_an_epoch_is_a_line(phase: phases.Phase) -> None:
    lines = _shown(phase, terminal=False)
    assert len(lines) == 179 and max(map(len, lines)) <= 80
    assert lines[-1] == (
        "qat_finetune 179/180  loss 12.3456  top-1 100.00%  top-5 100.00%  12345.6 s"
    )


def test_the_bar_tells_epoch_and_remaining_time(phase: phases.Phase) -> None:
    """And fits, where all of its numbers are as long as they get."""
    lines = [re.sub(r"\x1b\[\S*?[A-Za-z]", "", line) for line in _shown(phase, terminal=True)]
    bars = [line.split("\r")[-1] for line in lines if "00/720000" in line]
    assert any("719300/720000" in bar for bar in bars)
    for bar in bars:
        assert bar.startswith("qat_finetune epoch 180/180 ") and " loss 1" in bar
        assert re.search(r" (\d+:\d\d:\d\d|-:--:--)$", bar) and len(bar) <= 80


def test_a_plan_in_short(tmp_path: Path) -> None:
    weight = sq.QuantSpec.weight(num_bits=8)
    config = sq.SimQATConfig(weight_bits=4, rules=[sq.Rule(path="Dense_2", weight=weight)])
    experiment = configs.get("lenet5_mnist", quant=config)
    qmodel = sq.SimQAT(config).apply(experiment.build_model(10))
    x = jnp.zeros((1, 32, 32, 1))
    variables = jax.eval_shape(lambda: qmodel.init(jax.random.key(0), x))
    text = reporting.plan_summary(qmodel.plan(variables, x), tmp_path / "plan.txt")
    assert text.splitlines() == [
        "plan: 8 operations, 0 of them float",
        "      weights 4 bits (4), 8 bits (1); activations 8 bits",
        f"      all of it: {tmp_path}/plan.txt",
    ]
