"""Tables that fit their width."""

import pytest

from simqat_jax.ir.sheet import Column, Line, Sheet, some, terminal_width

COLUMNS = (Column("layer", "end"), Column("what", "start"), Column("bits"))
LINES = (
    Line(("encoder/layers_0/attention/query", "a dense layer of 64 features", "8"), ("all of it",)),
    Line(("encoder/cumsum", "cumsum", "float32"), is_float=True),
    Line(("<head>", "a & b", ""), ("a < b",)),
)
SHEET = Sheet(("Head.",), COLUMNS, LINES, ("Foot " * 30,))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider(width):
    lines = SHEET.text(width).splitlines()
    assert max(map(len, lines)) <= width
    head, titles, first, *_ = lines
    assert head == "Head." and titles.split() == ["layer", "what", "bits"]
    assert first.endswith("8")  # what is never shortened
    whole = width > 70
    assert ("encoder/layers_0/attention/query" in first) == whole
    assert ("…" in first) == (not whole)
    assert "query" in first  # the end of a path tells more than its beginning


def test_as_wide_as_the_terminal_and_never_below_80(monkeypatch):
    for columns, want in ((40, 80), (80, 80), (132, 132)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert terminal_width() == want


def test_a_table_for_notebooks():
    text = SHEET.html()
    assert text.count("<table>") == 2 and "<b>encoder</b> (2 operations, 1 float)" in text
    assert text.count("rgba(") == 1  # the float one alone is in colour
    assert "&lt;head&gt;" in text and "a &amp; b" in text and "<head>" not in text
    assert "<details><summary>encoder/layers_0/attention/query</summary>all of it" in text


def test_long_lists_are_cut():
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(10)], 2) == "0, 1 and 8 more"
