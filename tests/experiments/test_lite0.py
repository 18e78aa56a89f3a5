"""The command that calibrates: what it writes computes what evaluation shows, and weights stay."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import simqat_jax as sq
from experiments import comparison, lite0
from experiments.errors import ExperimentError


class Small(nn.Module):
    """A network for photos with what matters here: BatchNorm and ReLU6."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(8, (16, 16), 16, use_bias=False)(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def test_files_have_the_codes_of_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_SECONDS", 0.0)
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (8, 7, 7, 3), np.uint8)
    for index, coarse in enumerate(noise):
        Image.fromarray(coarse).resize((256, 256)).save(folder / f"{index:03}_noise.jpg")
    variables = Small().init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    arguments = lite0.Arguments(folder=tmp_path / "out", photos=folder, calibration=3, examples=4)
    for wrong in ({"calibration": 8}, {"calibration": 0}, {"examples": 0}):
        with pytest.raises(ExperimentError, match="8 photos: some are needed for ranges"):
            lite0.quantize(Small(), variables, dataclasses.replace(arguments, **wrong))
    rows = lite0.quantize(Small(), variables, arguments)
    assert [row.differing for row in rows] == [None] + [0] * 6
    assert all(row.sqnr_db > 15 for row in rows if row.sqnr_db is not None)
    report = json.loads((arguments.folder / "lite0.json").read_text())
    assert (report["calibration"], report["images"], len(report["rows"])) == (3, 4, 7)


def test_calibration_moves_ranges_alone() -> None:
    x = np.random.default_rng(2).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    variables = Small().init(jax.random.key(0), x)
    network = lite0.calibrate(Small(), sq.SimQATConfig(), variables, x)
    kept = {name: network.variables[name] for name in variables}
    jax.tree.map(np.testing.assert_array_equal, kept, variables)
    lo, hi = network.variables["quant_stats"]["input"][:2]
    assert (lo, hi) == (x.min(), x.max())
