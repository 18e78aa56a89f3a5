"""Checkpoints: round trip, and every way in which one can be unfit."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import simqat_jax as sq
from experiments import checkpoints
from experiments.checkpoints import Progress
from experiments.errors import ExperimentError

PROGRESS = Progress(
    seed=3,
    epoch=1,
    step=7,
    loss_sum=0.1 + 0.2,
    compile_seconds=1.5,
    history=({"epoch": 1, "loss": 1 / 3, "accuracy": 0.5},),
)


def _state() -> dict:
    """A tree with all that a training state may hold, keys with a slash included."""
    return {
        "params": {"Dense_0": {"kernel": jnp.arange(600.0).reshape(20, 30)}},
        "opt_state": ({"trace": jnp.full((3,), -0.0)}, ()),
        "quant_stats": {
            "Block_0/Dense_0/output": sq.init_range(),
            "Block_0/Dense_0/kernel": sq.init_range(4),
            "step": jnp.int32(9),
        },
        "half": jnp.array([1.5, jnp.nan], jnp.bfloat16),
    }


def _bits(tree: object) -> list[tuple]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_round_trip_is_exact_and_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoints.save(tmp_path / "qat", step, _state(), PROGRESS, keep=2)
    assert sorted(p.name for p in (tmp_path / "qat").iterdir()) == ["10", "2"]
    assert checkpoints.latest(tmp_path / "qat") == 10
    target = jax.tree.map(jnp.zeros_like, _state())
    state, progress = checkpoints.restore(tmp_path / "qat", 10, target)
    assert progress == PROGRESS
    assert _bits(state) == _bits(_state())
    assert jax.tree.structure(state) == jax.tree.structure(_state())


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "absent") is None


def test_another_models_checkpoint_lists_every_difference(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, _state(), PROGRESS, keep=2)
    target = _state()
    target["params"] = {
        "Dense_0": {"kernel": jnp.zeros((20, 31)), "bias": jnp.zeros(31)},
        "Dense_1": {"kernel": jnp.zeros((31, 2))},
    }
    del target["quant_stats"]["Block_0/Dense_0/kernel"]
    with pytest.raises(ExperimentError) as error:
        checkpoints.restore(tmp_path, 1, target)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "missing: params/Dense_0/bias (31,)",
        "missing: params/Dense_1/kernel (31, 2)",
        "extra:   quant_stats/Block_0/Dense_0/kernel/hi (4,)",
        "extra:   quant_stats/Block_0/Dense_0/kernel/lo (4,)",
        "extra:   quant_stats/Block_0/Dense_0/kernel/nonfinite ()",
        "shape:   params/Dense_0/kernel is (20, 30), the model has (20, 31)",
    ]


def test_check_tree_accepts_equal_trees() -> None:
    shapes = checkpoints.leaf_shapes(_state())
    assert shapes["quant_stats/Block_0/Dense_0/output/lo"] == ()
    checkpoints.check_tree(shapes, dict(shapes), "x")


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size)


def test_corrupt_checkpoint_is_an_error_and_no_other_is_taken(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, _state(), PROGRESS, keep=2)
    checkpoints.save(tmp_path, 2, _state(), PROGRESS, keep=2)
    newest = tmp_path / "2"
    largest = max(_files(newest), key=lambda p: p.stat().st_size)
    needed = [largest, newest / "state" / "_METADATA", newest / "progress" / "metadata"]
    for file in needed:
        intact = file.read_bytes()
        for damage in (b"", intact[: len(intact) // 2], b"\xff" * len(intact)):
            file.write_bytes(damage)
            assert checkpoints.latest(tmp_path) == 2
            with pytest.raises(ExperimentError, match=re.escape(f"{newest} is corrupt")):
                checkpoints.restore(tmp_path, 2, _state())
        file.unlink()
        with pytest.raises(ExperimentError, match=f"is corrupt: .*{file.name}") as error:
            checkpoints.restore(tmp_path, 2, _state())
        assert "tensorstore_spec" not in str(error.value)
        file.write_bytes(intact)
    checkpoints.restore(tmp_path, 2, _state())


def test_one_flipped_bit_in_the_arrays_is_found(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, _state(), PROGRESS, keep=2)
    data = max(_files(tmp_path / "1" / "state"), key=lambda p: p.stat().st_size)
    intact = data.read_bytes()
    outcomes = set()
    for place in range(0, len(intact), max(1, len(intact) // 12)):
        data.write_bytes(intact[:place] + bytes([intact[place] ^ 4]) + intact[place + 1 :])
        try:
            state, _ = checkpoints.restore(tmp_path, 1, _state())
        except ExperimentError as error:
            assert "is corrupt" in str(error)
            outcomes.add("found")
        else:  # A byte that no array depends on.
            assert _bits(state) == _bits(_state())
    assert outcomes == {"found"}


def test_one_changed_number_in_the_progress_is_found(tmp_path: Path) -> None:
    progress = dataclasses.replace(PROGRESS, history=({"accuracy": 95.1},))
    checkpoints.save(tmp_path, 1, _state(), progress, keep=2)
    (record,) = (p for p in _files(tmp_path / "1") if b"95.1" in p.read_bytes())
    intact = record.read_bytes()
    record.write_bytes(intact.replace(b"95.1", b"85.1"))
    with pytest.raises(ExperimentError, match="is corrupt: its progress is not what was written"):
        checkpoints.restore(tmp_path, 1, _state())
    record.write_bytes(intact)
    assert checkpoints.restore(tmp_path, 1, _state())[1] == progress


def test_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot write checkpoint"):
        checkpoints.save(tmp_path / "file" / "qat", 1, _state(), PROGRESS, keep=2)


LIMITED = """
import pathlib, resource, signal, sys
import jax.numpy as jnp
from experiments import checkpoints
from experiments.errors import run_or_exit

def save():
    directory = pathlib.Path(sys.argv[1])
    state = {"a": jnp.linspace(0, 1, 90000).reshape(300, 300)}
    checkpoints.save(directory, 1, state, checkpoints.Progress(seed=0), keep=2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    checkpoints.save(directory, 2, state, checkpoints.Progress(seed=0), keep=2)

run_or_exit(save)
"""
"""Writes a checkpoint, and another one once no file may grow larger than 40 kB."""


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "qat")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot write checkpoint {tmp_path / 'qat' / '2'}: File too large. Earlier "
        "checkpoints are kept; make room or put the cause right, and continue with --resume.\n"
    )
    assert [p.name for p in (tmp_path / "qat").iterdir()] == ["1"]


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(28, "No space left on device"), "/3: No space left on device. Earlier"),
        (RuntimeError("an array\nis gone."), "/3: RuntimeError: an array is gone. Earlier"),
    ],
)
def test_whatever_the_writer_raises_is_one_line(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(ExperimentError, match=re.escape(said)):
        checkpoints.save(tmp_path, 3, _state(), PROGRESS, keep=2)
