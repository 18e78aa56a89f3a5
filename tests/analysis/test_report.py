"""A report is one valid page that fetches nothing."""

import dataclasses
import html.parser
import re

import pytest
from browser import CHROMIUM, chromium

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
def page(analyzed, tmp_path_factory):
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
    models = [
        sq.Measurement(name="float", accuracy=0.9745, nbytes=2000, p50_ms=0.5),
        sq.Measurement(name="float", accuracy=0.9702),  # two may have one name
        sq.Measurement(name=f"{'deep/' * 30}net.tflite", accuracy=0.9745, nbytes=500, p50_ms=0.25),
    ]
    facts = {"data": "1,000 digits"}
    sq.report(analysis, path, title="A & B", measurements=models, facts=facts)
    return path


@pytest.fixture(scope="module")
def written(page):
    return page.read_text(encoding="utf-8")


def test_the_page_is_valid_and_whole(written, analyzed):
    assert written.lstrip().startswith("<!DOCTYPE html>")
    page = Page(written)
    assert [tag for tag, _ in page.tags[:3]] == ["html", "head", "meta"]
    words = "\n".join(page.words)
    for expected in (
        "A & B",
        "<script>&",
        "1,000 digits",
        "exact",
        "24",
        *analyzed.analysis.tensors,
    ):
        assert expected in words
    assert "once" in words and "never" not in words
    widths = [a["style"] for tag, a in page.tags if tag == "i"]
    shares = [float(width.removeprefix("width:").removesuffix("%")) for width in widths]
    assert shares[:7] == [97.5, 100, 100, 97.0, 97.5, 25, 50]
    assert len(shares) == 7 + 2 * len(analyzed.analysis.layers)
    assert all(0 <= share <= 100 for share in shares) and max(shares[7:]) == 100


def test_models_are_compared_with_the_first(written):
    words = [word for word in Page(written).words if word]
    titles = words.index("accuracy")
    assert words[titles : titles + 3] == ["accuracy", "size", "latency, p50"]
    assert "97.45 %" in words and "-0.43 points" in words and "+0.00 points" not in words
    assert words.index("0.25 times") < words.index("0.50 times")


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
    tags = Page(written).tags
    start = next(n for n, (_, a) in enumerate(tags) if a.get("aria-label") == "range of input")
    assert tags[start + 1][0] == "path"
    band = tags[start + 1][1]["d"]
    assert band == "M0.00,8.00L64.00,0.00L64.00,24.00L0.00,20.00Z"


def test_codes_and_what_is_clipped_are_marked(written, analyzed):
    paths = [a for tag, a in Page(written).tags if tag == "path"]
    tensor = next(iter(analyzed.analysis.tensors.values()))
    assert tensor.name == "input" and tensor.below and tensor.above
    below, above = re.findall(r"M([-\d.]+),24V([\d.]+)h1V24Z", paths[1]["d"])
    assert (paths[1]["class"], below[0], above[0]) == ("outside", "-2", "65")
    total = sum(tensor.counts) / (1 - tensor.clipped)
    most = max(*tensor.counts, total * tensor.below, total * tensor.above)
    for (_, top), share in ((below, tensor.below), (above, tensor.above)):
        assert (24 - float(top)) ** 2 == pytest.approx(24**2 * share * total / most, abs=0.5)
    ticks = [float(x) for x in re.findall(r"M([\d.]+),24v2", paths[2]["d"])]
    assert ticks == pytest.approx([2 + 4 * code for code in range(16)])
    lo, hi = tensor.grid
    zero = float(next(a["x1"] for tag, a in Page(written).tags if tag == "line"))
    assert zero == pytest.approx(2 + 4 * 15 * -lo / (hi - lo), abs=0.01)
    assert min(abs(zero - tick) for tick in ticks) < 0.01, "zero is a code"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [1300, 400])
def test_a_browser_shows_it(browser, page, width):
    browser.open(page, width)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    wide, least, shapes, covered = browser.evaluate(_LOOK)
    assert wide <= width, "nothing to scroll to the side"
    assert least >= 12, "pixels of the smallest letters"
    assert shapes > 10, "drawings with an area"
    assert covered == [], "texts that are wider than their place"


_LOOK = """(() => {
  const all = [...document.body.querySelectorAll("*")];
  const texts = all.filter(e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
  const shown = texts.filter(e => e.getClientRects().length);
  const drawn = [...document.querySelectorAll("svg path, .bar i")].map(
    e => e.getBoundingClientRect());
  return [
    document.documentElement.scrollWidth,
    Math.min(...shown.map(e => parseFloat(getComputedStyle(e).fontSize))),
    drawn.filter(r => r.width > 1 && r.height > 1).length,
    shown.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map(e => e.innerText),
  ];
})()"""


def test_a_browser_prints_it(browser, page):
    browser.open(page, 1300)
    printed = browser.pdf()
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert printed.startswith(b"%PDF") and 1 <= pages <= 4


def test_the_browser_would_tell(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<p style='width: 900px'>x</p><script>console.error('no')</script><img src=n>")
    browser.open(bad, 400)
    assert browser.evaluate("document.documentElement.scrollWidth") > 400
    assert len(browser.complaints()) == 2 and len(browser.requests()) == 2


def test_figures_are_written_besides(analyzed, tmp_path):
    pytest.importorskip("matplotlib")
    sq.report(analyzed.analysis, tmp_path / "a.html", pngs=tmp_path / "figures")
    assert (tmp_path / "figures" / "layers.png").is_file()


def test_what_is_wrong(analyzed, tmp_path):
    with pytest.raises(TypeError, match="analysis must be an Analysis"):
        sq.report({}, tmp_path / "a.html")
    with pytest.raises(TypeError, match="facts must be a dictionary"):
        sq.report(analyzed.analysis, tmp_path / "a.html", facts=[1])
    with pytest.raises(TypeError, match=r"measurements=\[Measurement\(name='float'"):
        sq.report(analyzed.analysis, tmp_path / "a.html", measurements=[{"name": "x"}])
    with pytest.raises(FileNotFoundError, match="no directory"):
        sq.report(analyzed.analysis, tmp_path / "none" / "a.html")
