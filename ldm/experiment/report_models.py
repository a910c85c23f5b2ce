"""Sections of a report on what lies behind its numbers: models, tiles, guidance, selection, copies.

Each reads what the commands wrote, and appears where that is there.

Letters: K classes, S sampler steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas

from ldm.data.images import list_images, read_tile
from ldm.experiment.numbers import read_json
from ldm.experiment.results import Row, Table
from ldm.experiment.tables import Results, copies_numbers, percent, shortened
from ldm.report.grids import Tile, TileRow, thumbnail
from ldm.report.page import Page, embeddable
from ldm.report.plots import SERIES, Level, Series, bar_chart, line_chart
from ldm.report.tables import MINUS, TextTable
from ldm.run import RunFolder
from ldm.selection.select import REJECTED, USED
from ldm.synthesis.folder import STAGES

SIDE = 64  # pixels of a tile on the screen
SOURCE = 96  # pixels of a tile in the page, at most
TILES = 4  # per class and group
GROUPS = 4  # of tiles side by side
TITLE = 52  # letters above a chart
LARGEST_MAP = 8_000_000  # bytes of an interactive map that becomes a part of the page
# What is drawn of a model's training: the first of these that its validations logged.
CURVES = {
    "accuracy": "accuracy, all noise levels",
    "aux_accuracy": "accuracy of the auxiliary classifier",
    "loss_simple_ema": "error of the prediction",
    "loss_simple": "error of the prediction",
    "rec_loss": "reconstruction error",
    "loss": "loss",
}


def add_sections(page: Page, results: Results, out: Path) -> None:
    """Add all sections to a page in the folder `out`."""
    _samples(page, results)
    _stages(page, results.table)
    _guidance(page, results.table)
    _selection(page, results)
    _umap(page, results)
    _copies(page, results, out)
    _training(page, results)


def below(path: Path, out: Path) -> str:
    """A path relative to `out`; in full outside of it."""
    path, out = path.absolute(), out.absolute()
    return path.relative_to(out).as_posix() if path.is_relative_to(out) else path.as_posix()


def _numbers_table(heads: list[str], rows: list[list[str]], caption: list[str]) -> TextTable:
    return TextTable("", heads, rows, caption, set(range(1, len(heads))))


# Tiles


def _samples(page: Page, results: Results) -> None:
    table = results.table
    if not table.pools:
        return
    page.heading("Real and synthetic tiles")
    found = [(label, _of_classes(table, pool)) for label, pool in table.pools.values()]
    if (real := _labelled_folder(table)) is not None:
        found.insert(0, ("real", _of_classes(table, real)))
    caption = f"The first {TILES} of every class; nothing was picked."
    records = [pool / "settings.json" for _, pool in table.pools.values()]
    images = [read_json(file).get("images", {}) for file in records if file.is_file()]
    if len({one.get("scale") for one in images}) > 1 and 0 in (one.get("scale") for one in images):
        caption += (
            " Tiles without guidance have no class: they stand in the row of the guided tiles that"
            " come from the same noise, in the same order, so the difference is what guidance did."
        )
    for start in range(0, len(found), GROUPS):
        part, is_last = found[start : start + GROUPS], start + GROUPS >= len(found)
        rows = [
            TileRow(name, [tiles[k] for _, tiles in part]) for k, name in enumerate(table.classes)
        ]
        page.grid(rows, [label for label, _ in part], caption * is_last, SIDE)


def _of_classes(table: Table, folder: Path) -> list[list[Tile]]:
    return [first_tiles(folder / name) for name in table.classes]


def first_tiles(folder: Path) -> list[Tile]:
    return [_tile(path) for path in list_images(folder)[:TILES]] if folder.is_dir() else []


def _tile(path: Path, caption: str = "", kind: str = "") -> Tile:
    return Tile(thumbnail(read_tile(path), SOURCE), caption, kind)


def _labelled_folder(table: Table) -> Path | None:
    data = table.settings.get("data") or {}
    if not data.get("root") or not data.get("labelled"):
        return None
    folder = Path(data["root"]).expanduser() / data["labelled"]
    return folder if folder.is_dir() else None


def _stages(page: Page, table: Table) -> None:
    """The first tile of each class of a pool, as the model expects it at several time steps."""
    found = {}  # by the noise that they start from: a variation has a tile to start from
    for label, pool in table.pools.values():
        if times := [float(file.stem) for file in (pool / STAGES).glob("*/*.png")]:
            found[max(times)] = label, pool
    if not found:
        return
    page.heading("From noise to a tile")
    label, pool = found[max(found)]
    rows = []
    for name in table.classes:
        files = sorted((pool / STAGES / name).glob("*.png"), key=lambda path: -float(path.stem))
        rows.append(TileRow(name, [[_tile(file, f"t {float(file.stem):.0f}") for file in files]]))
    page.grid(
        rows,
        [label],
        "The first tile of each class while it is sampled: what the model expects the finished tile"
        " to be, at time steps t from noise to 0.",
        SIDE,
    )


# Guidance


def _guidance(page: Page, table: Table) -> None:
    """What the noise classifiers know, and what guidance by them does over the steps."""
    charts = [chart for _, runs in _models(table) if (chart := _by_noise(runs, table.classes))]
    files = [(label, pool / "guidance.csv") for label, pool in table.pools.values()]
    logs = [(label, pandas.read_csv(file)) for label, file in files if file.is_file()]
    for title, column in (
        ("Probability of the wanted class while sampling", "probability"),
        ("Size of the guidance relative to the noise", "guidance_to_noise"),
    ):
        series = [
            Series(shortened(label, 30), log["t"], log[column])
            for label, log in logs
            if log[column].notna().any()
        ]
        charts += [
            line_chart(title, series[start : start + len(SERIES)], "time step t", falling=True)
            for start in range(0, len(series), len(SERIES))
        ]
    rows = []
    for label, pool in table.pools.values():
        manifest = pandas.read_csv(pool / "manifest.csv", dtype={"class": str})
        if manifest["prob"].notna().any():
            of_class = manifest.groupby("class")["prob"].mean()
            values = [manifest["prob"].mean(), *(of_class.get(name) for name in table.classes)]
            rows.append([label, *("" if v is None else f"{v:.2f}" for v in values)])
    if charts or rows:
        page.heading("Guidance")
        page.charts(charts)
    if rows:
        caption = [
            "Mean probability of the wanted class, of finished tiles. It is that of the very"
            " classifier that guides, so it says that guidance works, not that the tiles are right:"
            " on that, the selection below is a second opinion."
        ]
        page.table(_numbers_table(["sampled", "all", *table.classes], rows, caption))


def _by_noise(runs: Sequence[RunFolder], classes: Sequence[str]) -> str | None:
    """Accuracy of a noise classifier by range of time steps, mean over its draws of labels."""
    prefix = "val/accuracy_t"
    files = [run.root / "result.json" for run in runs]
    last = [read_json(file).get("last", {}) for file in files if file.is_file()]
    found = [name for one in last[:1] for name in one if name.startswith(prefix)]
    names = sorted(
        (name.removeprefix(prefix) for name in found), key=lambda n: int(n.split("-")[0])
    )
    if not names:
        return None
    columns = ["val/accuracy_clean", *(prefix + name for name in names)]
    means = [float(np.mean([one[column] for one in last])) for column in columns]
    chance = 1 / len(classes)
    return bar_chart(
        "Accuracy of the noise classifier on val",
        ["clean", *(f"t {name}" for name in names)],
        means,
        Level(f"chance {chance:.2f}", chance),
    )


# Selection


def _selection(page: Page, results: Results) -> None:
    best, classes = results.best, results.table.classes
    if best is None or best.selection is None or not (best.selection / "selection.csv").is_file():
        return
    page.heading(f"What the selection of “{best.label}” took and left")
    found = pandas.read_csv(best.selection / "selection.csv", dtype={"class": str})
    real, judged = _labelled_folder(results.table), "judged" in found
    rows = []
    for name in classes if best.samples is not None else ():
        of_class = found[found["class"] == name]
        used = of_class[of_class["decision"].isin(USED)].head(TILES + 1)
        left = of_class[of_class["decision"] == REJECTED].tail(TILES + 1)
        groups = [_chosen(used, "good", best.samples), _chosen(left, "bad", best.samples)]
        rows.append(TileRow(name, [*([first_tiles(real / name)] if real else ()), *groups]))
    if rows:
        heads = [*(["real, labelled"] if real else ()), "accepted, the best", "rejected, the worst"]
        caption = (
            "Below each tile: the class that the judge sees, and how sure it is."
            if judged
            else "Below each tile: the class of the nearest centroid, and a thousand times the mean"
            " squared distance to the centroid of the tile's own class."
        )
        page.grid(rows, heads, caption, SIDE)
    record = best.selection / "selection.json"
    if record.is_file():
        page.table(_counts_table(results, best, read_json(record)["counts"]))


def _chosen(rows: pandas.DataFrame, kind: str, pool: Path) -> list[Tile]:
    tiles = []
    for row in rows.to_dict("records"):
        words = (
            f"{row['judged']}\n{row['confidence']:.2f}"
            if "judged" in row
            else f"{row['nearest']}\n{1000 * row['own_distance']:.2f}"
        )
        if (pool / row["file"]).is_file():
            tiles.append(_tile(pool / row["file"], words, kind))
    return tiles


def _counts_table(results: Results, best: Row, counts: Mapping[str, Mapping]) -> TextTable:
    classes = results.table.classes
    columns = ["generated", "rejected", "surplus", "accepted", "filled", "wanted", "shortfall"]
    rows = [[name, *(str(counts[name].get(column, 0)) for column in columns)] for name in classes]
    caption = [
        "A shortfall is filled with rejected tiles only where “filled” says so. A control arm that"
        " draws at random draws what is wanted from all generated tiles."
    ]
    used = {name: counts[name]["accepted"] + counts[name].get("filled", 0) for name in classes}
    if 0 in used.values():
        caption.append(_without_tiles(results, best, used))
    return _numbers_table(["class", *columns], rows, caption)


def _without_tiles(results: Results, best: Row, used: Mapping[str, int]) -> str:
    """What it does to the classifier that no tile of some classes was accepted."""
    empty = [name for name, count in used.items() if not count]
    text = (
        f"No tile of {', '.join(empty)} was accepted: there the classifier learns from its labelled"
        f" tiles alone, elsewhere from up to {max(used.values())} more, so it tends to name the"
        " other classes instead."
    )
    real, split = results.reference, results.reported
    if real is None or not (results.runs(real, split) and results.runs(best, split)):
        return text
    changes = {name: [results.class_means(row, name)[1] for row in (real, best)] for name in empty}
    words = ", ".join(f"{name} {percent(a)} to {percent(b)}" for name, (a, b) in changes.items())
    return f"{text} Sensitivity on {split} in percent, “{real.label}” to “{best.label}”: {words}."


def _umap(page: Page, results: Results) -> None:
    folder = results.table.umap
    if folder is None or not (folder / "umap.png").is_file():
        return
    page.heading("Feature space")
    caption = (
        "A UMAP picture of the features by which tiles are selected. Distances on the plane are"
        " only a hint."
    )
    page.pictures([(embeddable(folder / "umap.png"), caption)])
    interactive = folder / "umap.html"
    if interactive.is_file() and interactive.stat().st_size < LARGEST_MAP:
        title = "The same to point at, with the tiles (needs JavaScript)"
        page.frame(title, interactive.read_text())


# Copies


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
            c_t = (spaces.get(space) or {}).get("synthetic", {}).get("all", {}).get("c_t")
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
    page.table(_numbers_table(heads, rows, caption))
    sheets = [(out / "copies" / name / "suspicious.png", name) for name in pools]
    pictures = [
        (embeddable(path), f"{name}: the most suspicious pairs")
        for path, name in sheets
        if path.is_file()
    ]
    if pictures:
        title = "The most suspicious tiles, each beside its nearest training tile"
        page.pictures(pictures, title)


# Training


def _models(table: Table) -> Iterable[tuple[str, list[RunFolder]]]:
    """Label and runs of every model; those that differ only in their draw of labels together."""
    found: dict[str, tuple[str, list[RunFolder]]] = {}
    for name, (label, folder) in table.models.items():
        found.setdefault(name.partition("@")[0], (label, []))[1].append(RunFolder(folder))
    return found.values()


def _training(page: Page, results: Results) -> None:
    charts, pictures = [], []
    for label, runs in _models(results.table):
        chart = _curve(label, runs)
        charts += [chart] if chart else []
        pictures += _logged_pictures(label, runs[0])
    charts += _classifier_curves(results)
    if charts:
        page.heading("Training")
        page.charts(charts)
    page.pictures(pictures)


def _curve(label: str, runs: Sequence[RunFolder]) -> str | None:
    """Validation of a model over its steps; the single batches of one run behind it."""
    logged = [run.read_metrics() for run in runs]
    names = {name for rows in logged for row in rows for name in row}
    metric = next((m for m in CURVES if {f"val/{m}", f"train/{m}"} & names), None)
    if metric is None:
        return None

    def series(key: str, words: str, rows: Sequence[Mapping], pale: bool) -> Series:
        known = [row for row in rows if key in row]
        return Series(words, [r["step"] for r in known], [r[key] for r in known], pale=pale)

    lines = [series(f"val/{metric}", "val", rows, False) for rows in logged]
    if len(runs) == 1:
        batches = f"train/{metric.removesuffix('_ema')}"
        lines.append(series(batches, "training batches", logged[0], True))
    title = shortened(f"{label[:1].upper()}{label[1:]}", TITLE)
    return line_chart(f"{title}:\n{CURVES[metric]}", lines, "optimiser step")


def _classifier_curves(results: Results) -> list[str]:
    """Accuracy of the networks of the reference and of the best arm, over their updates."""
    split, series = results.table.splits[0], []
    for row in filter(None, (results.reference, results.best)):
        for files in row.predictions.values():
            path = files[split].parent / "metrics.csv" if split in files else None
            if path is not None and path.is_file():
                log = pandas.read_csv(path)
                series.append(Series(shortened(row.label, 30), log["updates"], log["val_accuracy"]))
    title = "Classifiers of the table, each seed:\naccuracy on val"
    return [line_chart(title, series, "update")] if series else []


def _logged_pictures(label: str, run: RunFolder) -> Iterable[tuple[bytes, str]]:
    """The last pictures that a run logged: inputs, reconstructions, samples."""
    for kind in ("inputs", "reconstructions", "samples"):
        files = sorted(run.images.glob(f"{kind}_*.png"))
        if files:
            step = int(files[-1].stem.rpartition("_")[2])
            yield embeddable(files[-1]), f"{label}: {kind}, step {step:,}"
