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
    assert figures["layers"][0]["alone_float"] is None
    assert figures["layers"][0]["alone_quantized"] == exact.alone_quantized
    tensor = figures["tensors"]["first/output"]
    assert tensor["counts"] == list(analysis.tensors["first/output"].counts)
    assert tensor["spec"]["num_bits"] == 4
    assert analysis.to_dict()["sqnr"] == analysis.sqnr


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_hold_the_figures_alone(analyzed, copied):
    other = copied(analyzed.analysis)
    assert other == analyzed.analysis
    with pytest.raises(ValueError, match="a copy, without its data"):
        sq.suggest(other, sq.MinSqnr(10), progress=False)


def test_a_plot_has_a_bar_for_each_layer(analyzed):
    pytest.importorskip("matplotlib")
    left, right = analyzed.analysis.plot(most=2).axes
    shown = analyzed.analysis.layers[:2]
    assert [bar.get_width() for bar in left.patches[::-1]] == [s.alone_quantized for s in shown]
    assert [bar.get_width() for bar in right.patches[::-1]] == [s.gain for s in shown]
