"""Weights of Keras land where they belong, and those of another network are listed."""

import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import keras_archive
from experiments.errors import ExperimentError
from experiments.models.tiny import MobileNetV1

SMALL = MobileNetV1(blocks=((5, 1), (6, 2)))
X = np.zeros((1, 8, 8, 3), np.float32)


def weights() -> dict[str, np.ndarray]:
    """Random weights of SMALL by the names and in the shapes of Keras."""
    shapes: dict[str, tuple[int, ...]] = {
        "conv2d/kernel": (3, 3, 3, 8),
        "depthwise_conv2d/depthwise_kernel": (3, 3, 8, 1),
        "conv2d_1/kernel": (1, 1, 8, 5),
        "depthwise_conv2d_1/depthwise_kernel": (3, 3, 5, 1),
        "conv2d_2/kernel": (1, 1, 5, 6),
        "dense/kernel": (6, 2),
    }
    sizes = dict(zip((name.split("/")[0] for name in shapes), (8, 8, 5, 5, 6, 2), strict=True))
    shapes |= {f"{layer}/bias": (size,) for layer, size in sizes.items()}
    for number, size in enumerate((8, 8, 5, 5, 6)):
        norm = "batch_normalization" + (f"_{number}" if number else "")
        arrays = ("gamma", "beta", "moving_mean", "moving_variance")
        shapes |= {f"{norm}/{array}": (size,) for array in arrays}
    rng = np.random.default_rng(0)
    return {k: rng.uniform(0.5, 1.5, shape).astype(np.float32) for k, shape in shapes.items()}


def written(arrays: dict[str, np.ndarray], path: Path) -> Path:
    """Write a file as Keras does, with an optimizer's arrays beside the weights."""
    h5py = pytest.importorskip("h5py", reason="the extra `tiny` is not installed")
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            layer, array = name.split("/")
            file[f"model_weights/{layer}/{layer}/{array}:0"] = value
        file.create_group("model_weights/activation")
        file["optimizer_weights/Adam/iter:0"] = np.zeros((), np.int64)
    return path


def test_every_weight_has_its_place(tmp_path: Path) -> None:
    found = weights()
    path = written(found, tmp_path / "weights.h5")
    read = keras_archive.load(path)
    assert read.keys() == found.keys()
    variables = keras_archive.variables_of(read, SMALL, X, path)
    params, stats = variables["params"], variables["batch_stats"]
    depthwise = found["depthwise_conv2d_1/depthwise_kernel"]
    np.testing.assert_array_equal(params["depthwise_1"]["kernel"][:, :, 0], depthwise[..., 0])
    for theirs, ours in (("conv2d", "Conv_0"), ("conv2d_2", "Conv_2"), ("dense", "Dense_0")):
        np.testing.assert_array_equal(params[ours]["kernel"], found[f"{theirs}/kernel"])
        np.testing.assert_array_equal(params[ours]["bias"], found[f"{theirs}/bias"])
    for theirs, ours in (
        ("batch_normalization", "BatchNorm_0"),
        ("batch_normalization_4", "BatchNorm_4"),
    ):
        for array, value in (
            ("gamma", params[ours]["scale"]),
            ("beta", params[ours]["bias"]),
            ("moving_mean", stats[ours]["mean"]),
            ("moving_variance", stats[ours]["var"]),
        ):
            np.testing.assert_array_equal(value, found[f"{theirs}/{array}"])


def test_weights_of_another_network_are_refused_with_all_that_differs() -> None:
    found = weights()
    del found["dense/bias"]
    found["conv2d_3/kernel"] = np.zeros((1, 1, 6, 7), np.float32)
    found["lstm/recurrent_kernel"] = np.zeros((4, 16), np.float32)
    found["batch_normalization/gamma"] = np.zeros(7, np.float32)
    with pytest.raises(ExperimentError) as caught:
        keras_archive.variables_of(found, SMALL, X, Path("weights.h5"))
    for line in (
        "weights.h5 does not fit",
        "missing: params/Dense_0/bias (2,)",
        "extra:   params/Conv_3/kernel (1, 1, 6, 7)",
        "extra:   params/lstm/recurrent_kernel (4, 16)",
        "shape:   params/BatchNorm_0/scale is (7,), the model has (8,)",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("content", [None, b"no HDF5 at all", "no weights"])
def test_files_of_others_are_refused_by_name(tmp_path: Path, content: object) -> None:
    path = tmp_path / "weights.h5"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["other"] = np.zeros(1)
    pytest.importorskip("h5py", reason="the extra `tiny` is not installed")
    with pytest.raises(ExperimentError, match=r"cannot read the Keras model .*weights\.h5"):
        keras_archive.load(path)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ExperimentError, match=r"needs h5py.*pip install"):
        keras_archive.load(tmp_path / "weights.h5")
