"""Pages, tables, plots and grids that know nothing of what they show."""

import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from ldm.report import plots
from ldm.report.grids import Card, Tile, TileRow, card_sheet, thumbnail
from ldm.report.page import Page, embeddable
from ldm.report.plots import Estimate, Level, Series
from ldm.report.tables import TextTable, escape_latex, to_latex, to_markdown

# Tables


@pytest.mark.parametrize(
    "text, expected",
    [
        ("50% & more", "50\\% \\& more"),
        ("a_b {c} #1 $2", "a\\_b \\{c\\} \\#1 \\$2"),
        ("C:\\x ~ ^", "C:\\textbackslash{}x \\textasciitilde{} \\textasciicircum{}"),
        ("−3.1 [−4.0, +2.0] **", "$-$3.1 [$-$4.0, +2.0] $^{*}$$^{*}$"),
        ("[start", "{}[start"),
    ],
)
def test_latex_escapes(text, expected):
    assert escape_latex(text) == expected


TABLE = TextTable(
    "A & B",
    ["arm", "n", "n", "why", ""],
    [["<a>", "1", "2", "3", "4"], ["b|c", "5", "", "killed: {x}", "6"]],
    ["One sentence."],
    numbers={1, 2, 3},
    kinds=["best", ""],
    breaks={1},
    name="x_y",
)
FAILED = TextTable("F", TABLE.heads, [["a", "0", "", "killed", ""]], [], {1, 2}, ["failed"])


def test_one_table_in_three_languages():
    lines = to_markdown(TABLE).splitlines()
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:3]] == [r"**\<a\>**", "**1**"]
    assert lines[1].split("|")[2].endswith(":") and r"b\|c" in lines[3]
    text = to_latex([TABLE], "doc")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert rows[1] == r"\textbf{$<$a$>$} & \textbf{1} & \textbf{2} & \textbf{3} & \textbf{4} \\"
    assert rows[2] == r"b\textbar{}c & 5 &  & killed: \{x\} & 6 \\"
    assert r"\caption{A \& B. One sentence.}" in text and r"\label{tab:doc-x-y}" in text
    assert text.count("\\midrule") == 2 and r"\begin{tabular}{lrrrl}" in text
    page = Page("t", wide=True)
    page.table(TABLE, wide=True)
    html = page.render()
    assert '<tr class="best"><td>&lt;a&gt;</td><td class=n>1</td>' in html
    assert '<tr class="part"><td>b|c</td>' in html and "<main class=wide>" in html


def test_the_reason_of_a_failed_row_spans_columns():
    page = Page("t")
    page.table(FAILED)
    assert '<tr class="failed">' in page.render() and "<td colspan=1" not in page.render()
    wide = TextTable("F", ["a", "n", "p", "q", "r", "s"],
                     [["x", "0", "", "why", "", "z"]], [], {1}, ["failed"])  # fmt: skip
    page.table(wide)
    assert "<td colspan=2>why</td>" in page.render()
    assert r"x & 0 &  & \multicolumn{2}{l}{why} & z \\" in to_latex([wide], "d")


# Pages


def test_page_escapes_and_embeds():
    page = Page("A <b>")
    page.answer("Is it <x>?", "No.")
    page.heading("h & h")
    page.bullets(["<li>"])
    page.links([("a b/c.csv", "<numbers>")])
    page.folded("commands", "python x.py\n\n<y>")
    tile = np.full((4, 4, 3), 255, np.uint8)
    page.grid([TileRow("<class>", [[Tile(tile, "1\n2", "good")], []])], ["one", "two"], "c", 32)
    page.frame("map", '<script src="a">"</script>')
    page.charts([plots.bar_chart("<svg>", ["k"], [0.5], Level("chance", 0.1))])
    text = page.render()
    assert 'srcdoc="&lt;script src=&#34;a&#34;&gt;&#34;&lt;/script&gt;"' in text
    for word in ("<script", "<b>", "<x>", "<li><li>", "<numbers>", "<y>", "<class>", "<svg>"):
        assert word not in text
    assert 'href="a%20b/c.csv"' in text and '<div class="cell good">' in text
    assert (
        text.count('<img src="data:image/png;base64,') == 1 and 'alt="&lt;class&gt;, one 1"' in text
    )


def test_big_pictures_are_made_smaller_for_the_page(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 2000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "big.png")
    Image.fromarray(pixels[:50, :50]).save(tmp_path / "small.png")
    data = embeddable(tmp_path / "big.png", width=800)
    assert len(data) < (tmp_path / "big.png").stat().st_size / 8
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (800, 360)
    assert embeddable(tmp_path / "small.png") == (tmp_path / "small.png").read_bytes()
    assert thumbnail(pixels, 100).shape == (45, 100, 3)


def test_a_sheet_of_cards():
    red, blue = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    rows = [("heading", [Card([red, blue], ["a", "b"], (1, 2, 3))] * 2), ("", [Card([red])])]
    sheet = Image.open(io.BytesIO(card_sheet(["title"], rows, 20, 1)))
    assert sheet.width >= 4 * 20
    counts = {colour: count for count, colour in sheet.getcolors(2**24)}
    assert counts[255, 0, 0] == 3 * 400 and counts[0, 0, 255] == 2 * 400 and (1, 2, 3) in counts


# Plots


def test_charts_follow_the_colours_of_the_page_and_describe_themselves():
    first = Series("<a>", [50, 100], [70.0, 80.0], [2.0, None])
    second = Series("b", [50], [60.0], [5.0])
    chart = plots.line_chart("t", [first, second], "x")
    assert "&lt;a&gt;" in chart and "<a>" not in chart
    assert "70 at 50" in chart
    assert "var(--mark)" in chart and "var(--second)" in chart
    assert not re.search("#[0-9a-f]{6}\\b", chart), "a colour that the dark page would not change"
    assert chart == plots.line_chart("t", [first, second], "x")
    ids = re.findall(' id="([^"]+)"', chart)
    assert ids and all(f"#{name}" in chart for name in ids)
    level = Level("real", 65.0, 5.0)
    picture = plots.curves_picture("t", [first, second], "x", "y", level)
    assert Image.open(io.BytesIO(picture)).width == 9 * 150
    assert picture != plots.curves_picture("t", [first, second], "x", "y")


def test_points_are_to_scale():
    """Equal steps of the values are equal steps on the page."""
    chart = plots.line_chart("t", [Series("a", [1, 2, 4], [0.0, 10.0, 30.0], [None] * 3)], "x")
    line = re.search(r'd="(M[^"]*L[^"]*L[^"]*)"[^>]*stroke: var\(--mark\)', chart)[1]
    x, y = np.array(re.findall(r"[ML] ([\d.]+) ([\d.]+)", line), dtype=float).T
    assert x[2] - x[0] == pytest.approx(3 * (x[1] - x[0]), rel=1e-4)
    assert y[2] - y[0] == pytest.approx(3 * (y[1] - y[0]), rel=1e-4) and y[2] < y[0]


def test_values_that_are_not_finite_are_left_out():
    chart = plots.line_chart("l", [Series("s", [0, 1, 2], [1.0, math.nan, 3.0])], "x")
    assert "nan" not in chart
    assert "no values" in plots.line_chart("none", [Series("s", [], [])], "x")


def test_estimates_say_their_intervals():
    found = [Estimate("a", 3.0, 1.0, 5.0, [2.0, 4.0]), Estimate("b", -1.0)]
    chart = plots.estimate_chart("Change", found, "points", Level("real", 0))
    assert "a +3.0 (+1.0 to +5.0); b -1.0" in chart
    assert "a 3.0 (1.0 to 5.0)" in plots.estimate_chart("A", found, "percent", Level("real", 2))
    long = [Estimate("variations of the labelled tiles, random", 1.0)]
    shown = plots.estimate_chart("A", long, "percent", Level("real", 2)).partition(">")[2]
    assert all(word in shown for word in long[0].name.split()), "arms differ at their ends"


def test_lines_of_one_name_have_one_colour_and_all_are_in_the_picture():
    series = [Series("a", [0, 1], [1, 1]), Series("a", [0, 1], [2, 2]), Series("b", [0, 1], [9, 9])]
    chart = plots.line_chart("t", series, "x")
    assert chart.count(">a</text>") == 1 and ">8</text>" in chart  # a tick near the last line


def test_confusion_shows_percent_and_counts_of_rows():
    names = ["ADI", "a_long_name_of_a_class", "L"]
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 0, 2]])
    chart = plots.confusion_chart("m", counts, names)
    found = re.findall(r">(\d+%?)</", chart)
    assert found == ["75%", "3", "25%", "1", "100%", "2"]
    shares = [float(found) for found in re.findall(r"opacity: ([\d.]+)", chart)]
    # Opaque is not written.
    assert shares == pytest.approx([0.05 + 0.95 * v for v in (0.75, 0.25, *[0] * 6)])
    assert "ADI 3 of 4 right" in chart and all(name in chart for name in names)


def test_histograms_are_shares_of_their_own_set():
    axes = plots.new_figure(3, 2).add_subplot()
    sides = [("few", np.array([0.0, 1.0]), "C0"), ("many", np.linspace(0, 1, 50), "C1")]
    plots.draw_histogram(axes, sides, "distance", bins=4)
    plots.mark_threshold(axes, 0.5, "flagged")
    assert [text.get_text() for text in axes.texts] == ["flagged  "]
    tops = [patch.get_xy()[:, 1].max() for patch in axes.patches]
    assert tops[0] == pytest.approx(50) and tops[1] < 30
