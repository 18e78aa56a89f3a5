"""A batch in parts is one step of the optimizer."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_run

import simqat_jax as sq
from experiments import job, mesh, phases
from experiments.errors import ExperimentError
from experiments.steps import make_train_step


class Plain(nn.Module):
    """Without BatchNorm: the gradient of a batch is the mean of its parts'."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        del train
        return nn.Dense(self.num_classes)(nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


def _steps(name: str, count: int = 1, **options: Any) -> tuple[phases.TrainState, list[float]]:
    experiment = dataclasses.replace(tiny_run.experiment(), model=Plain, **options)
    phase = phases.build(name, experiment, tiny_run.dataset(), Path())
    state, losses, step = phases.init_state(phase), [], make_train_step(phase)
    for _, batch in zip(range(count), phase.dataset.train_batches(16, 0, 0), strict=False):
        state, loss = step(state, batch)
        losses.append(float(loss))
    return state, losses


def test_parts_have_the_gradient_of_the_whole() -> None:
    whole, parts = (_steps("float", 2, accumulate=n) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), whole, parts)
    assert int(parts[0].step) == 2


def test_delays_count_steps_of_the_optimizer() -> None:
    """Two steps in float and not one part more."""
    _, expected = _steps("float", 3, accumulate=4)
    delayed = {"quant_delay": 2}
    quant = sq.SimQATConfig(
        weight=sq.QuantSpec.weight(**delayed), activation=sq.QuantSpec.activation(**delayed)
    )
    state, losses = _steps("qat", 3, accumulate=4, quant=quant)
    assert int(state.collections["quant_stats"]["step"]) == 3
    np.testing.assert_allclose(losses[:2], expected[:2], rtol=1e-6)
    assert abs(losses[2] / expected[2] - 1) > 1e-5


@pytest.mark.parametrize(
    ("size", "accumulate", "message"),
    [
        (
            100,
            1,
            "--batch-size 100 .* 8 devices of the axis data: give --batch-size 96 or 104, or "
            "--mesh data=4",
        ),
        (4, 1, "give --batch-size 8, or --mesh data=4"),
        (24, 2, "times the 2 parts of --accumulate: give --batch-size 16 or 32, or --mesh data=4"),
        (25, 2, r"give --batch-size 16 or 32\.$"),
    ],
)
def test_batches_that_cannot_be_divided(size: int, accumulate: int, message: str) -> None:
    experiment = dataclasses.replace(tiny_run.experiment(), batch_size=size, accumulate=accumulate)

    class Eight(mesh.Layout):
        """As if of eight devices."""

        @property
        def shards(self) -> int:
            return 8

    with pytest.raises(ExperimentError, match=message):
        job.check_division(experiment, Eight(mesh.one_device().mesh))
