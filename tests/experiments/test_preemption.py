"""SIGTERM to a single process: a checkpoint at the next step, and the same bits as without."""

import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_run

from experiments import checkpoints, errors, phases, preemption, training
from experiments.errors import Preempted


def _phase(directory: Path) -> phases.Phase:
    return phases.build("qat", tiny_run.experiment(), tiny_run.dataset(), directory)


def _train(phase: phases.Phase, report: Any = lambda progress, state: None) -> phases.TrainState:
    with preemption.noticed() as notice:
        return training.train(phase, phases.init_state(phase), report, notice)[0]


@pytest.mark.parametrize("epoch", [0, 1])
def test_sigterm_saves_at_the_next_step(tmp_path: Path, epoch: int) -> None:
    whole = _train(_phase(tmp_path / "whole"))
    phase = _phase(tmp_path / "stopped")

    def terminate(progress: checkpoints.Progress, state: phases.TrainState) -> None:
        del state
        if progress.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    step = 6 * epoch + 1
    with pytest.raises(Preempted, match=f"^ended by SIGTERM, with checkpoint .*/{step}\\.$"):
        _train(phase, terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.latest(phase.directory) == step
    state = _train(phase)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_command_that_was_ended_so_has_the_status_of_it(capsys: pytest.CaptureFixture) -> None:
    def end() -> None:
        raise Preempted("ended by SIGTERM, with checkpoint x/7.")

    with pytest.raises(SystemExit) as status:
        errors.run_or_exit(end, "Go on with --resume.")
    assert status.value.code == 143
    assert capsys.readouterr().err == (
        "ended by SIGTERM, with checkpoint x/7. Go on with --resume.\n"
    )
