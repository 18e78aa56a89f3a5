"""Operations rewritten for few channels: the same codes as before, and which ones are."""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st

import simqat_jax as sq
from simqat_jax.targets.rewrites import in_width_blocks, pooling_rows_first, reshaping_once


def converted(module, shape):
    """Convert one convolution, with a bias that is not zero; return input codes too."""
    x = jax.random.normal(jax.random.key(0), (3, *shape))
    qmodel = sq.SimQAT().apply(module)

    @jax.jit
    def observe():
        variables = qmodel.init(jax.random.key(1), x)
        variables = {**variables, "params": jax.tree.map(lambda p: p + 0.1, variables["params"])}
        _, state = qmodel.apply(variables, x, mutable=["quant_stats"])
        return {**variables, **state}

    model = sq.convert(qmodel, observe(), x[:1])
    return model, model.quantize(x)


def rewritten(rewrite, model, argument):
    program = rewrite(model.program, argument)
    program.validate()
    return sq.IntegerModel(program)


@examples(15)
@given(
    channels=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 7)),
    strides=st.tuples(st.integers(1, 3), st.sampled_from((1, 2, 4))),
    block=st.sampled_from((2, 4, 8)),
    blocks=st.integers(1, 3),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 3))] * 2),
)
def test_the_codes_stay_the_same(channels, kernel, strides, block, blocks, padding):
    outputs = max(block // strides[1], 1) * blocks
    width = (outputs - 1) * strides[1] + kernel[1] - sum(padding[1])
    assume(width > 0)
    layer = nn.Conv(5, kernel, strides, padding=padding)
    model, codes = converted(layer, (6, width, channels))
    changed = rewritten(in_width_blocks, model, {channels: (block,)})
    np.testing.assert_array_equal(changed.run_codes(codes), model.run_codes(codes))


@pytest.mark.parametrize(
    "layer, shape, kinds",
    [
        (nn.Conv(6, (5, 5), padding="VALID"), (32, 32, 1), ["reshape", "conv", "reshape"]),
        (nn.Conv(6, (3, 3)), (32, 32, 3), ["pad", "reshape", "conv", "reshape"]),
        (nn.Conv(6, (3, 3)), (32, 30, 1), ["pad", "reshape", "conv", "reshape"]),
        (nn.Conv(6, (5, 3), (2, 2)), (32, 10, 1), ["pad", "reshape", "conv", "reshape"]),
        (nn.Conv(6, (3, 3)), (32, 31, 1), ["conv"]),
        (nn.Conv(6, (3, 3), (2, 2)), (32, 32, 3), ["pad", "reshape", "conv", "reshape"]),
        (nn.Conv(6, (3, 3)), (32, 32, 4), ["conv"]),
        (nn.Conv(6, (3, 3)), (32, 30, 3), ["conv"]),
        (nn.Conv(6, (3, 3), (3, 3)), (33, 36, 3), ["conv"]),
        (nn.Conv(6, (3, 3), kernel_dilation=2), (32, 32, 3), ["conv"]),
        (nn.Conv(6, (3, 3), feature_group_count=3), (32, 32, 3), ["conv"]),
        (nn.Conv(6, (3,)), (32, 3), ["conv"]),
    ],
)
def test_which_convolutions_are_rewritten(layer, shape, kinds):
    model, codes = converted(layer, shape)
    changed = rewritten(in_width_blocks, model, {1: (4, 2), 2: (4,), 3: (4,)})
    assert [op.kind for op in changed.ops] == kinds
    np.testing.assert_array_equal(changed.run_codes(codes), model.run_codes(codes))


class Pool(nn.Module):
    window: tuple
    strides: tuple
    padding: Any
    features: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (1, 1))(x)
        return nn.max_pool(x, self.window, self.strides, self.padding)


@pytest.mark.parametrize(
    "window, strides, padding",
    [((2, 2), (2, 2), "VALID"), ((3, 2), (1, 2), "SAME"), ((2, 3), (2, 1), ((1, 0), (2, 1)))],
)
def test_pooling_rows_first(window, strides, padding):
    model, codes = converted(Pool(window, strides, padding), (9, 11, 2))
    changed = rewritten(pooling_rows_first, model, 16)
    pools = [op.attributes["window"] for op in changed.ops if op.kind == "max_pool"]
    assert pools == [(1, window[0], 1, 1), (1, 1, window[1], 1)]
    np.testing.assert_array_equal(changed.run_codes(codes), model.run_codes(codes))


@pytest.mark.parametrize("model", [Pool((2, 2), (2, 2), "VALID", 16), Pool((1, 2), (1, 2), "SAME")])
def test_other_pooling_stays(model):
    model, _ = converted(model, (8, 8, 2))
    assert pooling_rows_first(model.program, 16).ops == model.ops


@pytest.mark.parametrize("suffix, export", [("onnx", sq.export_onnx), ("tflite", sq.export_tflite)])
def test_files_hold_blocks(suffix, export, tmp_path):
    model, _ = converted(nn.Conv(6, (5, 5), padding="VALID"), (32, 32, 1))
    export(model, tmp_path / f"m.{suffix}")
    images = jax.random.normal(jax.random.key(2), (7, 32, 32, 1))
    assert sq.verify(model, tmp_path / f"m.{suffix}", images).differing == 0
    assert b"/blocks" in (tmp_path / f"m.{suffix}").read_bytes()


class _Reshapes(nn.Module):
    """Reshapes in a row; `both` returns what is between as well."""

    both: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        between = x.reshape(len(x), 3, 2)
        last = between.reshape(len(x), 1, 6)
        return (between, last) if self.both else last


@pytest.mark.parametrize("both, left", [(False, 1), (True, 2)])
def test_reshapes_in_a_row_are_one(both, left):
    model, codes = converted(_Reshapes(both), (4,))
    assert [op.kind for op in model.ops] == ["dense", "reshape", "reshape"]
    program = reshaping_once(model.program)
    program.validate()
    assert [op.kind for op in program.ops] == ["dense"] + left * ["reshape"]
    before, after = (jax.tree.leaves(m.run_codes(codes)) for m in (model, sq.IntegerModel(program)))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
