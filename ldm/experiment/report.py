"""table.md, table.tex, table.csv and report.html of an experiment.

report.html holds its pictures and loads nothing, so that it can be mailed, archived and printed;
links lead to further files beside it. A section appears where its data are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas
import yaml

from ldm.experiment import report_models
from ldm.experiment.report_models import TITLE, below
from ldm.experiment.results import Row, Table
from ldm.experiment.statistics import METRICS
from ldm.experiment.tables import (
    Results,
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
from ldm.report.page import Page, embeddable
from ldm.report.plots import (
    Estimate,
    Level,
    Series,
    confusion_chart,
    curves_picture,
    estimate_chart,
)
from ldm.report.tables import TextTable, to_latex

STAGES = {  # by kind of job
    "tiles": "tiles",
    "subset": "draws of real tiles",
    "train": "training of the models that make tiles",
    "sample": "sampling",
    "features": "features and UMAP",
    "select": "selection",
    "baseline": "baselines",
    "eval": "training of the classifiers",
    "fidelity": "fidelity",
    "copies": "search for copies",
}
DRAWN = "The tiles are drawn by a program and are no medical images."


def write_results(table: Table, out: Path) -> str:
    """Write OUT/table.md, table.tex, table.csv and report.html; returns the headline."""
    results = Results(table)
    write_text(out / "table.md", markdown(results))
    write_text(out / "table.tex", to_latex(text_tables(results), table.name))
    rows = list(csv_rows(results))
    write_csv(out / "table.csv", rows, list(dict.fromkeys(name for row in rows for name in row)))
    page = Page(table.title or table.name, wide=True)
    _opening(page, results, out)
    first, *rest = text_tables(results)
    _arms(page, results)
    _table(page, first)
    _curves(page, results, out)
    for one in rest:
        _table(page, one)
    _confusion(page, results)
    report_models.add_sections(page, results, out)
    _failed(page, results)
    _record(page, results)
    write_text(out / "report.html", page.render())
    return results.headline()


def _opening(page: Page, results: Results, out: Path) -> None:
    table, split = results.table, results.reported
    page.answer(*results.question_and_answer())
    if table.settings.get("about"):
        page.text(table.settings["about"])
    done = sum(row.status == "done" for row in table.rows)
    if done < len(table.rows):
        page.warning(
            f"{len(table.rows) - done} of {len(table.rows)} rows are not complete: see what failed,"
            " below. Run the same command again to go on."
        )
    if results.updates().startswith("Updates were NOT"):  # a label may say NOT, too
        page.warning(results.updates())
    caution = [table.settings.get("caution") or ""]
    caution += [DRAWN] if (table.settings.get("data") or {}).get("tiles") else []
    if any(caution):
        page.warning(" ".join(filter(None, caution)))
    facts = []
    for row in (results.reference, results.best):
        if row is not None and (mean := results.stats(row, split)[0]):
            std = results.stats(row, split)[1]
            facts.append(
                (plus_minus(mean["accuracy"], std["accuracy"]), f"% accuracy, {row.label}")
            )
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
    yield "sheets", "what each selection took and left, beside the nearest real tiles"
    if table.umap is not None:
        yield below(table.umap / "umap.html", out), "feature space with tiles to point at"
    for label, pool in table.pools.values():
        yield below(pool / "grid.png", out), label
        yield f"copies/{pool.name}/report.md", "copies of training tiles"
    yield "models", "every model with its settings and metrics"
    yield "eval", "networks, predictions and results of every arm"
    yield "jobs", "the log of every command"


def _table(page: Page, table: TextTable) -> None:
    page.heading(table.title)
    page.table(table, wide=True)


# Accuracy by arm, and over the amount of synthetic tiles


def _arms(page: Page, results: Results) -> None:
    split, real = results.reported, results.reference
    accuracies = [one for row in results.table.rows if (one := _estimate(results, row))]
    if not accuracies or real is None:
        return
    mean = results.mean(real, split, "accuracy")
    charts = []
    if mean is not None:
        level = Level(real.label, 100 * mean)
        charts.append(estimate_chart(f"Accuracy on {split}", accuracies, "percent", level))
    for metric in METRICS:
        estimates = []
        for row in results.table.rows:
            found = results.difference(row, split, metric)
            if found is not None and found.mean is not None:
                low, high = in_percent(found.low), in_percent(found.high)
                estimates.append(Estimate(row.label, 100 * found.mean, low, high))
        if estimates:
            level = Level(real.label, 0)
            title = f"Change in {word(metric)}"
            charts.append(estimate_chart(title, estimates, "percent points", level))
    page.heading(f"Accuracy of every arm, {split}")
    page.charts(charts)
    page.text(
        "Lines are 95% intervals. Those of an accuracy count the test images as random, and"
        " ticks are single networks; those of a change count the networks, too, and are not"
        " corrected for the number of comparisons. Dots are filled where the interval leaves out"
        " the line across. A cross has no interval.",
        soft=True,
    )


def _estimate(results: Results, row: Row) -> Estimate | None:
    """Accuracy of an arm in percent, with its interval over images and its networks."""
    split = results.reported
    runs = [100 * run["accuracy"] for run in results.runs(row, split)]
    if not runs:
        return None
    found = row.summary.get("bootstrap", {}).get(split, {}).get("accuracy", (None, None))
    return Estimate(row.label, float(np.mean(runs)), *map(in_percent, found), values=runs)


def in_percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _curves(page: Page, results: Results, out: Path) -> None:
    amount = "labels" if results.by_labels else "ratio"
    words = {"labels": "labels per class", "ratio": "synthetic tiles, % of the labelled"}[amount]
    for split in (results.reported, *results.table.splits[-2::-1]):
        series = list(_series_of_arms(results, split, amount))
        if len({x for one in series for x in one.x}) < 2:  # one amount is no curve
            continue
        level, real = None, results.reference
        if amount == "ratio" and real is not None and (found := results.stats(real, split))[0]:
            level = Level(real.label, *_accuracy(*found))
        path = out / f"{amount}_{split}.png"
        picture = curves_picture(f"Accuracy, {split}", series, words, "accuracy, %", level)
        write_bytes(path, picture)
        page.heading(f"Accuracy over {words}, {split}")
        caption = (
            "Percent, mean and deviation over seeds (each with its own draw of labels, where these"
            " differ). Bars that overlap do not say that a difference is none: arms are paired, see"
            " Δ in the table."
        )
        page.pictures([(embeddable(path), caption)])


def _series_of_arms(results: Results, split: str, amount: str) -> Iterable[Series]:
    """A series for each kind of arm, over the amount of tiles in which its rows differ."""
    arms: dict[str, list[tuple[float, float, float | None]]] = {}
    rows = results.table.rows
    if amount == "ratio":
        rows = [row for row in rows if row.kind == "synthetic" and amount in row.factors]
    names = {row.key: name for name, group in results.by_labels.items() for row in group}
    for row in rows:
        mean, std = results.stats(row, split)
        if mean and amount in row.factors:
            name = names.get(row.key) or row.label.removesuffix(f" {row.factors[amount]}%")
            point = float(row.factors[amount]), *_accuracy(mean, std)
            arms.setdefault(name, []).append(point)
    for name, found in arms.items():
        yield Series(name, *zip(*sorted(found, key=lambda point: point[0]), strict=True))


def _accuracy(mean: dict, std: dict) -> tuple[float, float | None]:
    return 100 * mean["accuracy"], in_percent(std["accuracy"])


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
        values = [results.class_means(row, name) for row in shown]
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
        page.table(_stages([job for _, job in timed]))
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


def _stages(jobs: list[dict]) -> TextTable:
    frame = pandas.DataFrame({"stage": [STAGES.get(job.get("kind"), "other") for job in jobs],
                              "seconds": [job["seconds"] for job in jobs]})  # fmt: skip
    found = frame.groupby("stage", sort=False)["seconds"].agg(["count", "sum"])
    total = found["sum"].sum()
    rows = [
        [stage, str(count), _duration(seconds), f"{100 * seconds / total:.0f}%"]
        for stage, count, seconds in found.itertuples()
    ]
    rows.append(["all", str(len(jobs)), _duration(total), ""])
    heads = ["stage", "jobs", "time", "share"]
    return TextTable("", heads, rows, numbers={1, 2, 3}, breaks={len(rows) - 1})


def _machine(record: dict) -> Iterable[str]:
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
