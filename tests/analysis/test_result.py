"""Results are printed, kept and copied."""

import copy
import dataclasses
import json
import pickle

import pytest

import simqat_jax as sq


def test_json_holds_every_figure(analyzed):
    analysis = analyzed.analysis
    exact = dataclasses.replace(analysis.layers[0], alone_float=float("inf"))
    figures = json.loads(dataclasses.replace(analysis, layers=(exact,)).to_json())
    assert figures["layers"][0]["alone_float"] == "Infinity"
    assert figures["layers"][0]["alone_quantized"] == exact.alone_quantized
    tensor = figures["tensors"]["first/output"]
    assert tensor["counts"] == list(analysis.tensors["first/output"].counts)
    assert tensor["spec"]["num_bits"] == 4
    assert analysis.to_dict()["sqnr"] == analysis.sqnr


def test_a_file_holds_every_figure(analyzed, tmp_path):
    analysis = analyzed.analysis
    exact = dataclasses.replace(analysis.layers[0], alone_float=float("inf"), gain=-float("inf"))
    ranges = {"input": (sq.RangeAt(0, -1.0, 2.0), sq.RangeAt(9, -1.5, 2.0)), "never": ()}
    for given in (analysis, dataclasses.replace(analysis, layers=(exact,), ranges=ranges)):
        given.save(tmp_path / "a.json")
        assert sq.Analysis.load(tmp_path / "a.json") == given
    assert str(sq.Analysis.load(tmp_path / "a.json")) == str(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a.json is no JSON: .* Pass a file that Analysis.save wrote"),
        ("[]", 'a.json has no "version": 1'),
        ('{"version": 2}', 'a.json has no "version": 1'),
        ('{"version": 1}', "a.json: analysis must be an object with layers, tensors"),
    ],
)
def test_a_file_that_holds_none(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        sq.Analysis.load(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no file at"):
        sq.Analysis.load(tmp_path / "b.json")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_the_figures_alone(analyzed, copied):
    other = copied(analyzed.analysis)
    assert other == analyzed.analysis
    with pytest.raises(ValueError, match="a copy, without its data"):
        sq.suggest(other, sq.MinSqnr(10), progress=False)


def test_what_is_shown_fits_a_line_or_is_the_table(analyzed):
    short = "Analysis(3 layers, 5 tensors, 24 examples; outputs 9.2 dB SQNR)"
    assert repr(analyzed.analysis) == short
    assert "counts" not in repr(analyzed.analysis.tensors["input"])
    named = dataclasses.replace(analyzed.analysis.layers[0], name="a<b")
    page = dataclasses.replace(analyzed.analysis, layers=(named,))._repr_html_()
    assert page.startswith("<pre>outputs: 9.2 dB") and "a&lt;b" in page


def test_rows_can_be_told_apart(analyzed, monkeypatch):
    names = [f"Block_{k}/MultiHeadDotProductAttention_0/dot_general_1" for k in range(3)]
    layers = tuple(dataclasses.replace(analyzed.analysis.layers[0], name=name) for name in names)
    analysis = dataclasses.replace(analyzed.analysis, layers=layers)
    monkeypatch.setenv("COLUMNS", "80")
    lines = str(analysis).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:8] for line in lines[4:7]] == ["Block_0/", "Block_1/", "Block_2/"]
    monkeypatch.setenv("COLUMNS", "120")
    assert all(name in str(analysis) for name in names)


def test_titles_of_a_plot_do_not_meet(analyzed):
    pytest.importorskip("matplotlib")
    for name in ("a", "Block_0/" * 10):
        named = dataclasses.replace(analyzed.analysis.layers[0], name=name)
        figure = dataclasses.replace(analyzed.analysis, layers=(named,)).plot()
        figure.draw_without_rendering()
        left, right = (axes.xaxis.label.get_window_extent() for axes in figure.axes)
        assert left.x1 < right.x0


def test_a_plot_has_a_bar_for_each_layer(analyzed):
    pytest.importorskip("matplotlib")
    left, right = analyzed.analysis.plot(most=2).axes
    shown = analyzed.analysis.layers[:2]
    assert [bar.get_width() for bar in left.patches[::-1]] == [s.alone_quantized for s in shown]
    assert [bar.get_width() for bar in right.patches[::-1]] == [s.gain for s in shown]
