"""Refusals name all that stands in the way, in few lines, and their remedies work."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import EXPORTS, ONE_BY_DAY, observed
from zoo import Model

import simqat_jax as sq

X = jax.random.normal(jax.random.key(0), (4, 5, 8))
IMAGE = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def converted(model, *args, backend="tflite", **config):
    config = sq.SimQATConfig(backend=backend, **config)
    qmodel, variables, _ = observed(model, *args, config=config)
    return sq.convert(qmodel, variables, *args)


def other(model, *args):
    """The integer model for the other runtime, from the same training."""
    qmodel, variables, _ = observed(model, *args)
    return sq.convert(qmodel, variables, *args, backend="onnx")


def refusal(model, backend, path):
    with pytest.raises(ValueError) as error:
        EXPORTS[backend](model, path)
    assert not path.exists()
    lines = str(error.value).splitlines()
    assert len(lines) < 20 and max(map(len, lines)) < 300
    return str(error.value)


class Odd(nn.Module):
    """Functions that no file holds."""

    functions: tuple[Callable[..., jax.Array], ...] = (lax.lgamma,)

    @nn.compact
    def __call__(self, x):
        for function in self.functions:
            x = function(jnp.abs(x) + 1)
        return x


class Stack(nn.Module):
    depth: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for k in range(self.depth):
            y = nn.Dense(8)(Odd(name=f"odd_{k}")(x))
            x = x + nn.Dense(8)(Odd((lax.lgamma, lax.digamma), name=f"pair_{k}")(y))
        return Odd()(nn.Dense(3)(x.mean(1)))


@pytest.mark.parametrize("backend", ONE_BY_DAY)
def test_all_of_a_kind_in_one_line(backend, tmp_path):
    text = refusal(converted(Stack(), X, backend=backend), backend, tmp_path / "file")
    problem = "computed in float in a way that no file holds"
    lgamma = f"  lgamma 10x, {problem} (lgamma), between layers: odd_0, pair_0, odd_1 and 7 more"
    digamma = (
        f"  digamma 5x, {problem} (digamma), between layers: pair_0, pair_1, pair_2 and 2 more"
    )
    lines = text.splitlines()
    assert lgamma in lines and digamma in lines
    assert f"  lgamma 1x, {problem} (lgamma), behind the layers: Odd_0" in lines
    assert sum("between layers" in line for line in lines) == 2


class Front(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Rest(name="rest")(Odd()(x))


class Rest(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Conv(4, (3, 3))(x)).mean((1, 2)))


class Behind(nn.Module):
    float_end: bool = True

    @nn.compact
    def __call__(self, x):
        x = Rest(name="rest")(x)
        return Odd()(x) if self.float_end else x


class Between(nn.Module):
    norm: Callable[[], nn.Module] = Odd

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(self.norm()(nn.Dense(4)(x)))


@pytest.mark.parametrize("backend", ONE_BY_DAY)
def test_a_remedy_for_where_it_stands(backend, tmp_path):
    """In front and behind: out of the model. Between: another operation."""
    path = tmp_path / f"file.{backend}"
    batch_norm = functools.partial(nn.BatchNorm, use_running_average=True)

    text = refusal(converted(Behind(), IMAGE, backend=backend), backend, path)
    assert "return what it reads, and compute it on the result" in text
    model = converted(Behind(float_end=False), IMAGE, backend=backend)
    EXPORTS[backend](model, path)
    assert not sq.verify(model, path, IMAGE).differing
    path.unlink()

    text = refusal(converted(Front(), IMAGE, backend=backend), backend, path)
    assert "compute it on the input, and give the model the result" in text
    EXPORTS[backend](converted(Rest(), IMAGE, backend=backend), path)
    path.unlink()

    row = X[:, 0]
    text = refusal(converted(Between(), row, backend=backend), backend, path)
    assert "Replace it by what runs on integers (BatchNorm" in text
    EXPORTS[backend](converted(Between(batch_norm), row, backend=backend), path)


# What TFLite alone cannot hold -----------------------------------------------------------------


class Volume(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Conv(4, (3, 3, 3))(x).mean((1, 2, 3)))


class Unequal(nn.Module):
    """A sum or product that is clipped to a tiny part of what it may be."""

    factor: float
    clip: float = np.inf
    product: bool = False

    @nn.compact
    def __call__(self, x):
        y, z = nn.Dense(4)(x * self.factor), nn.Dense(4)(x)
        y = jnp.clip(y, -self.clip, self.clip) if self.clip < np.inf else y
        return nn.Dense(3)(nn.relu6(y * z if self.product else y + z))


TFLITE_ALONE = {
    "three axes": (Volume(), IMAGE.reshape(4, 4, 4, 4, 3), "not three"),
    "ratio": (Unequal(1e5, product=True), X[:, 0], "times its output's"),
}


@pytest.mark.parametrize("name", TFLITE_ALONE)
def test_the_other_file_holds_it(name, tmp_path):
    """The remedy, followed to the letter."""
    model, x, problem = TFLITE_ALONE[name]
    text = refusal(converted(model, x), "tflite", tmp_path / "file")
    assert problem in text
    assert 'with export_onnx(convert(..., backend="onnx"), path)' in text
    integer, path = other(model, x), tmp_path / "model.onnx"
    sq.export_onnx(integer, path)
    assert not sq.verify(integer, path, x).differing


class Clipped(nn.Module):
    """A layer whose output scale is far below its input's."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu6(nn.Conv(6, (3, 3))(x)).mean((1, 2)))


@pytest.mark.parametrize("product", [False, True])
def test_results_beyond_int32(product, tmp_path):
    """And the remedy, followed to the letter."""
    path, x = tmp_path / "model.onnx", X[:, 0]
    far = Unequal(1e9, product=product)
    text = refusal(converted(far, x, backend="onnx"), "onnx", path)
    assert "rounds to int32" in text and "Clip its inputs in the model (jnp.clip)" in text
    model = converted(far.clone(clip=100.0), x, backend="onnx")
    sq.export_onnx(model, path)
    assert not sq.verify(model, path, x).differing


@pytest.mark.parametrize("backend", EXPORTS)
@pytest.mark.parametrize("factor", [1e3, pytest.param(1e6, marks=pytest.mark.nightly), 1e9])
def test_a_layer_that_saturates_is_written(backend, factor, tmp_path):
    x = factor * IMAGE
    model, path = converted(Clipped(), x, backend=backend), tmp_path / f"model.{backend}"
    EXPORTS[backend](model, path)
    assert not sq.verify(model, path, x).differing
    # Sums of zero are the only ones that do not saturate.
    few = np.where(np.random.default_rng(0).random(x.shape) < 0.02, x, 0.0).astype(np.float32)
    assert not sq.verify(model, path, few).differing


@pytest.mark.parametrize("backend", EXPORTS)
def test_wide_codes_in_one_line_each(backend, tmp_path):
    spec = sq.QuantSpec(num_bits=10)
    model = converted(Rest(), IMAGE, backend=backend, activation=spec)
    text = refusal(model, backend, tmp_path / "file")
    assert "activations have more than 8 bits" in text and "num_bits=8" in text


class Ids(nn.Module):
    """Integers are converted in the model, as far as that helps, and looked up."""

    @nn.compact
    def __call__(self, ids, x):
        return nn.Dense(3)(
            nn.Embed(9, 8)(ids).mean(1) + x * ids.astype(jnp.float32).sum(-1)[:, None]
        )


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int16, np.uint32])
def test_ids_of_other_types_are_given_as_int32(dtype, tmp_path):
    ids, x = np.arange(20, dtype=dtype).reshape(4, 5) % dtype(9), X[:, 0]
    text = refusal(converted(Ids(), ids, x), "tflite", tmp_path / "file")
    assert 'Give the model int32 in front of the call, `x.astype("int32")`, for input_0.' in text
    model = converted(Ids(), ids.astype("int32"), x)
    sq.export_tflite(model, tmp_path / "file.tflite")
    assert not sq.verify(model, tmp_path / "file.tflite", ids.astype("int32"), x).differing


LAST = jnp.array([4, 0, 2, 3])
PICKED = {
    "by numbers": lambda x, k: x[jnp.arange(len(x)), k],
    "along an axis": lambda x, k: jnp.take_along_axis(x, k[:, None, None], 1)[:, 0],
}


@pytest.mark.parametrize("name", PICKED)
def test_what_picks_in_each_example_is_a_product(name, tmp_path):
    def picking(function):
        return Model(lambda x, k: nn.Dense(3)(function(nn.Dense(4)(x), k)))

    text = refusal(converted(picking(PICKED[name]), X, LAST), "tflite", tmp_path / "file")
    assert "`(x * jax.nn.one_hot(k, x.shape[1])[..., None]).sum(1)`" in text
    by_product = picking(lambda x, k: (x * jax.nn.one_hot(k, x.shape[1])[..., None]).sum(1))
    model = converted(by_product, X, LAST, float_parts="refuse")
    sq.export_tflite(model, tmp_path / "file.tflite")
    assert not sq.verify(model, tmp_path / "file.tflite", X, LAST).differing
