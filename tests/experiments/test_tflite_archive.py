"""Files that this library wrote give back their weights, and run as the model does."""

from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

import simqat_jax as sq
from experiments import tflite_archive
from experiments.errors import ExperimentError


class Small(nn.Module):
    """A layer of each kind."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), 2)(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4)(x)
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def model() -> tuple[sq.IntegerModel, dict, np.ndarray]:
    x = np.random.default_rng(0).uniform(-1, 1, (3, 4, 4, 4)).astype(np.float32)
    qmodel = sq.SimQAT(sq.SimQATConfig()).apply(Small())
    variables = jax.jit(qmodel.init)(jax.random.key(0), x)
    observe = jax.jit(lambda v: qmodel.apply(v, x, mutable=["quant_stats"])[1])
    variables |= observe(variables)
    return sq.convert(qmodel, variables, x[:1]), variables["params"], x


def test_layers_hold_what_their_codes_stand_for(model, tmp_path: Path) -> None:
    integer, params, _ = model
    path = tmp_path / "model.tflite"
    sq.export_tflite(integer, path)
    found = tflite_archive.layers(path)
    assert [layer.depthwise for layer in found] == [False, True, False]
    for layer, name in zip(found, ("Conv_0", "Conv_1", "Dense_0"), strict=True):
        kernel = np.asarray(params[name]["kernel"])
        assert layer.kernel.dtype == layer.bias.dtype == np.float32
        assert layer.bias.shape == kernel.shape[-1:]
        step = np.abs(kernel).reshape(-1, kernel.shape[-1]).max(axis=0) / 127
        assert (np.abs(layer.kernel - kernel) <= 0.501 * step).all()


@pytest.mark.parametrize("integer_io", [False, True])
def test_files_run_on_real_values(model, integer_io: bool, tmp_path: Path) -> None:
    integer, _, x = model
    path = tmp_path / "model.tflite"
    sq.export_tflite(integer, path, integer_io=integer_io)
    file = tflite_archive.LiteRTFile(path, softmax=False)  # it has none
    np.testing.assert_array_equal(file.run(x), integer(x))
    assert file.bytes == path.stat().st_size
    if integer_io:
        grid = integer.tensors[integer.inputs[0]].grid
        ends = [float(np.asarray(integer.quantize(np.full_like(x, v))).flat[0]) for v in (-9, 9)]
        assert file.input_range == pytest.approx([(c - grid.zero_point) * grid.scale for c in ends])


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    with pytest.raises(ExperimentError, match="cannot read"):
        tflite_archive.layers(path)
    path.write_bytes(b"no model")
    for softmax in (False, True):
        with pytest.raises(ExperimentError, match=r"model\.tflite is no TFLite file"):
            tflite_archive.LiteRTFile(path, softmax=softmax)
