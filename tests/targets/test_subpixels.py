"""Transposed convolutions as convolutions of sub-pixels: the same codes, and no zeros between."""

import flax.linen as nn
import numpy as np
import pytest
from examples import examples
from hypothesis import assume, given
from hypothesis import strategies as st
from models import converted as converted_case
from models import export
from single_operations import layer, random_codes, single
from zoo import case

import simqat_jax as sq
from simqat_jax.ops.products import Conv
from simqat_jax.targets.subpixels import in_subpixels

X, Y = (0.1, 9), (4.3, 100)


@st.composite
def convolutions(draw, most, backend):
    """A convolution of a spread input over up to so many axes, with any window that fits."""
    count = draw(st.integers(1, most))

    def each(lowest, highest):
        return draw(st.tuples(*[st.integers(lowest, highest)] * count))

    lengths, strides, spread, dilation = each(1, 5), each(1, 3), each(1, 4), each(1, 3)
    padding, sizes = list(zip(each(-2, 4), each(-2, 4), strict=True)), each(1, 5)
    groups = draw(st.sampled_from((1, 1, 2, 4)))
    assume(set(spread) != {1})
    room = [
        (n - 1) * d + sum(p) - (k - 1) * step
        for n, d, p, k, step in zip(sizes, spread, padding, lengths, dilation, strict=True)
    ]
    assume(min(room) >= 0)
    positions = [r // s + 1 for r, s in zip(room, strides, strict=True)]
    attributes = {
        "strides": strides,
        "padding": padding,
        "input_dilation": spread,
        "kernel_dilation": dilation,
        "groups": groups,
    }
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    arrays = layer(rng, X, Y, (*lengths, 4 // groups, 4), False)
    return single(backend, "conv", (X, Y), attributes, arrays, (-1, *sizes, 4), (-1, *positions, 4))


@examples(15)
@given(convolutions(3, "onnx"))
def test_the_codes_stay_the_same(model):
    program = in_subpixels(model.program)
    program.validate()
    assert all(set(op.input_dilation) == {1} for op in program.ops if isinstance(op, Conv))
    (codes,) = random_codes(model, 2)
    np.testing.assert_array_equal(sq.IntegerModel(program).run_codes(codes), model.run_codes(codes))


def differing(model, path, codes):
    export(model, path, integer_io=True)
    file = sq.open_file(path, threads=1, isolated=False)
    ends = [model.tensors[i].grid for i in (*model.inputs, *model.outputs)]
    x, want = (
        grid.in_file(c, file.input_types[0])
        for c, grid in zip((codes, model.run_codes(codes)), ends, strict=True)
    )
    (got,) = file.run([x])
    assert got.shape == want.shape
    return int((got != want).sum())


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@examples(10)
@given(st.data())
def test_both_runtimes(backend, tmp_path_factory, data):
    model = data.draw(convolutions(2, backend))
    path = tmp_path_factory.mktemp("single") / f"m.{backend}"
    assert differing(model, path, *random_codes(model, 3)) == 0


IMAGE = (2, 5, 6, 4)
LAYERS = {
    "a sub-pixel each": (nn.ConvTranspose(3, (2, 2), (2, 2)), IMAGE, ["conv", *"rtr"]),
    "blocks that overlap": (nn.ConvTranspose(3, (4, 4), (2, 2)), IMAGE, ["conv", *"rtr", "slice"]),
    "one axis": (nn.ConvTranspose(3, (2,), (2,)), IMAGE[1:], ["conv", "r"]),
    "kernel below the stride": (
        nn.ConvTranspose(3, (1, 2), (3, 2), padding="VALID"),
        IMAGE,
        ["conv", *"rtr"],
    ),
    "no batch": (nn.ConvTranspose(3, (2, 2), (2, 2)), IMAGE[1:], ["r", "conv", *"rtr", "r"]),
    "flipped": (nn.ConvTranspose(3, (3, 3), (2, 1), transpose_kernel=True), IMAGE, None),
}


@pytest.mark.parametrize("backend", ["onnx", "tflite"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, backend, tmp_path):
    module, shape, kinds = LAYERS[name]
    model = converted_case(case(module, shape, 0, 0), sq.SimQATConfig(backend=backend))
    assert differing(model, tmp_path / f"m.{backend}", *random_codes(model, shape[0])) == 0
    short = {"reshape": "r", "transpose": "t"}
    if kinds is not None:
        assert [short.get(op.kind, op.kind) for op in in_subpixels(model.program).ops] == kinds
