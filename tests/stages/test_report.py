"""Reports are self-contained, escape their text, and their figures have the colors of the page."""

import re
from html.parser import HTMLParser

import pytest

from nanohybrid.stages import Report, plots
from nanohybrid.stages.report import GRID, INK, format_value

FIGURES = {
    "lines": lambda: plots.lines(
        {"bf16": [(1, 2.0), (10, 1.0)], "fp8": [(1, 2.1), (10, 1.1)]}, "step", "loss", log_x=True
    ),
    "intervals": lambda: plots.intervals(
        {"parent": [(0, 0.2, 0.1, 0.3), (48, 0.8, 0.7, 0.9)]}, "budget", "accuracy"
    ),
    "bars": lambda: plots.bars(
        ["parent", "pruned"],
        {"thinking": [0.8, 0.3]},
        "accuracy",
        errors={"thinking": [(0.1, 0.1), (0.05, 0.1)]},
    ),
    "strip": lambda: plots.strip({"hybrid": "M-M*-M-", "transformer": "*-*-*-"}),
    "by_layer": lambda: plots.by_layer("M-M*-", [4.0, 1.0, 0.3, 0.5, 0.2], "change of the logits"),
}


class Wellformed(HTMLParser):
    """Fails for a closing tag without an opening one; collects all addresses and ids of the page."""

    VOID = ("meta", "br", "use", "path", "rect")

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href"):
                self.addresses.append(value)
            if key == "id":
                self.ids.add(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", FIGURES)
def test_report_figure_has_no_external_reference_and_the_colors_of_the_page(name):
    page = Report("figures").figure(FIGURES[name](), f"A {name} figure.").html()
    parser = Wellformed()
    parser.feed(page)
    assert parser.open == [] and "http" not in page and "url(" not in page.replace("url(#", "")
    assert all(address.startswith("#") and address[1:] in parser.ids for address in parser.addresses)
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--ink)" in svg and INK not in svg and GRID not in svg
    assert set(re.findall(r"url\(#(\w+)\)", svg)) <= parser.ids


def test_report_figures_have_distinct_clip_paths():
    report = Report("two figures")
    for name in ("lines", "intervals"):
        report.figure(FIGURES[name](), name)
    clips = re.findall(r'<clipPath id="(\w+)"', report.html())
    assert len(clips) == len(set(clips)) == 2


def test_report_is_deterministic():
    assert (
        Report("a").figure(FIGURES["bars"](), "b").html() == Report("a").figure(FIGURES["bars"](), "b").html()
    )


@pytest.mark.parametrize("layers, written", [(14, True), (62, False)])
def test_bars_write_out_their_heights_up_to_14_bars(layers, written):
    pictures = (
        plots.by_layer("M-" * (layers // 2), [0.25] * layers, "1 - cosine"),
        plots.bars(["a"] * layers, {"b": [0.25] * layers}, "share"),
    )
    assert [len(picture.axes[0].texts) for picture in pictures] == [layers * written] * 2


def test_logarithmic_axes_have_plain_numbers_as_ticks():
    axes = plots.lines(
        {"a": [(10_000, 0.03), (60_000, 0.2)], "b": [(20_000, 0.1)]}, "tokens", "nats", log_y=True
    ).axes[0]
    assert (
        axes.yaxis.get_major_formatter()(0.06, 0) == "0.06"
        and axes.xaxis.get_major_formatter()(10_000.0, 0) == "10,000"
    )
    assert {0.04, 0.06, 0.1} <= {round(float(tick), 3) for tick in axes.get_yticks()}


def test_layer_strip_numbers_layers_from_0():
    axes = plots.strip({"hybrid": "M-M*-M-"}).axes[0]
    assert axes.get_xlim() == (-0.6, 6.6) and all(float(tick).is_integer() for tick in axes.get_xticks())


def test_report_escapes_text():
    report = Report("<script>alert(1)</script>")
    report.section("a & b").text("one **bold** `x<y`\n\ntwo").table(["<th>"], [["<td>"], [1.23456]]).code(
        "<pre>"
    )
    page = report.html()
    body = page[page.index("<body") :]
    assert (
        "<script" not in page
        and "<th>&lt;th&gt;</th>" in body
        and "&lt;td&gt;" in body
        and "&lt;pre&gt;" in body
    )
    assert "<strong>bold</strong>" in body and "<code>x&lt;y</code>" in body and body.count("<p>") == 2


def test_report_aligns_columns_of_numbers_to_the_right(tmp_path):
    path = (
        Report("numbers")
        .table(["what", "tokens"], [("a", 12345), ("b", 0.123456)])
        .write(tmp_path / "r.html")
    )
    page = path.read_text()
    assert '<th class="number">tokens</th>' in page and "12,345" in page and "0.1235" in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_format_value_of_numbers_and_booleans():
    spelled = {
        10_123.4: "10,123",
        8929.4: "8,929",
        -123_456.0: "-123,456",
        0.04412: "0.04412",
        1e-9: "1e-09",
        1e20: "1e+20",
        12: "12",
    }
    assert {value: format_value(value) for value in spelled} == spelled
    assert (format_value(True), format_value(float("inf")), format_value("x")) == ("yes", "inf", "x")
