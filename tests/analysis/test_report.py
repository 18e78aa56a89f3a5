"""A report is one valid page that fetches nothing."""

import dataclasses
import html.parser
import re

import pytest

import simqat_jax as sq
from simqat_jax.analysis.result import RangeAt

pytest.importorskip("jinja2")
VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order; collects what the page says and refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def written(analyzed, tmp_path_factory):
    """A report of an analysis in which everything occurs that may."""
    path = tmp_path_factory.mktemp("report") / "analysis.html"
    odd = dataclasses.replace(
        analyzed.analysis.layers[0], name="<script>&", alone_quantized=float("inf"), gain=-1.0
    )
    analysis = dataclasses.replace(
        analyzed.analysis,
        layers=(odd, *analyzed.analysis.layers[1:]),
        ranges={
            "input": (RangeAt(0, -1.0, 2.0), RangeAt(10, -2.0, 4.0)),
            "once": (RangeAt(5, 0.0, 0.0),),
            "never": (),
        },
    )
    sq.report(analysis, path, title="A & B", facts={"accuracy, float": "99.1 %"})
    return path.read_text(encoding="utf-8")


def test_the_page_is_valid_and_whole(written, analyzed):
    assert written.lstrip().startswith("<!DOCTYPE html>")
    page = Page(written)
    assert [tag for tag, _ in page.tags[:3]] == ["html", "head", "meta"]
    words = "\n".join(page.words)
    for expected in ("A & B", "<script>&", "99.1 %", "exact", "24", *analyzed.analysis.tensors):
        assert expected in words
    assert "once" in words and "never" not in words
    widths = [a["style"] for tag, a in page.tags if tag == "i"]
    shares = [float(width.removeprefix("width:").removesuffix("%")) for width in widths]
    assert len(shares) == 2 * len(analyzed.analysis.layers)
    assert all(0 <= share <= 100 for share in shares) and max(shares) == 100


def test_the_page_fetches_nothing(written):
    page = Page(written)
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "data"} & a.keys()]
    assert not re.search(r"https?:|//|url\(|@import", written)


def test_histograms_have_the_shape_of_counts(written, analyzed):
    drawn = [a["d"] for tag, a in Page(written).tags if tag == "path"]
    tensor = next(iter(analyzed.analysis.tensors.values()))
    tops = [float(y) for y in re.findall(r"V([\d.]+)h1", drawn[0])]
    heights = [(24 - top) ** 2 for top in tops]
    most = max(tensor.counts)
    assert heights == pytest.approx([24**2 * c / most for c in tensor.counts], abs=0.5)


def test_a_range_is_drawn_over_its_steps(written, analyzed):
    paths = [a["d"] for tag, a in Page(written).tags if tag == "path"]
    band = paths[len(analyzed.analysis.tensors)]
    assert band == "M0.00,8.00L64.00,0.00L64.00,24.00L0.00,20.00Z"


def test_what_is_wrong(analyzed, tmp_path):
    with pytest.raises(TypeError, match="analysis must be an Analysis"):
        sq.report({}, tmp_path / "a.html")
    with pytest.raises(TypeError, match="facts must be a dictionary"):
        sq.report(analyzed.analysis, tmp_path / "a.html", facts=[1])
    with pytest.raises(FileNotFoundError, match="no directory"):
        sq.report(analyzed.analysis, tmp_path / "none" / "a.html")
