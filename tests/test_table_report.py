"""What a table of experiments looks like: Markdown, LaTeX, CSV, and the page in a real browser."""

import base64
import csv
import html
import io
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tables import (
    CLASSES,
    FAILED,
    GENERATORS,
    MISSING,
    PARTIAL,
    REASON,
    SEEDS,
    SHORTFALL,
    SPLITS,
    Maker,
    make_table,
    row,
)

from ldm.evaluation.predictions import Predictions
from ldm.experiment.report import write_results
from ldm.experiment.results import Table
from ldm.experiment.statistics import Difference, stars
from ldm.experiment.tables import (
    Results,
    difference_cell,
    digits,
    markdown,
    points,
    status_cell,
    text_tables,
)
from ldm.report.page import Page
from ldm.report.tables import to_latex
from ldm.selection.projection import Points
from ldm.selection.umap_page import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    """A table whose interactive map is a real one."""
    made = make_table(tmp_path_factory.mktemp("table"))
    xy = np.random.default_rng(0).normal(size=(3, 2))
    files = [f"{name}/000000.png" for name in CLASSES]
    groups = [Points("synthetic", range(3), files, xy), Points("centroid", range(3), (), xy)]
    text = render(groups, CLASSES, {"synthetic": made.pools["in_domain"][1]}, 3, "map")
    (made.umap / "umap.html").write_text(text)
    return made


@pytest.fixture(scope="module")
def results(table) -> Results:
    return Results(table)


@pytest.fixture(scope="module")
def written(table) -> Path:
    """Folder with what `write_results` wrote; it holds the sheets and the copy reports, too."""
    out = next(r.samples for r in table.rows if r.samples).parents[1]
    headline = write_results(table, out)
    assert "accuracy on test" in headline and "3 of 15 rows are not complete" in headline
    return out


def small_table(tmp_path: Path, gains: dict[str, float], splits=SPLITS, **values) -> Table:
    maker = Maker(tmp_path, images=90, groups=None)
    rows = []
    for key, gain in gains.items():
        kind = "real" if key == "real" else "synthetic"
        factors = {} if kind == "real" else {"selection": "centroid", "ratio": 50}
        runs = maker.runs(key, gain, SEEDS[:3])
        rows.append(row(key, kind, factors=factors, seeds=3, **runs))
    fields = {"settings": {}, "paper": {}, "umap": None, "record": {}, **values}
    return Table("small", "", rows, "real", list(splits), CLASSES, **fields)


# The three texts


def markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """Cells by heading, as GitHub would split them."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, []).append(cells)
    return found


def test_markdown(table, written):
    text = (written / "table.md").read_text()
    tables = markdown_tables(text)
    assert list(tables) == [
        "All arms, test",
        "All arms, val",
        "Selected against random, test",
        "The synthetic tiles",
    ]
    for cells in tables.values():
        assert {len(line) for line in cells} == {len(cells[0])}
    arms = tables["All arms, test"]
    assert arms[0][:5] == ["trained on", "tiles", "seeds", "accuracy", "Δ accuracy"]
    by_label = {line[0].strip("*"): line for line in arms[2:]}
    assert len(by_label) == len(table.rows) + 1
    real = next(r for r in table.rows if r.key == "real")
    accuracy = [100 * one["test"]["accuracy"] for one in real.summary["per_seed"]]
    shown = f"{np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f}"
    assert by_label["real tiles only"][1:5] == ["45", "4", shown, ""]
    assert by_label["real tiles only"][-1] == "accuracy 70.1"
    assert by_label["best selected − reference"][-1] == "accuracy +6.4"
    assert by_label["from scratch, random 200%"][2:4] == ["0 of 4", "not run"]
    assert by_label["from scratch, centroid 200%"][3].startswith("failed: RuntimeError: CUDA out")
    partial = by_label["from scratch, centroid 100% †"]
    assert partial[2] == "2 of 4" and "[" not in partial[4]  # two seeds: no interval
    assert by_label["pre-trained, centroid 200%"][1].strip("*") == "45 + 83 (of 90)"
    assert re.fullmatch(
        r"\*\*\+\d+\.\d \\\[\+\d+\.\d, \+\d+\.\d\\\] \\\*(\\\*)?\*\*",
        by_label["pre-trained, centroid 200%"][4],
    )
    assert r"\<everything\>" in text and r"tried 2 GiB\_of 1 \<b\>" in text
    assert "Every network was trained for 2,000 updates" in text
    assert "resampled were 30 groups" in text
    fidelity = {line[0]: line for line in tables["The synthetic tiles"][2:]}
    assert fidelity["pre-trained, centroid 100%"][2:6] == ["70", "77.8 ± 2", "0.810", "0.550"]
    # Copies among the chosen tiles, in the pool, and by chance.
    assert [line[6] for line in fidelity.values()][:3] == [
        "9 of 22 (40.9%)",
        "9 of 45 (20.0%)",
        "9 of 90 (10.0%)",
    ]
    of_pool = next(r.copies["flagged"]["all"] for r in table.rows if r.copies)
    share = f"{100 * of_pool['flagged'] / 24:.1f}%"
    assert fidelity["pre-trained, centroid 100%"][7:9] == [share, "5.0%"]
    not_run = fidelity["from scratch, random 200%"]
    assert not_run[2] == not_run[6] == ""
    assert "FID is biased" in text


def test_latex_is_well_formed(table, results):
    text = to_latex(text_tables(results), table.name)
    assert text.count("\\begin{table}") == text.count("\\end{table}") == 4
    bare = re.sub(r"\\[\\{}%&$#_]", "", text)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    for environment in re.findall(r"\\begin{tabular}.*?\\end{tabular}", text, re.S):
        width = len(re.match(r"\\begin{tabular}{([lr]+)}", environment)[1])
        lines = [line for line in environment.splitlines() if line.endswith("\\\\")]
        assert len(lines) > 5
        for line in lines:
            merged = sum(int(n) - 1 for n in re.findall(r"\\multicolumn{(\d+)}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + merged == width
    assert "\\toprule" in text and "GiB\\_of 1 $<$b$>$" in text
    assert "\\textbf{pre-trained, centroid 200\\%}" in text
    assert not re.search("[±−Δ×†…“”]", text)


def test_csv_has_everything_in_full_precision(table, results, written):
    rows = list(csv.DictReader(io.StringIO((written / "table.csv").read_text())))
    assert len(rows) == len(table.rows) * len(SPLITS)
    found = {(r["row"], r["split"]): r for r in rows}
    for of in table.rows:
        for split in SPLITS:
            line = found[of.key, split]
            runs = [Predictions.read(files[split]) for files in of.predictions.values()]
            if not runs:
                assert line["accuracy"] == line["accuracy_std"] == line["delta_accuracy"] == ""
                continue
            accuracy = [np.mean(run.predicted == run.labels) for run in runs]
            assert float(line["accuracy"]) == pytest.approx(np.mean(accuracy), abs=1e-12)
            if len(runs) > 1:
                assert float(line["accuracy_std"]) == pytest.approx(np.std(accuracy, ddof=1))
            else:
                assert line["accuracy_std"] == ""
    line = found[SHORTFALL, "test"]
    assert (line["factor_generator"], line["factor_ratio"]) == ("in_domain", "200")
    assert (line["images"], line["synthetic"], line["wanted"]) == ("128", "83", "90")
    difference = float(line["accuracy"]) - float(found["real", "test"]["accuracy"])
    assert float(line["delta_accuracy"]) == pytest.approx(difference)
    assert float(line["delta_accuracy_low"]) < difference < float(line["delta_accuracy_high"])
    control = found["in_domain-random-200", "test"]
    assert float(line["against_random_accuracy"]) == pytest.approx(
        float(line["accuracy"]) - float(control["accuracy"])
    )
    assert control["against_random_accuracy"] == ""
    assert (line["chosen_copies_flagged"], line["chosen_copies_tiles"]) == ("9", "83")
    assert (found[FAILED, "val"]["chosen_copies_tiles"], line["copies_tiles"]) == ("", "24")
    assert line["compared_groups"] == "30" and line["fidelity_recall"] == "0.55"
    assert found["real", "test"]["paper_accuracy"] == "70.1"
    assert found[FAILED, "val"]["failures"] == REASON
    assert "2 seeds" in found[PARTIAL, "test"]["compared_note"]


def test_stars_are_those_of_the_corrected_p(results):
    by_cell = {difference_cell(d): d for d in results.differences if d.low is not None}
    marked = [d for cell, d in by_cell.items() if cell.endswith("*")]
    assert marked and all(d.p_holm < 0.05 and d.low * d.high > 0 for d in marked)
    assert all(stars(d.p_holm) == "" for cell, d in by_cell.items() if not cell.endswith("*"))
    bare = Difference("reference", "a", "b", "test", "accuracy", mean=-0.0004)
    assert difference_cell(bare) == points(-0.0004) == "0.0"
    assert difference_cell(replace(bare, mean=-0.031, low=-0.05, high=0.01, p_holm=0.2)) == (
        "−3.1 [−5.0, +1.0]"
    )


def test_the_best_arm_is_chosen_on_val(tmp_path):
    """An arm that is chosen by its test accuracy looks better than it is."""
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5, "b": 0.5})
    for split_of_a, split_of_b in (("val", "test"), ("test", "val")):
        for key, split in (("a", split_of_a), ("b", split_of_b)):
            for run in next(r for r in table.rows if r.key == key).summary["per_seed"]:
                run["val"]["accuracy"], run["test"]["accuracy"] = 0.5, 0.5
                run[split]["accuracy"] = 0.9
        assert Results(table, []).best.key == ("a" if split_of_a == "val" else "b")


def test_updates_that_differ_are_said(tmp_path):
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5})
    assert "Every network was trained for 2,000" in markdown(Results(table))
    table.rows[1].summary["updates"] = 6000
    text = markdown(Results(table))
    assert "Updates were NOT matched" in text and "2,000 to 6,000" in text
    # A further network on the real tiles may have its own.
    table.rows[1] = replace(table.rows[1], kind="baseline")
    text = markdown(Results(table))
    assert f"whatever its number of tiles, but “{table.rows[1].label}” for 6,000." in text
    for of in table.rows:
        del of.summary["updates"]
    assert "not recorded" in markdown(Results(table))


def test_arms_on_other_images_are_named_not_compared(tmp_path):
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5})
    path = table.rows[1].predictions[0]["test"]
    run = Predictions.read(path)
    run.paths[0] = "ADI/other.png"
    run.write(path)
    text = markdown(Results(table))
    assert "Not compared: " in text and "other.png" in text
    cells = next(c for c in markdown_tables(text)["All arms, test"] if c[0].strip("*") == "a")
    assert cells[4].strip("*") == ""


def test_one_split_and_no_results_at_all(tmp_path):
    val_only = small_table(tmp_path, {"real": 0.0, "a": 0.5}, splits=("val",))
    assert write_results(val_only, tmp_path / "val").startswith("accuracy on val")
    assert "resampled were single images" in (tmp_path / "val" / "table.md").read_text()
    text = (tmp_path / "val" / "table.md").read_text()
    assert list(markdown_tables(text)) == ["All arms, val"] and "optimistic" in text
    empty = {"images": None, "synthetic": None, "wanted": 9}
    rows = [
        row("real", "real", status="missing", images=None),
        row("a", status="failed", failures=["x"], **empty),
    ]
    empty = replace(val_only, rows=rows, splits=list(SPLITS))
    headline = write_results(empty, tmp_path / "empty")
    assert "no results of the reference real; 2 of 2 rows are not complete" in headline
    assert "failed: x" in (tmp_path / "empty" / "report.html").read_text()
    text = (tmp_path / "empty" / "table.md").read_text()
    assert "not tested: that takes 3 seeds" in text and "(of N)" not in text


@pytest.mark.parametrize(
    "value, count, expected",
    [(3371.4, 3, "3371"), (99.6, 2, "100"), (77.84, 3, "77.8"), (-1200.0, 2, "-1200"),
     (2.0, 2, "2"), (0.00153, 2, "0.0015")],
)  # fmt: skip
def test_numbers_are_written_out(value, count, expected):
    assert digits(value, count) == expected


def test_no_interval_is_spoken_of_where_there_is_none(tmp_path):
    """Two seeds claim nothing, and neither does the head of the page."""
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5})
    write_results(table, tmp_path / "three")
    assert "percent points on test, 95% interval" in (tmp_path / "three/report.html").read_text()
    for of in table.rows:
        del of.predictions[2]
        of.summary["per_seed"].pop()
    write_results(table, tmp_path / "two")
    head = (tmp_path / "two/report.html").read_text().partition("<h2>")[0]
    assert "percent points on test<" in head and "95% interval" not in head


@pytest.mark.parametrize(
    "line, expected",
    [
        ("ViT on a, 50%, seed 1: eval.py: error: no", "failed: seed 1: eval.py: error: no"),
        ("training of g: killed", "failed: training of g: killed"),
    ],
)
def test_a_failed_cell_has_room_for_the_reason(line, expected):
    assert status_cell(row("x", label="a, 50%", status="failed", failures=[line])) == expected


def test_measures_that_failed_and_notes_of_many_arms(tmp_path):
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5, "b": 0.5, "c": 0.5})
    failures = ["fidelity of a: out of memory", "copy check of g: killed"]
    table.rows[1] = replace(table.rows[1], failures=failures)
    for of in table.rows:
        of.summary["notes"] = ["images are resampled"] + ["few LYM"] * (of.key == "b")
    text = markdown(Results(table))
    (line,) = markdown_tables(text)["The synthetic tiles"][2:]
    assert line == ["a", "failed", "failed"]
    assert "- a (done): fidelity of a: out of memory" in text
    assert "- 4 arms: images are resampled" in text and "- b: few LYM" in text


# The page


def test_page_holds_all_sections_and_nothing_unescaped(table, written):
    page = (written / "report.html").read_text()
    heads = [html.unescape(h) for h in re.findall("<h2>(.*?)</h2>", page)]
    assert heads == [
        "Accuracy of every arm, test",
        "All arms, test",
        "Accuracy over synthetic tiles, % of the labelled, test",
        "Accuracy over synthetic tiles, % of the labelled, val",
        "All arms, val",
        "Selected against random, test",
        "The synthetic tiles",
        "Class by class, test",
        "Real and synthetic tiles",
        "From noise to a tile",
        "Guidance",
        "What the selection of “pre-trained, centroid 200%” took and left",
        "Feature space",
        "Copies of training tiles",
        "Training",
        "What failed",
        "How it was made",
    ]
    assert "<everything>" not in page and "&lt;everything&gt;" in page
    assert "<td colspan=6>failed: RuntimeError: CUDA out of memory" in page
    assert "eval.py --data_path D --output_dir train5" in page and "match_steps: 2000" in page
    assert page.count("<img ") == IMAGES
    assert all(words.strip() for words in re.findall('<img [^>]*alt="([^"]*)"', page))
    assert str(written) not in page.replace(str(written / "D"), "")  # but for the settings
    # Accuracy and its changes, two confusion matrices, guidance over time, two models and the
    # classifiers
    charts = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    assert len(charts) == page.count("<svg ") == 3 + 2 + 3 + 3


# 4 labelled tiles and 4 of each pool of 3 classes; 3 time steps of each class; of the selection
# 4 labelled ones, 4 accepted of two classes, 8 rejected; a UMAP, 2 copy reports, a run's samples,
# curves of 2 splits.
IMAGES = 3 * 4 * (1 + len(GENERATORS)) + 3 * 3 + (3 * 4 + 4 + 8) + 1 + 2 + 1 + 2


def test_what_is_behind_the_numbers(results, written):
    """Each fact of the files that commands left is where a reader looks for it."""
    page = html.unescape((written / "report.html").read_text())
    sections = dict(one.split("</h2>", 1) for one in page.split("<h2>")[1:])
    stages = re.findall(r"t (\d+)</div>", sections["From noise to a tile"])
    assert stages == ["700", "80", "9"] * 3
    guidance = sections["Guidance"]
    assert "clean 0.90, t 0-499 0.80, t 500-999 0.40" in guidance and "chance 0.33" in guidance
    selection = sections[f"What the selection of “{results.best.label}” took and left"]
    assert selection.count('class="cell good"') == 4 and selection.count('class="cell bad"') == 8
    assert '<span class="soft">none</span>' in selection and "No tile of LYM was acc" in selection
    before, after = (results.class_means(r, "LYM")[1] for r in (results.reference, results.best))
    assert f"LYM {100 * before:.1f} to {100 * after:.1f}." in selection
    training = sections["Training"]
    for words in ("A diffusion model:", "A noise classifier:", "accuracy, all noise levels"):
        assert words in training
    made = sections["How it was made"]
    assert "<td>training of the classifiers</td><td class=n>1</td><td class=n>1.2 min" in made


def test_sections_appear_where_their_data_are_there(tmp_path):
    table = small_table(tmp_path, {"real": 0.0, "a": 0.5})
    write_results(table, tmp_path / "out")
    heads = re.findall("<h2>(.*?)</h2>", (tmp_path / "out" / "report.html").read_text())
    assert not {"Guidance", "Training", "From noise to a tile", "Feature space"} & set(heads)
    assert "Class by class, test" in heads


def test_the_page_begins_with_question_and_answer(results, written):
    best, page = results.best, html.unescape((written / "report.html").read_text())
    found = results.difference(best, "test", "accuracy")
    question, answer = results.question_and_answer()
    before = page[: page.index("<h2>")]
    assert question.endswith("?") and question in before and answer in before
    assert answer.startswith("Yes") and found.p_holm < 0.05
    for fact in (best.label, "real tiles only", points(found.low), points(found.high)):
        assert fact in answer


@pytest.mark.parametrize(
    "values, verdict",
    [
        ({"low": -0.02, "high": 0.03, "p_holm": 0.6}, "Not shown"),
        ({"low": 0.01, "high": 0.03, "p_holm": 0.2}, "Perhaps"),
        ({"low": 0.01, "high": 0.03, "p_holm": 0.001}, "Yes"),
        ({"low": -0.03, "high": -0.01, "p_holm": 0.001}, "No"),
        ({"note": "2 seeds"}, "Not tested"),
    ],
)
def test_the_answer_claims_what_the_interval_shows(tmp_path, values, verdict):
    table = small_table(tmp_path, {"real": 0.0, "a": 0.1})
    found = Difference("reference", "a", "real", "test", "accuracy", mean=0.01, **values)
    assert re.match(rf"{verdict}\b", Results(table, [found]).question_and_answer()[1])


def test_classes_have_their_own_results(results, written):
    """The means over seeds of each class, of the reference and of the best arm."""
    page = (written / "report.html").read_text()
    cells = re.search(r"<tr><td>LYM</td>(.*?)</tr>", page[page.index("Class by class") :])[1]
    shown = [text.replace("−", "-") for text in re.findall("<td[^>]*>(.*?)</td>", cells)]
    rows = [results.reference, results.best]
    f1 = [np.mean([run["per_class"]["LYM"]["f1"] for run in results.runs(r, "test")]) for r in rows]
    assert [float(shown[i]) for i in (1, 3)] == pytest.approx([100 * v for v in f1], abs=0.051)
    assert float(shown[5]) == pytest.approx(100 * (f1[1] - f1[0]), abs=0.051)


def test_page_asks_for_no_other_file(written):
    page = (written / "report.html").read_text()
    links = re.findall(r'<a href="([^"]+)"', page)
    assert "table.csv" in links and all((written / link).exists() for link in links)
    page = re.sub(r"<a href=.*?>", "", page)  # followed by the reader alone
    page = re.sub('<iframe [^>]*srcdoc="[^"]*">', "", page)  # the map, see the browser test
    addresses = re.findall(r"""(?:src|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert addresses and all(a.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
                             for a in addresses)  # fmt: skip
    # Markers of charts refer to other parts of the page.
    inner = r"url\(#|xlink:href=\"#|http://www.w3.org"
    assert not re.search(
        r"<link|<script|<iframe|@import|url\(|href|https?:", re.sub(inner, "", page)
    )
    for address in addresses:
        with Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) as image:
            image.load()
            assert min(image.size) > 10


# No request leaves the browser: the policy stops it, and says which one it was.
POLICY = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"><script>
const requests = [];
document.addEventListener("securitypolicyviolation", e => requests.push(e.blockedURI));
</script>"""
PROBE = """<script>
document.querySelectorAll("details").forEach(d => d.open = true);
document.querySelectorAll("iframe").forEach(f => f.loading = "eager");
window.addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll"));
  const images = [...document.images];
  parent.postMessage(JSON.stringify({
    width: innerWidth, page: document.documentElement.scrollWidth,
    wide: wide.map(e => e.tagName).slice(0, 5), images: images.length, requests,
    maps: [...document.querySelectorAll("iframe")].map(
      f => f.contentDocument.getElementById("plot").childElementCount),
    broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    small: [...document.querySelectorAll("svg")].filter(s => s.clientWidth < 200).length,
  }), "*");
}, 2000));
</script></body>"""
# A window is at least 500 px wide; a frame may be as narrow as a telephone.
FRAME = """<!doctype html><pre id="finding"></pre><script>
addEventListener("message", e => document.getElementById("finding").textContent = btoa(e.data));
</script><iframe src="page.html" style="border: 0; width: {width}px; height: 1500px"></iframe>"""


def browse(page: str, folder: Path, width: int) -> tuple[dict, list[str]]:
    """What a browser finds in a page that is shown `width` wide, and the errors of its console."""
    page = page.replace("<head>", "<head>" + POLICY, 1).replace("</body>", PROBE)
    (folder / "page.html").write_text(page)
    (folder / "frame.html").write_text(FRAME.format(width=width))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    arguments += ["--disable-extensions", "--no-first-run", "--disable-background-networking"]
    arguments += [f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1600"]
    arguments += ["--virtual-time-budget=5000", "--dump-dom"]
    arguments.append((folder / "frame.html").absolute().as_uri())
    done = subprocess.run([BROWSER, *arguments], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="finding">(.+?)</pre>', done.stdout)
    assert found, f"the browser showed no page: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    console = [line for line in console if '"[bokeh ' not in line]  # which says that it is there
    return json.loads(base64.b64decode(found[1])), console


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(written, tmp_path, width):
    finding, console = browse((written / "report.html").read_text(), tmp_path, width)
    assert finding["width"] == width
    assert finding["page"] <= width and finding["wide"] == [], "the page scrolls sideways"
    assert finding["images"] == IMAGES and finding["broken"] == 0
    assert finding["maps"] == [1], "the interactive map is empty"
    assert finding["small"] == 0, "charts are too small to read"
    assert finding["requests"] == [] and console == []


@needs_browser
def test_what_the_browser_test_would_catch(tmp_path):
    """A page with one of each fault: too wide, broken picture, request, error."""
    page = Page("faults")
    page.charts(
        [
            '<div style="width: 900px">wide</div><img src="http://a.invalid/b.png">',
            '<img src="data:image/png;base64,AAAA"><script>undefined_name()</script>',
        ]
    )
    finding, console = browse(page.render(), tmp_path, 390)
    assert finding["page"] > 390 and "DIV" in finding["wide"]
    assert finding["images"] == 2 and finding["broken"] == 2
    assert any("a.invalid" in name for name in finding["requests"])
    assert any("undefined_name" in line for line in console)


def test_tables_are_rectangular_and_finite(results):
    for one in text_tables(results):
        assert all(len(line) == len(one.heads) for line in one.rows), one.name
        assert not any(str(math.nan) in cell for line in one.rows for cell in line)
    assert {MISSING, FAILED} <= {r.key for r in results.table.rows}
