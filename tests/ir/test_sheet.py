"""Tables that fit their width."""

import pytest

from simqat_jax.ir.sheet import Line, Sheet, some
from simqat_jax.ir.table import Column

COLUMNS = (Column("layer", "path"), Column("what", "words"), Column("bits"))
LINES = (
    Line(("encoder/layers_0/attention/query", "a dense layer of 64 features", "8"), ("all of it",)),
    Line(("encoder/cumsum", "cumsum", "float32"), is_float=True),
    Line(("<head>", "a & b", ""), ("a < b",)),
)
SHEET = Sheet(("Head.",), COLUMNS, LINES, ("Foot " * 30,))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_line_is_wider(width):
    long = Line(("a/" * 60 + "b", "c", "8"), ("d" * 130,))
    sheet = Sheet(("Head.",), COLUMNS, (*LINES, long), ("Foot " * 30, "e" * 130))
    for text in (sheet.text(width), sheet.details(sheet.lines, width), sheet.whole(width)):
        assert max(map(len, text.splitlines())) <= width
    assert "e" * 130 in "".join(line.strip() for line in sheet.text(width).splitlines())
    assert SHEET.text(width).startswith("Head.\nlayer")


def test_a_table_for_notebooks():
    text = SHEET.html()
    assert text.count("<table>") == 2 and "<b>encoder</b> (2 operations, 1 float)" in text
    assert text.count("rgba(") == 1  # the float one alone is in colour
    assert "&lt;head&gt;" in text and "a &amp; b" in text and "<head>" not in text
    assert "<details><summary>encoder/layers_0/attention/query</summary>all of it" in text


def test_long_lists_are_cut():
    assert some(["a", "b"]) == "a, b"
    assert some([str(i) for i in range(10)], 2) == "0, 1 and 8 more"
