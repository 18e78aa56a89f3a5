"""The comparison with published files finds no difference from a file that it wrote itself."""

from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest

import simqat_jax as sq
from experiments.benchmarks.peers import tiny
from experiments.errors import ExperimentError
from experiments.mlperf_tiny import Published


class Small(nn.Module):
    """Two dense layers and what stands between them in the autoencoder."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train, epsilon=1e-3)(nn.Dense(6)(x)))
        return nn.Dense(4)(x)


SHAPES = {
    "dense/kernel": (8, 6),
    "dense/bias": (6,),
    "batch_normalization/gamma": (6,),
    "batch_normalization/beta": (6,),
    "batch_normalization/moving_mean": (6,),
    "batch_normalization/moving_variance": (6,),
    "dense_1/kernel": (6, 4),
    "dense_1/bias": (4,),
}


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra `tiny` is not installed")
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        for name, shape in SHAPES.items():
            layer = name.split("/")[0]
            file[f"model_weights/{layer}/{name}:0"] = rng.uniform(0.2, 1, shape).astype(np.float32)
    # What is written stands for the published files.
    network = Published(
        model=Small(), shape=(8,), weights="weights.h5", real="int8.tflite", int8="int8.tflite"
    )
    x = rng.uniform(-1, 1, (70, 8)).astype(np.float32)
    way = tiny.Way(recipe="ranges", config=sq.SimQATConfig())
    rows = tiny.compare(network, tmp_path, tiny.Inputs(x[:60], x[60:]), tmp_path, way, rounds=1)
    real, theirs, ours = rows
    assert real.sqnr_db == theirs.sqnr_db == ours.sqnr_db > 25
    assert theirs.agreement == ours.agreement == 1
    assert theirs.bytes == ours.bytes == (tmp_path / network.int8).stat().st_size
    assert ours.differing == 0
    tiny.show(rows, "small")
    assert f"{ours.sqnr_db:.2f}" in capsys.readouterr().out


def test_drawn_inputs_are_in_the_range_of_the_file_and_always_the_same() -> None:
    arguments = tiny.Arguments(network="ds_cnn", calibration=3, examples=200)
    file = SimpleNamespace(input_range=(-2.0, 0.1))
    one, other = (tiny.inputs_of(arguments, file) for _ in range(2))
    np.testing.assert_array_equal(one.test, other.test)
    assert one.calibration.shape == (3, 49, 10, 1) and one.test.shape == (200, 49, 10, 1)
    assert one.test.min() >= -2 and one.test.max() == np.float32(0.1)
    assert abs(one.test.std() - 0.14) < 0.05
    assert not np.array_equal(one.calibration, one.test[:3])


@pytest.mark.parametrize("wrong", [{"calibration": 0}, {"examples": 0}])
def test_no_inputs_are_refused(wrong: dict) -> None:
    arguments = tiny.Arguments(network="autoencoder", **wrong)
    with pytest.raises(ExperimentError, match="must be 1 or more"):
        tiny.inputs_of(arguments, SimpleNamespace(input_range=(-1.0, 1.0)))
