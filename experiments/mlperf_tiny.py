"""The published files of MLPerf Tiny's four networks, and the float networks as Flax variables.

`MLPERF_TINY` names the directory of the files, which are at github.com/mlcommons/tiny.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments import keras_archive, tflite_archive
from experiments.checkpoints import check_tree, leaf_shapes
from experiments.errors import ExperimentError
from experiments.models.tiny import DSCNN, DenseAutoencoder, MobileNetV1, ResNet8

VARIABLE = "MLPERF_TINY"
"""The environment variable that names the directory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One of the networks.

    Attributes:
      model: the float network; a classifier returns logits.
      shape: of one example.
      weights: file that the variables are read from.
      real: float TFLite file; a classifier returns probabilities.
      int8: TFLite file that TensorFlow's converter wrote.
      classifies: whether the highest output is the answer.
      unbiased: layers whose biases the TFLite files lack: TensorFlow's converter loses those of a
        dense layer in front of BatchNorm.
    """

    model: nn.Module
    shape: tuple[int, ...]
    weights: str
    real: str
    int8: str
    classifies: bool = True
    unbiased: tuple[str, ...] = ()

    def variables(self, folder: Path) -> dict[str, Any]:
        """Return the variables that `int8` was made of, from a directory.

        Raises:
          ExperimentError: a package is missing; the file cannot be read, or holds other weights.
        """
        return self._read(folder / self.weights)

    def real_variables(self, folder: Path) -> dict[str, Any]:
        """Return the variables that `real` was made of, see `variables`."""
        keras = self.weights.endswith(".h5")
        return self._read(folder / (self.weights if keras else self.real))

    def _read(self, path: Path) -> dict[str, Any]:
        x = np.zeros((1, *self.shape), np.float32)
        if path.suffix == ".h5":
            variables = keras_archive.variables_of(keras_archive.load(path), self.model, x, path)
        else:
            variables = variables_of(tflite_archive.layers(path), self.model, x, path)
        for layer in self.unbiased:
            bias = variables["params"][layer]["bias"]
            variables["params"][layer]["bias"] = jnp.zeros_like(bias)
        return variables


NETWORKS = {
    "resnet8": Published(
        model=ResNet8(),
        shape=(32, 32, 3),
        weights="pretrainedResnet.h5",
        real="pretrainedResnet.tflite",
        int8="pretrainedResnet_quant.tflite",
    ),
    "mobilenetv1": Published(
        model=MobileNetV1(),
        shape=(96, 96, 3),
        weights="vww_96.h5",
        real="vww_96_float.tflite",
        int8="vww_96_int8.tflite",
    ),
    # Its float weights are not published: the float file holds most kernels in 8 bits, with one
    # scale for a tensor. What the int8 file holds, one for each channel, is nearer to them.
    "ds_cnn": Published(
        model=DSCNN(),
        shape=(49, 10, 1),
        weights="kws_ref_model.tflite",
        real="kws_ref_model_float32.tflite",
        int8="kws_ref_model.tflite",
    ),
    "autoencoder": Published(
        model=DenseAutoencoder(),
        shape=(640,),
        weights="ad01.h5",
        real="ad01_fp32.tflite",
        int8="ad01_int8.tflite",
        classifies=False,
        unbiased=tuple(f"Dense_{i}" for i in range(9)),
    ),
}
"""By the names that commands take."""


def directory(folder: Path | None = None) -> Path:
    """Return the directory of the published files.

    Args:
      folder: the directory; None: the one that MLPERF_TINY names.

    Raises:
      ExperimentError: there is none.
    """
    named = os.environ.get(VARIABLE)
    found = folder or (Path(named) if named else None)
    if found is None or not found.is_dir():
        raise ExperimentError(
            f"no directory of MLPerf Tiny's files ({found or f'{VARIABLE} is not set'}): give the "
            f"one that holds pretrainedResnet.h5 and the others in {VARIABLE} or as --folder."
        )
    return found


def variables_of(
    layers: list[tflite_archive.Layer], model: nn.Module, x: np.ndarray, source: Path
) -> dict[str, Any]:
    """Return the variables of a model from the layers of a TFLite file, which has no BatchNorm.

    Args:
      layers: in the order of the file; those of a kind are numbered in it.
      model: whose weights they are.
      x: an input, of which only the shape matters.
      source: where they are from, for the message.

    Raises:
      ExperimentError: they are of another network; lists every missing and extra one.
    """
    leaves = {}
    counts = dict.fromkeys(("depthwise", "Conv", "Dense"), 0)
    for layer in layers:
        kind = "depthwise" if layer.depthwise else "Conv" if layer.kernel.ndim == 4 else "Dense"
        for name in ("kernel", "bias"):
            leaves[f"params/{kind}_{counts[kind]}/{name}"] = jnp.asarray(getattr(layer, name))
        counts[kind] += 1
    variables = traverse_util.unflatten_dict(leaves, sep="/")
    expected = jax.eval_shape(model.init, jax.random.key(0), x)
    check_tree(leaf_shapes(expected), leaf_shapes(variables), str(source))
    return variables
