"""The float networks are those of the published files."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import mlperf_tiny
from experiments.errors import ExperimentError
from experiments.mlperf_tiny import NETWORKS
from experiments.models.tiny import DSCNN
from experiments.tflite_archive import Layer, LiteRTFile


def layers() -> list[Layer]:
    """Random layers of DSCNN in the order of its file."""
    shapes = [(10, 4, 1, 64), *[(3, 3, 1, 64), (1, 1, 64, 64)] * 4, (64, 12)]
    rng = np.random.default_rng(0)
    return [Layer(rng.normal(size=s), rng.normal(size=s[-1:]), s[:3] == (3, 3, 1)) for s in shapes]


def test_every_layer_of_a_file_has_its_place() -> None:
    found, x = layers(), np.zeros((1, 49, 10, 1), np.float32)
    params = mlperf_tiny.variables_of(found, DSCNN(), x, Path("a.tflite"))["params"]
    pairs = [(f"depthwise_{i}", f"Conv_{i + 1}") for i in range(4)]
    names = ["Conv_0", *(name for pair in pairs for name in pair), "Dense_0"]
    for name, layer in zip(names, found, strict=True):
        np.testing.assert_array_equal(params[name]["kernel"], layer.kernel.astype(np.float32))
        np.testing.assert_array_equal(params[name]["bias"], layer.bias.astype(np.float32))
    with pytest.raises(ExperimentError) as caught:
        mlperf_tiny.variables_of(found[:-2], DSCNN(), x, Path("a.tflite"))
    for name in names[-2:]:
        assert f"missing: params/{name}/kernel" in str(caught.value)


def test_a_missing_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(mlperf_tiny.VARIABLE, raising=False)
    with pytest.raises(ExperimentError, match=r"MLPERF_TINY is not set.*--folder"):
        mlperf_tiny.directory()
    with pytest.raises(ExperimentError, match="nowhere"):
        mlperf_tiny.directory(tmp_path / "nowhere")
    monkeypatch.setenv(mlperf_tiny.VARIABLE, str(tmp_path))
    assert mlperf_tiny.directory() == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *("ds_cnn", "autoencoder"),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("resnet8", "mobilenetv1")),
    ],
)
def test_published_networks_compute_what_their_float_files_do(name: str) -> None:
    if not os.environ.get(mlperf_tiny.VARIABLE):
        pytest.skip(f"{mlperf_tiny.VARIABLE} names no directory of published files")
    pytest.importorskip("h5py", reason="the extra `tiny` is not installed")
    folder, network = mlperf_tiny.directory(), NETWORKS[name]
    lowest, highest = LiteRTFile(folder / network.int8).input_range
    shape = (4, *network.shape)
    x = np.random.default_rng(0).uniform(lowest, highest, shape).astype(np.float32)
    found = network.model.apply(network.real_variables(folder), x)
    logits = LiteRTFile(folder / network.real, softmax=False).run(x)
    # The file of ds_cnn rounds what goes into its convolutions to 8 bits.
    error = np.linalg.norm(found - logits) / np.linalg.norm(logits)
    assert error < (0.01 if name == "ds_cnn" else 1e-5)
    if network.classifies:
        probabilities = LiteRTFile(folder / network.real).run(x)
        np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), atol=1e-6)
