"""Figures show the numbers of the analysis."""

import dataclasses

import numpy as np
import pytest

import simqat_jax as sq
from simqat_jax.analysis.drawings import figures, write_pngs

pytest.importorskip("matplotlib")
MODELS = [
    sq.Measurement(name="float", accuracy=0.97, nbytes=1000),
    sq.Measurement(name="file", accuracy=0.96),
]


@pytest.fixture(scope="module")
def drawn(analyzed):
    ranges = {"input": (sq.RangeAt(0, -1.0, 2.0), sq.RangeAt(10, -2.0, 4.0)), "never": ()}
    return dict(figures(dataclasses.replace(analyzed.analysis, ranges=ranges), MODELS))


def test_there_is_one_for_each_part(drawn, analyzed):
    assert list(drawn) == ["models", "layers", "tensors", "ranges"]
    assert list(dict(figures(analyzed.analysis, []))) == ["layers", "tensors"]


def test_models(drawn):
    accuracy, size = drawn["models"].axes
    assert [bar.get_width() for bar in accuracy.patches] == [96, 97]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["file", "float"]
    assert [bar.get_width() for bar in size.patches] == [1.0]


def test_histograms_lie_on_their_grids(drawn, analyzed):
    axes = dict(zip(analyzed.analysis.tensors, drawn["tensors"].axes, strict=False))
    tensor = analyzed.analysis.tensors["first/output"]
    steps = axes["first/output"].patches[0]
    values, edges, _ = steps.get_data()
    np.testing.assert_allclose(values**2, tensor.counts)
    step = (tensor.grid[1] - tensor.grid[0]) / 15
    assert edges[0] == pytest.approx(tensor.grid[0] - step / 2)
    assert edges[-1] == pytest.approx(tensor.grid[1] + step / 2)
    lines = axes["first/output"].collections[0]
    places = [segment[0][0] for segment in lines.get_segments()]
    np.testing.assert_allclose(places, tensor.grid[0] + step * np.arange(16), atol=1e-6)


def test_codes_of_8_bits_and_what_is_clipped(analyzed):
    tensor = analyzed.analysis.tensors["input"]
    counts = (75,) + 63 * (0,)
    tensor = dataclasses.replace(
        tensor,
        spec=sq.QuantSpec.activation(),
        grid=(0.0, 255.0),
        counts=counts,
        below=0.25,
        above=0.0,
    )
    drawn = dict(figures(dataclasses.replace(analyzed.analysis, tensors={"input": tensor}), []))
    (axes,) = drawn["tensors"].axes
    (lines,) = axes.collections
    assert [line[0][0] for line in lines.get_segments()] == list(range(0, 256, 8))
    assert axes.get_xlabel().endswith("25.00% clipped, a line for 8 codes")
    _, shade, bar = axes.patches
    assert shade.get_extents().x1 == bar.get_extents().x1  # both end where the grid begins
    assert bar.get_x() == -0.5 and bar.get_width() < 0 and bar.get_height() ** 2 == 25


def test_ranges(drawn):
    (axes,) = drawn["ranges"].axes
    low, high = axes.lines
    assert low.get_xydata().tolist() == [[0, -1], [10, -2]]
    assert high.get_xydata().tolist() == [[0, 2], [10, 4]]


def test_many_tensors_take_several_figures(analyzed):
    (tensor,) = list(analyzed.analysis.tensors.values())[:1]
    many = {str(n): dataclasses.replace(tensor, name=str(n)) for n in range(25)}
    drawn = dict(figures(dataclasses.replace(analyzed.analysis, tensors=many), []))
    assert list(drawn) == ["layers", "tensors-1", "tensors-2"]
    assert sum(axes.axison for axes in drawn["tensors-2"].axes) == 1


def test_files(analyzed, tmp_path):
    write_pngs(analyzed.analysis, (), tmp_path / "new" / "folder")
    found = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in found] == ["layers.png", "tensors.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in found)
