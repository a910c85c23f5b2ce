"""table.md, table.tex, table.csv and report.html of an experiment.

report.html holds its pictures and loads nothing, so that it can be mailed, archived and printed;
links at its top lead to further files beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import yaml

from ldm.data.images import list_images, read_tile
from ldm.experiment.results import Row, Table
from ldm.experiment.statistics import METRICS
from ldm.experiment.tables import (
    Results,
    copies_numbers,
    csv_rows,
    difference_cell,
    failures,
    markdown,
    percent,
    plus_minus,
    points,
    shortened,
    text_tables,
    word,
)
from ldm.files import write_bytes, write_csv, write_text
from ldm.report.grids import Tile, TileRow, thumbnail
from ldm.report.page import Page, embeddable
from ldm.report.plots import (
    SERIES,
    Estimate,
    Level,
    Series,
    bounds,
    confusion_chart,
    curves_picture,
    estimate_chart,
    series_chart,
)
from ldm.report.tables import MINUS, TextTable, to_latex

SIDE = 64  # pixels of a tile on the screen
SOURCE = 96  # pixels of a tile in the page, at most
TILES = 4  # per class and generator
GROUPS = 3  # generators side by side
TITLE = 52  # letters above a chart


def write_results(
    table: Table,
    out: Path,
    add_models: Callable[[Page], None] | None = None,
    about: str = "",
    caution: str = "",
) -> str:
    """Write OUT/table.md, table.tex, table.csv and report.html; returns the headline.

    Args:
        add_models: Adds sections on the models behind the synthetic tiles to the page.
        about: What was done, in a few sentences.
        caution: What the reader must not conclude.
    """
    results = Results(table)
    write_text(out / "table.md", markdown(results))
    write_text(out / "table.tex", to_latex(text_tables(results), table.name))
    rows = list(csv_rows(results))
    write_csv(out / "table.csv", rows, list(dict.fromkeys(name for row in rows for name in row)))
    page = Page(table.title or table.name, wide=True)
    _opening(page, results, out, about, caution)
    first, *rest = text_tables(results)
    _arms(page, results)
    _table(page, first)
    _label_curves(page, results, out)
    _curves(page, results)
    for one in rest:
        _table(page, one)
    _confusion(page, results)
    if add_models is not None:
        add_models(page)
    _samples(page, results)
    _selection(page, results, out)
    _umap(page, results, out)
    _copies(page, results, out)
    _failed(page, results)
    _record(page, results)
    write_text(out / "report.html", page.render())
    return results.headline()


def _opening(page: Page, results: Results, out: Path, about: str, caution: str) -> None:
    table, split = results.table, results.reported
    page.answer(*results.question_and_answer())
    if about:
        page.text(about)
    done = sum(row.status == "done" for row in table.rows)
    if done < len(table.rows):
        page.warning(
            f"{len(table.rows) - done} of {len(table.rows)} rows are not complete: see what failed,"
            " below. Run the same command again to go on."
        )
    if results.updates().startswith("Updates were NOT"):  # a label may say NOT, too
        page.warning(results.updates())
    if caution:
        page.warning(caution)
    facts = []
    for row in (results.reference, results.best):
        if row is not None and (mean := results.stats(row, split)[0]):
            std = results.stats(row, split)[1]
            facts.append((plus_minus(mean["accuracy"], std["accuracy"]), f"accuracy, {row.label}"))
    found = results.best and results.difference(results.best, split, "accuracy")
    if found and found.mean is not None:
        interval = "" if found.low is None else ", 95% interval"
        facts.append((difference_cell(found), f"percent points on {split}{interval}"))
    facts.append((f"{done} of {len(table.rows)}", "rows complete"))
    page.facts(facts)
    links = [link for link in _links(table, out) if (out / link[0]).exists()]
    page.links(links)


def _links(table: Table, out: Path) -> Iterable[tuple[str, str]]:
    """Files below `out` that a reader may want next, whether or not they are there."""
    yield "table.csv", "every number in full precision"
    yield "table.md", "the tables for GitHub"
    yield "table.tex", "the tables for a paper"
    yield "table.json", "everything, for programs"
    yield "sheets", "what each selection took and left"
    if table.umap is not None and (path := _below(table.umap / "umap.html", out)):
        yield path, "feature space with tiles to point at"
    names = {str(row.factors.get("generator", row.key)) for row in table.rows if row.copies}
    for name in sorted(names):
        yield f"copies/{name}/report.md", f"copy check of {name}"


def _below(path: Path, out: Path) -> str | None:
    """A path relative to `out`; None outside of it."""
    path, out = path.absolute(), out.absolute()
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else None


def _table(page: Page, table: TextTable) -> None:
    page.heading(table.title)
    page.table(table, wide=True)


# Accuracy by arm, and over the amount of synthetic tiles


def _arms(page: Page, results: Results) -> None:
    split, real = results.reported, results.reference
    charts = []
    for metric in METRICS:
        estimates = []
        for row in results.table.rows:
            found = results.difference(row, split, metric)
            if found is not None and found.mean is not None:
                low, high = (None if v is None else 100 * v for v in (found.low, found.high))
                estimates.append(Estimate(shortened(row.label, 34), 100 * found.mean, low, high))
        if estimates and real is not None:
            title = f"Change in {word(metric)}"
            charts.append(estimate_chart(title, estimates, "percent points", real.label))
    if not charts or real is None:
        return
    page.heading(f"Every arm against “{real.label}”, {split}")
    page.charts(charts)
    if any(d.low is not None for d in results.differences if d.split == split):
        page.text(
            "Lines are 95% intervals, not corrected for the number of comparisons; dots are filled"
            " where the interval leaves out 0. A cross has no interval.",
            soft=True,
        )


def _label_curves(page: Page, results: Results, out: Path) -> None:
    """Every arm over the number of labels: OUT/labels_SPLIT.png."""
    splits = [results.reported, *results.table.splits[-2::-1]] if results.by_labels else []
    for split in splits:
        series = []
        for label, rows in results.by_labels.items():
            stats = [(row.factors["labels"], results.stats(row, split)) for row in rows]
            found = [(labels, *_accuracy(*one)) for labels, one in stats if one[0]]
            if found:
                series.append(_series(label, found))
        if not series:
            continue
        path = out / f"labels_{split}.png"
        title = f"Accuracy over labels per class, {split}"
        write_bytes(path, curves_picture(title, series, "labels per class", "accuracy, %"))
        page.heading(title)
        caption = "Percent, mean and deviation over draws of labels, each with its own seed."
        page.picture(embeddable(path), caption)


def _curves(page: Page, results: Results) -> None:
    if results.by_labels:  # the amount is not what differs
        return
    for split in (results.reported, *results.table.splits[-2::-1]):
        charts = list(_curves_of(results, split))
        if charts:
            page.heading(f"Accuracy over the amount of synthetic tiles, {split}")
            page.charts(charts)
            page.text(
                "Percent, mean and deviation over seeds; the line and its band are the reference."
                " Bars that overlap do not say that a difference is none: arms are paired, see Δ.",
                soft=True,
            )


def _curves_of(results: Results, split: str) -> Iterable[str]:
    """A chart per generator: a series per strategy, over the ratio."""
    drawn = list(_series_by_generator(results, split))
    ratios = sorted({x for _, series in drawn for one in series for x in one.x})
    if len(ratios) < 2:  # one amount is no curve
        return
    level = None
    if results.reference is not None and (found := results.stats(results.reference, split))[0]:
        level = Level(results.reference.label, *_accuracy(*found))
    limits = [bounds(series, level) for _, series in drawn]
    least, most = min(low for low, _ in limits), max(high for _, high in limits)
    for label, series in drawn:
        yield series_chart(
            shortened(label, TITLE),
            series,
            "synthetic tiles, % of the labelled",
            level,
            (least, most),
            ratios,
        )


def _accuracy(mean: dict, std: dict) -> tuple[float, float | None]:
    """Accuracy and its deviation in percent."""
    deviation = std["accuracy"]
    return 100 * mean["accuracy"], None if deviation is None else 100 * deviation


def _series_by_generator(results: Results, split: str) -> Iterable[tuple[str, list[Series]]]:
    groups: dict[str, dict[str, list[tuple[float, float, float | None]]]] = {}
    for row in results.table.rows:
        mean, std = results.stats(row, split)
        if row.kind != "synthetic" or not mean or "ratio" not in row.factors:
            continue
        label = row.label.rsplit(",", 1)[0] if "," in row.label else _others(row)
        strategy = str(row.factors.get("selection", "all"))
        point = float(row.factors["ratio"]), *_accuracy(mean, std)
        groups.setdefault(label, {}).setdefault(strategy, []).append(point)
    for label, strategies in groups.items():
        # Strategies beyond the colours that can be told apart go into further charts, each with
        # the random control again.
        controls = [name for name in strategies if name in results.controls][:1]
        others = [name for name in strategies if name not in controls]
        step = len(SERIES) - len(controls)
        for start in range(0, max(1, len(others)), step):
            names = [*others[start : start + step], *controls]
            yield label, [_series(name, strategies[name]) for name in names]


def _others(row: Row) -> str:
    words = (str(v) for k, v in row.factors.items() if k not in ("selection", "ratio"))
    return ", ".join(words) or "synthetic"


def _series(name: str, found: list[tuple[float, float, float | None]]) -> Series:
    x, y, deviation = zip(*sorted(found, key=lambda point: point[0]), strict=True)
    return Series(name, x, y, deviation)


def _confusion(page: Page, results: Results) -> None:
    split, classes = results.reported, results.table.classes
    shown = [row for row in (results.reference, results.best) if row and results.runs(row, split)]
    if not shown:
        return
    counts = [
        np.sum([run["confusion"] for run in results.runs(row, split)], axis=0) for row in shown
    ]
    page.heading(f"Class by class, {split}")
    heads = ["class", "images"]
    for row in shown:
        heads += [f"F1, {row.label}", f"sensitivity, {row.label}"]
    heads += ["Δ F1", "Δ sensitivity"] * (len(shown) == 2)
    rows = []
    for name in classes:
        values = [_class_means(results, row, name) for row in shown]
        images = results.runs(shown[0], split)[0]["per_class"][name]["images"]
        cells = [name, f"{images:,}"]
        cells += ["undefined" if v is None else percent(v) for pair in values for v in pair]
        if len(values) == 2:
            cells += [
                "" if a is None or b is None else points(b - a)
                for a, b in zip(*values, strict=True)
            ]
        rows.append(cells)
    caption = ["In percent and percent points, means over seeds; single classes are not tested."]
    page.table(TextTable("", heads, rows, caption, set(range(1, len(heads)))), wide=True)
    page.charts(
        confusion_chart(shortened(row.label, TITLE), matrix, classes)
        for row, matrix in zip(shown, counts, strict=True)
    )
    page.text(
        "Confusion matrices: percent of the images of each true class (row), and their number, all"
        " seeds together.",
        soft=True,
    )


def _class_means(results: Results, row: Row, name: str) -> list[float | None]:
    """F1 and sensitivity of a class, means over the seeds that define them."""
    per_class = [run["per_class"][name] for run in results.runs(row, results.reported)]
    found = [
        [one[metric] for one in per_class if one[metric] is not None]
        for metric in ("f1", "sensitivity")
    ]
    return [float(np.mean(values)) if values else None for values in found]


# Pictures


def _samples(page: Page, results: Results) -> None:
    """The first tiles of every pool, beside labelled ones."""
    classes = results.table.classes
    pools: dict[Path, str] = {}
    for row in results.table.rows:
        if row.samples is not None and row.samples.is_dir():
            pools.setdefault(row.samples, str(row.factors.get("generator", row.label)))
    if not pools:
        return
    page.heading("Samples")
    found: list[tuple[str, list[list[Tile]]]] = []
    real = _labelled_folder(results.table)
    if real is not None:
        found.append(("real", [first_tiles(real / name) for name in classes]))
    for folder, label in pools.items():
        found.append((label, [first_tiles(folder / name) for name in classes]))
    for start in range(0, len(found), GROUPS):
        part = found[start : start + GROUPS]
        rows = [TileRow(name, [tiles[k] for _, tiles in part]) for k, name in enumerate(classes)]
        last = start + GROUPS >= len(found)
        caption = f"The first {TILES} of every class; nothing was picked." if last else ""
        page.grid(rows, [label for label, _ in part], caption, SIDE)


def first_tiles(folder: Path) -> list[Tile]:
    """The first tiles of a folder, small enough for a page."""
    if not folder.is_dir():
        return []
    return [Tile(thumbnail(read_tile(path), SOURCE)) for path in list_images(folder)[:TILES]]


def _labelled_folder(table: Table) -> Path | None:
    data = table.settings.get("data") or {}
    if not data.get("root") or not data.get("labelled"):
        return None
    folder = Path(data["root"]).expanduser() / data["labelled"]
    return folder if folder.is_dir() else None


def _selection(page: Page, results: Results, out: Path) -> None:
    best = results.best
    folder = best and _sheets(best, out)
    if not best or not folder:
        return
    found = [(name, folder / f"{name}.png") for name in results.table.classes]
    pictures = [(embeddable(path), name) for name, path in found if path.is_file()]
    if pictures:
        page.heading("What the selection took and left")
        page.text(f"Contact sheets of “{best.label}”, beside the nearest real tiles.", soft=True)
        page.folded_pictures(f"{len(pictures)} sheets, one per class", pictures)


def _sheets(row: Row, out: Path) -> Path | None:
    places = [out / "sheets" / row.key]
    if row.selection is not None:
        folder = row.selection
        places += [out / "sheets" / folder.name, folder.parent / f"{folder.name}.sheets"]
    return next((place for place in places if place.is_dir()), None)


def _umap(page: Page, results: Results, out: Path) -> None:
    folder = results.table.umap
    if folder is None or not (folder / "umap.png").is_file():
        return
    page.heading("Feature space")
    caption = (
        "A UMAP picture of the features by which tiles are selected. Distances on the plane are"
        " only a hint."
    )
    interactive = folder / "umap.html"
    if interactive.is_file():
        shown = _below(interactive, out) or interactive.absolute()
        caption += f" Where one can point at dots to see their tiles: {shown}."
    page.picture(embeddable(folder / "umap.png"), caption)


def _copies(page: Page, results: Results, out: Path) -> None:
    pools: dict[str, Row] = {}
    for row in results.table.rows:
        if row.copies is not None:
            pools.setdefault(str(row.factors.get("generator", row.key)), row)
    if not pools:
        return
    page.heading("Copies of training tiles")
    rows = []
    for name, row in pools.items():
        numbers = copies_numbers(row)
        flagged, tiles = numbers["flagged"], numbers["tiles"]
        chance = numbers["expected_by_chance"]
        cells = [name, f"{tiles:,}", f"{flagged:,}", f"{chance:.1f}", percent(flagged / tiles)]
        spaces = (row.copies or {}).get("spaces") or {}
        for space in ("pixels", "features"):
            one = (spaces.get(space) or {}).get("synthetic", {}).get("all", {})
            c_t = one.get("c_t")
            cells.append("" if c_t is None else f"{c_t:.2f}".replace("-", MINUS))
        rows.append(cells)
    heads = ["pool of", "tiles", "flagged", "by chance", "% flagged"]
    heads += ["C_T, pixels", "C_T, features"]
    caption = [
        "Flagged are tiles that are nearer to a training tile, turned or mirrored, than nearly all"
        " held-out tiles are.",
        "C_T (Meehan et al. 2020) far below 0 says that the pool as a whole is nearer to the"
        " training set than new tissue; near 0 is as new.",
    ]
    page.table(TextTable("", heads, rows, caption, set(range(1, len(heads)))))
    sheets = [(out / "copies" / name / "suspicious.png", name) for name in pools]
    pictures = [
        (embeddable(path), f"{name}: the most suspicious pairs")
        for path, name in sheets
        if path.is_file()
    ]
    if pictures:
        title = "The most suspicious tiles, each beside its nearest training tile"
        page.folded_pictures(title, pictures)


# What failed, and how it was made


def _failed(page: Page, results: Results) -> None:
    for title, lines in (("What failed", failures(results)), ("Notes", results.notes)):
        if lines:
            page.heading(title)
            page.bullets(lines)


def _record(page: Page, results: Results) -> None:
    table, record = results.table, results.table.record
    page.heading("How it was made")
    page.text(results.updates())
    jobs = record.get("jobs") or {}
    timed = [(job["title"], job) for job in jobs.values() if job.get("seconds")]
    if timed:
        total = _duration(sum(job["seconds"] for _, job in timed))
        page.text(f"{len(timed)} jobs, {total} of computing together.")
    page.text("; ".join(_machine(record)) + ".", soft=True)
    commands = [job["command"] for job in jobs.values() if job.get("command")]
    if commands:
        page.folded("The commands, to be typed where this was started", "\n\n".join(commands))
    if timed:
        longest = sorted(timed, key=lambda one: -one[1]["seconds"])
        lines = (
            f"{_duration(job['seconds']):>10}  {title}"
            + (f": {job['number']}" * bool(job["number"]))
            for title, job in longest
        )
        page.folded("Time and result by job", "\n".join(lines))
    settings = yaml.safe_dump(table.settings, sort_keys=False, allow_unicode=True)
    page.folded("Settings", settings)


def _machine(record: dict) -> Iterable[str]:
    """Hardware, revision and versions, in words."""
    hardware, versions = record.get("hardware") or {}, record.get("versions") or {}
    if hardware:
        gpus = ", ".join(hardware.get("gpus") or ()) or "no GPU"
        cores = f"{hardware.get('cores', '?')} cores"
        yield f"This page: {hardware.get('processor', '?')}, {cores}, {gpus}"
    yield f"revision {record.get('revision') or 'unknown'}"
    if versions:
        yield ", ".join(f"{name} {version}" for name, version in versions.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
