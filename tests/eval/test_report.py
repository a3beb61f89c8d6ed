import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ldm_jax.errors import InputError
from ldm_jax.eval.report import Curve, Table, curve_svg, write_report

VOID = {"meta", "img"}
GRID = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


class Page(HTMLParser):
    """Elements and text of a page; fails where a tag is not closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def text(tmp_path):
    write_report(
        tmp_path / "report.html",
        title="<Digits> & co",
        summary='a "summary"',
        figures=[
            ("PSNR", 35.43219, "at least 34 < 35"),
            ("parameters", 1_234_567, ""),
            ("accuracy", "<i>97 %</i>", ""),
        ],
        tables=[
            Table("arms & <seeds>", ("arm", "FID <k>", "why"), [("a<b", "3.5 ± 0.1", "5 <of> 4")]),
            ("none", ("arm", "FID"), []),
        ],
        commands=["ldm demo --workdir='a<b'", "ldm evaluate"],
        timings={"autoencoder": 150.0, "denoiser": 49.5, "<other>": 0.5},
        images=[("ten & more", GRID)],
        curves=[("loss", {"train": ([0, 1, 2], [3.0, 2.0, 1.0])}, True)],
    )
    return (tmp_path / "report.html").read_text("utf-8")


def test_page_is_well_formed_and_its_text_escaped(text):
    page = Page(text)
    words = "".join(page.texts)
    for part in (
        "<Digits> & co",
        'a "summary"',
        "at least 34 < 35",
        "--workdir='a<b'",
        "<other>",
        "<i>97 %</i>",
        "arms & <seeds>",
        "FID <k>",
        "a<b",
        "5 <of> 4",
    ):
        assert part in words
    assert {"digits", "other", "seeds", "k", "of"}.isdisjoint(tag for tag, _ in page.tags)


def test_page_needs_nothing_from_outside(text):
    for tag, attributes in Page(text).tags:
        assert tag not in {"script", "link", "iframe", "object"}
        assert "href" not in attributes
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in text and "@import" not in text and "http" not in text


def test_page_holds_the_images_pixel_for_pixel(text):
    (image,) = (a for tag, a in Page(text).tags if tag == "img")
    data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), GRID)
    assert "image-rendering: pixelated" in text
    assert image["alt"] == "ten & more"


def test_numbers_and_shares_are_readable(text):
    words = Page(text).texts
    for part in ("35.43", "1,234,567", "2 min 30 s", "49.5 s", "75.0 %", "3 min 20 s"):
        assert part in words


def test_page_adapts_to_dark_screens_and_narrow_ones(text):
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_tables_are_sections_behind_the_figures(text):
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:4] == ["Figures", "arms &amp; &lt;seeds&gt;", "none", "Images"]


def test_columns_of_numbers_stand_to_the_right(tmp_path):
    rows = [("1", "-2.5 dB", "7 of 9"), ("2", "", "none")]
    write_report(tmp_path / "report.html", title="t", tables=[("t", ("i", "a", "b"), rows)])
    page = Page((tmp_path / "report.html").read_text())
    cells = [(tag, a.get("class", "")) for tag, a in page.tags if tag in ("th", "td")]
    row = [("th", ""), ("td", "value"), ("td", "")]
    assert cells == [("th", ""), ("th", "value"), ("th", ""), *row, *row]


def test_empty_parts_are_left_out(tmp_path):
    write_report(tmp_path / "report.html", title="bare")
    assert "<section>" not in (tmp_path / "report.html").read_text()
    write_report(tmp_path / "report.html", title="bare", figures=[("a", "b", "c")])
    assert re.findall("<h2>(.*?)</h2>", (tmp_path / "report.html").read_text()) == ["Figures"]


def test_bad_image_leaves_the_old_report(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(InputError, match="uint8"):
        write_report(path, title="new", figures=[], images=[("grey", GRID[..., 0])])
    assert path.read_text() == "old"


def points(svg, kind="line"):
    """The corners of the paths of one class, [N,2] each."""
    paths = [p.get("d") for p in ET.fromstring(svg).iter("path") if p.get("class") == kind]
    return [np.array(re.findall(r"(-?[\d.]+) (-?[\d.]+)", d), float) for d in paths]


def ticks(svg, anchor):
    """(value, place) of the labelled ticks: y for anchor "end", x for "middle"."""
    place = "y" if anchor == "end" else "x"
    return [
        (float(t.text.replace("k", "e3")), float(t.get(place)) - (4 if place == "y" else 0))
        for t in ET.fromstring(svg).iter("text")
        if t.get("text-anchor") == anchor and re.fullmatch(r"[-\d.ek]+", t.text)
    ]


@pytest.mark.parametrize("log", [False, True])
def test_curve_passes_through_its_points_on_the_scale_of_the_ticks(log):
    x, y = np.array([0.0, 400, 1000]), np.array([0.02, 0.5, 0.1])
    svg = curve_svg(Curve("c", {"a": (x, y)}, log))
    (line,) = points(svg)
    f = np.log10 if log else np.asarray
    for column, values, anchor, scale in ((0, x, "middle", np.asarray), (1, y, "end", f)):
        at, place = np.array(ticks(svg, anchor)).T
        slope, start = np.polyfit(scale(at), place, 1)
        np.testing.assert_allclose(line[:, column], slope * scale(values) + start, atol=0.2)
        if column:
            assert slope < 0 and min(at) <= y.min() and max(at) >= y.max()


def test_long_curve_is_drawn_as_means_over_a_band():
    y = np.tile([1.0, 3.0], 4500)
    svg = curve_svg(Curve("c", {"a": (np.arange(9000), y)}))
    (line,), (band,) = points(svg), points(svg, "band")
    at, place = np.array(ticks(svg, "end")).T
    assert at[0] <= 1 and at[-1] >= 3
    heights = np.interp([1, 2, 3], at, place)
    assert len(line) <= 300
    np.testing.assert_allclose(line[:, 1], heights[1], atol=0.2)
    assert {round(v) for v in band[:, 1]} == {round(heights[0]), round(heights[2])}


@pytest.mark.parametrize(
    ("ys", "log"),
    [
        ([np.nan, 1.0, np.inf], False),
        ([0.0, 1.0, -1.0], True),
        ([1000.0] * 3, True),
        ([0.0] * 3, False),
    ],
    ids=["not finite", "not positive", "constant log", "zeros"],
)
def test_awkward_values_give_finite_drawings(ys, log):
    svg = curve_svg(Curve("c", {"a": ([0, 1, 2], ys)}, log))
    assert "nan" not in svg and "inf" not in svg
    assert len(points(svg)) == 1


def test_curve_without_points_says_so():
    assert "no data" in curve_svg(Curve("c", {"a": ([], [])}))
    assert "no data" in curve_svg(Curve("c", {"a": ([1], [-1.0])}, True))
