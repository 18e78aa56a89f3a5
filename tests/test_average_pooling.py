"""Average pooling that does not count its padding: integers in every form, with the same codes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import EXPORTS, assert_same, by_turns, observed

import simqat_jax as sq

IMAGE = jax.random.normal(jax.random.key(0), (3, 9, 8, 4))
LINE = jax.random.normal(jax.random.key(1), (3, 11, 4))


class Pooled(nn.Module):
    window: tuple
    strides: tuple | None
    padding: object = "SAME"
    relu: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3,) * (x.ndim - 2))(x)
        x = nn.avg_pool(x, self.window, self.strides, self.padding, count_include_pad=False)
        x = nn.relu(x) if self.relu else x
        return nn.Dense(3)(x)


class OverAxes(nn.Module):
    """Means that divide by constants of a shape."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (3, 3))(x)
        return nn.Dense(3)(x.sum(1) / np.arange(4.0, 12.0, dtype=np.float32)[None, :, None])


CASES = {
    "3x3": (Pooled((3, 3), None), IMAGE),
    "3x3 by 2": (Pooled((3, 3), (2, 2)), IMAGE),
    "2x2 by 2": (Pooled((2, 2), (2, 2)), IMAGE),
    "relu": (Pooled((3, 3), (2, 1), relu=True), IMAGE),
    "wide": (Pooled((5, 3), (3, 2)), IMAGE),
    "explicit": (Pooled((3, 3), (2, 2), ((1, 0), (0, 2))), IMAGE),
    "valid": (Pooled((3, 3), (2, 2), "VALID"), IMAGE),
    "line": (Pooled((3,), (2,)), LINE),
}


@pytest.mark.parametrize(("name", "backend"), by_turns(CASES, 2))
def test_every_form_has_the_same_codes(name, backend, tmp_path):
    model, x = CASES[name]
    qmodel, variables, _ = observed(model, x, config=sq.SimQATConfig(backend=backend))
    assert "pool" not in str(qmodel.plan(variables, x).floats)
    want = jax.jit(qmodel.apply)(variables, x)
    integer = sq.convert(qmodel, variables, x)
    assert "float" not in {op.kind for op in integer.ops}
    assert_same(integer(x), want)
    assert_same(integer(x[:2]), want[:2])
    floats = model.apply({"params": variables["params"]}, x)
    assert jnp.abs(want - floats).max() < 0.05 * jnp.abs(floats).max()
    path = tmp_path / f"model.{backend}"
    EXPORTS[backend](integer, path)
    found = sq.verify(integer, path, x, batch_size=2)
    assert found.codes and not found.differing


@pytest.mark.parametrize("backend", EXPORTS)
def test_sums_divided_by_other_numbers(backend, tmp_path):
    """Integers; of the files TFLite's refuses them by name."""
    qmodel, variables, _ = observed(OverAxes(), IMAGE, config=sq.SimQATConfig(backend=backend))
    integer = sq.convert(qmodel, variables, IMAGE)
    assert_same(integer(IMAGE), jax.jit(qmodel.apply)(variables, IMAGE))
    path = tmp_path / f"model.{backend}"
    if backend == "tflite":
        with pytest.raises(ValueError, match="divides each of its sums"):
            sq.export_tflite(integer, path)
        return
    sq.export_onnx(integer, path)
    assert not sq.verify(integer, path, IMAGE).differing
