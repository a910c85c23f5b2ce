"""table.md, table.tex, table.csv and report.html of a table of experiments.

report.html holds its pictures and loads nothing, so that it can be mailed, archived and printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ldm.data.images import list_images, read_tile
from ldm.evaluation.report import (
    COLOURS,
    Measured,
    Page,
    Span,
    Tile,
    embeddable,
    error_bounds,
    error_chart,
    matrix_chart,
)
from ldm.experiment.results import Row, Table
from ldm.files import write_text
from ldm.table.render import (
    Layout,
    Results,
    copies_numbers,
    difference_cell,
    failures,
    layouts,
    percent,
    plus_minus,
    to_csv,
    to_latex,
    to_markdown,
)

SIDE = 64  # pixels of a tile on the screen
SOURCE = 96  # pixels of a tile in the page, at most
TILES = 4  # per class and generator
GROUPS = 3  # generators side by side


def write_results(table: Table, out: Path) -> str:
    """Write OUT/table.md, table.tex, table.csv and report.html; returns the headline."""
    results = Results(table)
    write_text(out / "table.md", to_markdown(results))
    write_text(out / "table.tex", to_latex(results))
    write_text(out / "table.csv", to_csv(results))
    write_text(out / "report.html", to_html(results, out))
    return results.headline()


def to_html(results: Results, out: Path) -> str:
    """The page.

    Args:
        out: Folder of the table; sheets and copy reports are looked for below it.
    """
    page = Page(results.table.title or results.table.name, wide=True)
    _opening(page, results)
    tables = layouts(results)
    first, *rest = tables
    _table(page, first)
    _curves(page, results)
    for layout in rest:
        _table(page, layout)
    _confusion(page, results)
    _samples(page, results)
    _selection(page, results, out)
    _umap(page, results, out)
    _copies(page, results, out)
    _failed(page, results)
    _record(page, results)
    return page.render()


def _opening(page: Page, results: Results) -> None:
    table, split = results.table, results.reported
    page.text(results.headline() + ".")
    done = sum(row.status == "done" for row in table.rows)
    if done < len(table.rows):
        page.warning(
            f"{len(table.rows) - done} of {len(table.rows)} rows are not complete: see what failed,"
            " below. Run the same command again to go on."
        )
    if results.updates().startswith("Updates were NOT"):  # a label may say NOT, too
        page.warning(results.updates())
    facts = []
    for row, what in ((results.reference, "accuracy, {}"), (results.best, "accuracy, {}")):
        if row is not None and (mean := results.stats(row, split)[0]):
            std = results.stats(row, split)[1]
            facts.append((plus_minus(mean["accuracy"], std["accuracy"]), what.format(row.label)))
    found = results.best and results.difference(results.best, split, "accuracy")
    if found and found.mean is not None:
        interval = "" if found.low is None else ", 95% interval"
        facts.append((difference_cell(found), f"percent points on {split}{interval}"))
    facts.append((f"{done} of {len(table.rows)}", "rows complete"))
    page.facts(facts)


def _table(page: Page, layout: Layout) -> None:
    page.heading(layout.title)
    kinds = [
        f"{layout.kinds[i] if layout.kinds else ''} {'part' * (i in layout.breaks)}".strip()
        for i in range(len(layout.rows))
    ]
    rows: list[list[str | Span]] = [list(row) for row in layout.rows]
    for row, kind in zip(rows, layout.kinds, strict=False):
        if kind == "failed":  # a reason is too long for one column
            at = min(layout.numbers) + 2
            row[at:-1] = [Span(str(row[at]), len(layout.heads) - 1 - at)]
    page.table(layout.heads, rows, layout.numbers, kinds=kinds, wide=True)
    page.bullets(layout.caption, soft=True)


# Accuracy over the amount of synthetic tiles


def _curves(page: Page, results: Results) -> None:
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
    groups: dict[str, dict[str, list[tuple[float, float, float | None]]]] = {}
    for row in results.table.rows:
        mean, std = results.stats(row, split)
        if row.kind != "synthetic" or not mean or "ratio" not in row.factors:
            continue
        label = row.label.rsplit(",", 1)[0] if "," in row.label else _others(row)
        strategy = str(row.factors.get("selection", "all"))
        deviation = None if std["accuracy"] is None else 100 * std["accuracy"]
        point = float(row.factors["ratio"]), 100 * mean["accuracy"], deviation
        groups.setdefault(label, {}).setdefault(strategy, []).append(point)
    level = None
    if results.reference is not None and (found := results.stats(results.reference, split))[0]:
        mean, std = found
        deviation = None if std["accuracy"] is None else 100 * std["accuracy"]
        level = results.reference.label, 100 * mean["accuracy"], deviation
    drawn: list[tuple[str, list[Measured]]] = []
    for label, strategies in groups.items():
        # Strategies beyond the colours that can be told apart go into further charts, each with
        # the random control again.
        controls = [name for name in strategies if name in results.controls][:1]
        others = [name for name in strategies if name not in controls]
        step = COLOURS - len(controls)
        for start in range(0, max(1, len(others)), step):
            names = [*others[start : start + step], *controls]
            drawn.append((label, [_series(name, strategies[name]) for name in names]))
    if not drawn:
        return
    limits = [error_bounds(series, level) for _, series in drawn]
    bounds = min(low for low, _ in limits), max(high for _, high in limits)
    ratios = sorted({x for _, series in drawn for one in series for x in one.x})
    for label, series in drawn:
        title = label if len(label) < 52 else label[:51] + "…"
        yield error_chart(
            title, series, "synthetic tiles, % of the labelled", level, bounds, ratios
        )


def _others(row: Row) -> str:
    words = (str(v) for k, v in row.factors.items() if k not in ("selection", "ratio"))
    return ", ".join(words) or "synthetic"


def _series(name: str, found: list[tuple[float, float, float | None]]) -> Measured:
    x, y, deviation = zip(*sorted(found, key=lambda point: point[0]), strict=True)
    return Measured(name, x, y, deviation)


def _confusion(page: Page, results: Results) -> None:
    split, classes = results.reported, results.table.classes
    charts = []
    shown: list[tuple[Row, np.ndarray]] = []
    for row in (results.reference, results.best):
        runs = results.runs(row, split) if row else []
        if row and runs:
            counts = np.sum([run["confusion"] for run in runs], axis=0)
            shown.append((row, counts))
            title = row.label if len(row.label) < 52 else row.label[:51] + "…"
            charts.append(matrix_chart(title, classes, counts.tolist()))
    if not charts:
        return
    page.heading(f"Confusion matrices, {split}")
    page.charts(charts)
    page.text(
        "Percent of the images of each true class (row), all seeds together. Point at a cell for"
        " the counts.",
        soft=True,
    )
    heads, rows = ["class", "images"], []
    for row, _ in shown:
        heads += [f"F1, {row.label}", f"sensitivity, {row.label}"]
    for name in classes:
        cells: list[str] = [name]
        for row, _ in shown:
            per_class = [run["per_class"][name] for run in results.runs(row, split)]
            if len(cells) == 1:
                cells.append(f"{per_class[0]['images']:,}")
            for metric in ("f1", "sensitivity"):
                values = [one[metric] for one in per_class if one[metric] is not None]
                cells.append(percent(float(np.mean(values))) if values else "undefined")
        rows.append(cells)
    page.table(heads, rows, range(1, len(heads)), wide=True)


# Pictures


def _samples(page: Page, results: Results) -> None:
    """The first tiles of every pool, beside labelled ones."""
    classes = results.table.classes
    pools: dict[Path, str] = {}
    for row in results.table.rows:
        if row.samples is not None and Path(row.samples).is_dir():
            pools.setdefault(Path(row.samples), str(row.factors.get("generator", row.label)))
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
        rows = [(name, [tiles[k] for _, tiles in part]) for k, name in enumerate(classes)]
        last = start + GROUPS >= len(found)
        caption = f"The first {TILES} of every class; nothing was picked." if last else ""
        page.grid(rows, [label for label, _ in part], caption, SIDE)


def first_tiles(folder: Path, count: int = TILES) -> list[Tile]:
    """The first tiles of a folder, small enough for a page."""
    if not folder.is_dir():
        return []
    return [Tile(_small(read_tile(path))) for path in list_images(folder)[:count]]


def _small(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), the longer side at most SOURCE."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((SOURCE, SOURCE), Image.Resampling.LANCZOS)
    return np.asarray(image)


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
        page.pictures(f"{len(pictures)} sheets, one per class", pictures)


def _sheets(row: Row, out: Path) -> Path | None:
    places = [out / "sheets" / row.key]
    if row.selection is not None:
        folder = Path(row.selection)
        places += [out / "sheets" / folder.name, folder.parent / f"{folder.name}.sheets"]
    return next((place for place in places if place.is_dir()), None)


def _umap(page: Page, results: Results, out: Path) -> None:
    folder = results.table.umap
    if folder is None or not (Path(folder) / "umap.png").is_file():
        return
    page.heading("Feature space")
    caption = (
        "A UMAP picture of the features by which tiles are selected. Distances on the plane are"
        " only a hint."
    )
    interactive = (Path(folder) / "umap.html").absolute()
    if interactive.is_file():
        base = out.absolute()
        shown = interactive.relative_to(base) if interactive.is_relative_to(base) else interactive
        caption += f" Where one can point at dots to see their tiles: {shown}."
    page.picture(embeddable(Path(folder) / "umap.png"), caption)


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
            cells.append("" if c_t is None else f"{c_t:.2f}".replace("-", "−"))
        rows.append(cells)
    heads = [
        "pool of",
        "tiles",
        "flagged",
        "by chance",
        "% flagged",
        "C_T, pixels",
        "C_T, features",
    ]
    page.table(heads, rows, range(1, len(heads)))
    page.text(
        "Flagged are tiles that are nearer to a training tile, turned or mirrored, than nearly all"
        " held-out tiles are. C_T (Meehan et al. 2020) far below 0 says that the pool as a whole is"
        " nearer to the training set than new tissue; near 0 is as new.",
        soft=True,
    )
    pictures = []
    for name in pools:
        path = out / "copies" / name / "suspicious.png"
        if path.is_file():
            pictures.append((embeddable(path), f"{name}: the most suspicious pairs"))
    if pictures:
        page.pictures("The most suspicious tiles, each beside its nearest training tile", pictures)


# What failed, and how it was made


def _failed(page: Page, results: Results) -> None:
    lines = failures(results)
    if lines:
        page.heading("What failed")
        page.bullets(lines)
    if results.notes:
        page.heading("Notes")
        page.bullets(results.notes)


def _record(page: Page, results: Results) -> None:
    table, record = results.table, results.table.record
    page.heading("How it was made")
    page.text(results.updates())
    jobs = record.get("jobs") or {}
    seconds = {name: job["seconds"] for name, job in jobs.items() if job.get("seconds")}
    if seconds:
        page.text(f"{len(seconds)} jobs, {_duration(sum(seconds.values()))} of computing together.")
    hardware, versions = record.get("hardware") or {}, record.get("versions") or {}
    words = []
    if hardware:
        gpus = ", ".join(hardware.get("gpus") or ()) or "no GPU"
        cores = f"{hardware.get('cores', '?')} cores"
        words.append(f"This page: {hardware.get('processor', '?')}, {cores}, {gpus}")
    words.append(f"revision {record.get('revision') or 'unknown'}")
    if versions:
        words.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    page.text("; ".join(words) + ".", soft=True)
    commands = [job["command"] for job in jobs.values() if job.get("command")]
    if commands:
        page.commands("The commands, to be typed in the repository", commands)
    if seconds:
        longest = sorted(seconds.items(), key=lambda one: -one[1])
        lines = "\n".join(f"{_duration(value):>10}  {name}" for name, value in longest)
        page.folded("Time by job", lines)
    page.folded("Settings", _yaml(table.settings))


def _yaml(content: Any) -> str:
    return yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)


def _plain(content: Any) -> Any:
    """With what YAML has no word for (paths) as text."""
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_plain(value) for value in content]
    return content if isinstance(content, int | float | str | type(None)) else str(content)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
