"""Read the weights of a Keras model from its `.h5` file, as variables of a Flax network.

Keras numbers layers of a kind as they are made: `conv2d`, `conv2d_1`. So does Flax: `Conv_0`,
`Conv_1`. Depthwise convolutions, which Flax has no kind of, are expected as `depthwise_0`.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.checkpoints import check_tree, leaf_shapes
from experiments.errors import ExperimentError

_LAYERS = {
    "conv2d": "Conv",
    "depthwise_conv2d": "depthwise",
    "dense": "Dense",
    "batch_normalization": "BatchNorm",
}
_LEAVES = {
    "kernel": "params/{}/kernel",
    "depthwise_kernel": "params/{}/kernel",
    "bias": "params/{}/bias",
    "gamma": "params/{}/scale",
    "beta": "params/{}/bias",
    "moving_mean": "batch_stats/{}/mean",
    "moving_variance": "batch_stats/{}/var",
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a model by their layer and name, such as `conv2d_1/kernel`.

    Raises:
      ExperimentError: h5py is not installed, the file cannot be read, or is none of a Keras model.
    """
    try:
        h5py = importlib.import_module("h5py")
    except ImportError as error:
        raise ExperimentError(
            f"reading {path} needs h5py, of the extra 'tiny': "
            'pip install -e ".[export,experiments,tiny]" installs it.'
        ) from error
    arrays: dict[str, np.ndarray] = {}

    def take(name: str, entry: Any) -> None:
        if isinstance(entry, h5py.Dataset):
            layer, array = name.split("/")[-2:]
            arrays[f"{layer}/{array.removesuffix(':0')}"] = entry[()]

    try:
        with h5py.File(path, "r") as file:
            file["model_weights"].visititems(take)
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).strip("'\"").split()).rstrip(".")
        raise ExperimentError(
            f"cannot read the Keras model {path}: {reason}. Give an .h5 file that Keras saved a "
            "whole model in."
        ) from error
    return arrays


def variables_of(
    weights: dict[str, np.ndarray], model: nn.Module, x: np.ndarray, source: Path
) -> dict[str, Any]:
    """Return the variables of a model from the weights of a Keras model of the same layers.

    Args:
      weights: by layer and name, see `load`.
      model: whose weights they are.
      x: an input, of which only the shape matters.
      source: where they are from, for the message.

    Raises:
      ExperimentError: they are of another network; lists every missing and extra one.
    """
    leaves = dict(_leaf(name, value) for name, value in weights.items())
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    expected = jax.eval_shape(model.init, jax.random.key(0), x)
    check_tree(leaf_shapes(expected), leaf_shapes(variables), str(source))
    return variables


def _leaf(name: str, value: np.ndarray) -> tuple[str, jax.Array]:
    """Return path and value in Flax; what it does not know keeps its name, to be listed."""
    layer, array = name.split("/")
    kind, number = re.fullmatch(r"(.*?)(?:_(\d+))?", layer).groups()  # pyright: ignore[reportOptionalMemberAccess]
    module = f"{_LAYERS[kind]}_{number or 0}" if kind in _LAYERS else layer
    path = _LEAVES.get(array, f"params/{{}}/{array}").format(module)
    # Keras has depthwise kernels as (H, W, C, 1), Flax as (H, W, 1, C).
    return path, jnp.asarray(value.swapaxes(2, 3) if array == "depthwise_kernel" else value)
