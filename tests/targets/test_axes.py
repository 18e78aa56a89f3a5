"""Resizes that move one axis at a time: the same codes, in ONNX files."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import converted
from single_operations import random_codes
from zoo import case

import simqat_jax as sq
from simqat_jax.ops.moves import Transpose
from simqat_jax.targets.axes import moving_one_axis


def resized(how, *shape):
    return lambda x: jax.image.resize(x, (x.shape[0], *shape, x.shape[-1]), how)


def up_and_over(x):
    """Two resizes of one tensor, the second of one axis alone."""
    x = resized("bilinear", 7, 4)(x)
    return nn.Conv(3, (1, 1))(x), resized("bilinear", 7, 9)(x)


MODELS = {
    "down and up": (resized("cubic", 3, 9), 2),
    "one axis": (resized("bilinear", 5, 12), 1),
    "read twice": (up_and_over, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_codes_stay_the_same(name, tmp_path):
    body, products = MODELS[name]
    model = converted(case(body, (2, 5, 6, 4), 0, 0), sq.SimQATConfig(backend="onnx"))
    program = moving_one_axis(model.program)
    program.validate()
    moves = [op.permutation for op in program.ops if isinstance(op, Transpose)]
    assert moves == [(0, 2, 1)] * 2 * products
    for batch in (1, 3):
        codes = random_codes(model, batch)
        want = jax.tree.leaves(model.run_codes(*codes))
        got = jax.tree.leaves(sq.IntegerModel(program).run_codes(*codes))
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    sq.export_onnx(model, tmp_path / "m.onnx")
    images = jax.random.normal(jax.random.key(1), (3, 5, 6, 4))
    assert sq.verify(model, tmp_path / "m.onnx", images).differing == 0


@pytest.mark.parametrize(
    "body",
    [
        lambda x: nn.Dense(3)(x.transpose(0, 2, 1, 3)),
        lambda x: nn.Dense(5)(x.transpose(0, 1, 3, 2)),
        lambda x: nn.relu(nn.Conv(3, (1, 1))(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)),
    ],
)
def test_what_does_not_come_back_stays(body):
    model = converted(case(body, (2, 5, 6, 4), 0, 0), sq.SimQATConfig(backend="onnx"))
    assert moving_one_axis(model.program).ops == model.ops
