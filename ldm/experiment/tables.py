"""What the tables of an experiment say, for Markdown, LaTeX, CSV and pages.

Metrics are fractions here and in the CSV, percent in what people read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from ldm.evaluation.metrics import HEADLINE, OF_PROBABILITIES, mean_and_std
from ldm.experiment.results import PUBLISHED_GAIN, Row, Table
from ldm.experiment.statistics import (
    FEWEST_SEEDS,
    METRICS,
    Difference,
    control_names,
    differences,
    pseudo_pairs,
    random_pairs,
    stars,
)
from ldm.report.tables import MINUS, TextTable, escape_markdown, to_markdown

WORDS = {"macro_f1": "macro F1"}
STATUS = {"failed": "failed", "missing": "not run"}
LONGEST = 90  # characters of a reason within a cell
# Of columns of the CSV, by family of differences.
PREFIXES = {"reference": "delta", "random": "against_random", "pseudo": "against_pseudo"}


def word(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference in percent points, with its sign."""
    if value is None:
        return ""
    text = f"{100 * value:+.1f}"
    return text.replace("-", MINUS) if float(text) else "0.0"


def plus_minus(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "undefined"
    return percent(mean) if std is None else f"{percent(mean)} ± {percent(std)}"


def shortened(text: str, longest: int = LONGEST) -> str:
    """Text with its middle cut out: names of arms differ at their ends."""
    text = " ".join(text.split())
    end = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - end]}…{text[-end:]}"


class Results:
    """A table together with its comparisons, and the numbers that are read off it."""

    def __init__(self, table: Table, compared: Sequence[Difference] | None = None):
        self.table = table
        self.differences = list(differences(table) if compared is None else compared)
        self._found = {(d.family, d.row, d.split, d.metric): d for d in self.differences}
        self.rows = {row.key: row for row in table.rows}

    @property
    def reported(self) -> str:
        """The split that counts: the last, test where there is one."""
        return self.table.splits[-1]

    def runs(self, row: Row, split: str) -> list[dict[str, Any]]:
        """Metrics of the seeds that are done."""
        return [one[split] for one in (row.summary or {}).get("per_seed", ()) if split in one]

    def stats(self, row: Row, split: str) -> tuple[dict, dict]:
        """Mean and deviation over seeds by metric; both empty without results."""
        runs = self.runs(row, split)
        return mean_and_std(runs) if runs else ({}, {})

    def mean(self, row: Row, split: str, metric: str) -> float | None:
        return self.stats(row, split)[0].get(metric)

    def class_means(self, row: Row, name: str) -> list[float | None]:
        """F1 and sensitivity of a class, means over the seeds that define them."""
        per_class = [run["per_class"][name] for run in self.runs(row, self.reported)]
        found = [
            [one[metric] for one in per_class if one[metric] is not None]
            for metric in ("f1", "sensitivity")
        ]
        return [sum(values) / len(values) if values else None for values in found]

    def difference(
        self, row: Row, split: str, metric: str, family: str = "reference"
    ) -> Difference | None:
        return self._found.get((family, row.key, split, metric))

    def seeds(self, row: Row) -> str:
        """`5`, or `3 of 5` where some are not there."""
        done = len(self.runs(row, self.reported)) or len(self.runs(row, self.table.splits[0]))
        return f"{done} of {row.seeds}" if done < row.seeds else str(done)

    @cached_property
    def notes(self) -> list[str]:
        """Notes of the evaluations (imbalance, missing classes, ...), each once with its arms."""
        found: dict[str, list[str]] = {}
        for row in self.table.rows:
            for note in (row.summary or {}).get("notes", ()):
                found.setdefault(note, []).append(row.label)
        return [
            f"{', '.join(labels) if len(labels) < 4 else f'{len(labels)} arms'}: {note}"
            for note, labels in found.items()
        ]

    @cached_property
    def controls(self) -> set[str]:
        """Names of the strategies that choose at random."""
        return control_names(self.table)

    @cached_property
    def best(self) -> Row | None:
        """The selected arm that gains most accuracy on val, which test has no part in."""
        split = self.table.splits[0]
        found = []
        for row in self.table.rows:
            value, real = self.mean(row, split, "accuracy"), self.reference_of(row)
            selected = row.factors.get("selection") not in self.controls
            if row.kind == "synthetic" and selected and value is not None:
                without = real and self.mean(real, split, "accuracy")
                found.append((value - (without or 0.0), row))
        return max(found, key=lambda one: one[0])[1] if found else None

    def reference_of(self, row: Row) -> Row | None:
        """The row that differences of a row are taken to."""
        return self.rows.get(self.table.reference_of(row))

    @cached_property
    def by_labels(self) -> dict[str, list[Row]]:
        """Rows over the number of labels per class, by what they are; {} where there is one."""
        found: dict[str, list[Row]] = {}
        for row in self.table.rows:
            if "labels" in row.factors:
                found.setdefault(row.label.rsplit(",", 1)[0], []).append(row)
        return found

    @property
    def reference(self) -> Row | None:
        """Real tiles only, with as many labels as the best arm."""
        return self.reference_of(self.best) if self.best else self.rows.get(self.table.reference)

    def updates(self) -> str:
        """Whether the networks were trained equally long, in words."""
        counts = {
            row.key: row.summary["updates"]
            for row in self.table.rows
            if row.kind != "baseline" and row.summary and row.summary.get("updates")
        }
        if not counts:
            return "How many updates the networks were trained for is not recorded."
        low, high = min(counts.values()), max(counts.values())
        if low == high:
            others = [
                f"“{row.label}” for {updates:,}"
                for row in self.table.rows
                if row.kind == "baseline" and row.summary
                if (updates := row.summary.get("updates")) not in (None, low)
            ]
            but = f", but {', '.join(others)}" if others else ""
            return (
                f"Every network was trained for {low:,} updates, whatever its number of tiles{but}."
            )
        return (
            f"Updates were NOT matched: networks were trained for {low:,} to {high:,} updates, by"
            " their number of tiles, and a part of any difference may be just that (match_steps in"
            " evaluation.arguments gives all the same)."
        )

    def question_and_answer(self) -> tuple[str, str]:
        """What the table asks, and what it answers with its interval, a sentence each."""
        split, real, best = self.reported, self.reference, self.best
        question = (
            "Does a classifier become more accurate when selected synthetic tiles are added to its"
            " labelled ones?"
        )
        before = self.mean(real, split, "accuracy") if real else None
        after = self.mean(best, split, "accuracy") if best else None
        found = best and self.difference(best, split, "accuracy")
        if not (real and best and found) or None in (before, after, found.mean):
            missing = real.label if real and before is None else "an arm with selected tiles"
            return question, f"Not known yet: {missing} has no results on {split}."
        text = (
            f"{_verdict(found)}: accuracy on {split} is {percent(before)}% for “{real.label}” and"
            f" {percent(after)}% for “{best.label}”, the selected arm that is best on"
            f" {self.table.splits[0]}: {points(found.mean)} percent points"
        )
        if found.low is not None:
            text += f", 95% interval {points(found.low)} to {points(found.high)}"
        if found.p_holm is not None:
            text += f", p = {p_value(found.p_holm)} after Holm's correction"
        return question, text + (f" ({found.note})." if found.note else ".")

    def headline(self) -> str:
        """The table in one line."""
        broken = [row for row in self.table.rows if row.status != "done"]
        missing = f"; {len(broken)} of {len(self.table.rows)} rows are not complete" * bool(broken)
        split, real = self.reported, self.reference
        value = self.mean(real, split, "accuracy") if real else None
        if value is None:
            return (
                f"{self.table.name}: no results of the reference {self.table.reference}" + missing
            )
        text = f"accuracy on {split}: {percent(value)}% {real.label}"
        best = self.best
        found = best and self.difference(best, split, "accuracy")
        if found and found.mean is not None:
            sure = "" if found.p_holm is None else f", p = {p_value(found.p_holm)} (Holm)"
            text += (
                f", {points(found.mean)} with {best.label} (best on {self.table.splits[0]}){sure}"
            )
        return text + missing


def _verdict(found: Difference) -> str:
    if found.low is None or found.high is None:
        return "Not tested"
    if found.low <= 0 <= found.high:
        return "Not shown"
    if found.p_holm is None or found.p_holm >= 0.05:
        return "Perhaps"
    return "Yes" if found.low > 0 else "No, it makes it worse"


def p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


# Cells


def difference_cell(found: Difference | None) -> str:
    """`+3.1 [+0.4, +5.9] *`."""
    if found is None or found.mean is None:
        return ""
    text = points(found.mean)
    if found.low is not None:
        text += f" [{points(found.low)}, {points(found.high)}]"
    mark = stars(found.p_holm)
    return f"{text} {mark}" if mark else text


def tiles_cell(row: Row) -> str:
    """`300 + 141 (of 150)`: real and synthetic tiles, and how many were asked for."""
    if row.images is None:
        return ""
    if row.kind not in ("synthetic", "pseudo"):
        return f"{row.images:,}"
    synthetic = row.synthetic or 0
    text = f"{row.images - synthetic:,} + {synthetic:,}"
    if row.wanted is not None and synthetic < row.wanted:
        text += f" (of {row.wanted:,})"
    return text


def status_cell(row: Row) -> str:
    """Why a row has no numbers; empty where it has some."""
    if row.status not in STATUS:
        return ""
    if not row.failures:
        return STATUS[row.status]
    # A job is called by its row, whose name stands in the first column.
    _, _, own = row.failures[-1].partition(f"{row.label}, ")
    return f"{STATUS[row.status]}: {shortened(own or row.failures[-1])}"


def paper_cell(numbers: dict[str, Any] | None, sign: bool = False) -> str:
    """Published numbers (percent, or points with their sign), as they are written in the YAML."""
    found = []
    for metric, value in (numbers or {}).items():
        if value is None:
            continue
        shown = f"{value:+g}".replace("-", MINUS) if sign else f"{value:g}"
        found.append(f"{word(metric)} {shown}")
    return ", ".join(found)


def fidelity_numbers(row: Row) -> dict[str, Any]:
    return (row.fidelity or {}).get("overall") or {}


def copies_numbers(row: Row) -> dict[str, Any]:
    """tiles, flagged and expected_by_chance of the pool of a row."""
    return ((row.copies or {}).get("flagged") or {}).get("all") or {}


# Tables


def text_tables(results: Results) -> list[TextTable]:
    """All tables, the split that counts first."""
    splits = [results.reported, *results.table.splits[-2::-1]]
    controls = (control_table(results, splits[0], family) for family in ("random", "pseudo"))
    further = (*controls, fidelity_table(results))
    arms = [arms_table(results, split) for split in splits]
    return arms + [table for table in further if table.rows]


def arms_table(results: Results, split: str) -> TextTable:
    """Every arm on one split."""
    table = results.table
    heads = ["trained on", "tiles", "seeds"]
    for metric in HEADLINE:
        heads.append(word(metric))
        if metric in METRICS:
            heads.append(f"Δ {word(metric)}")
    heads.append("paper")
    rows, kinds, breaks, kind = [], [], set(), None
    for row in table.rows:
        if kind is not None and row.kind != kind:
            breaks.add(len(rows))
        kind = row.kind
        mean, std = results.stats(row, split)
        label = row.label + (" †" if row.status == "partial" else "")
        cells = [label, tiles_cell(row), results.seeds(row)]
        if mean:
            for metric in HEADLINE:
                cells.append(plus_minus(mean[metric], std[metric]))
                if metric in METRICS:
                    cells.append(difference_cell(results.difference(row, split, metric)))
        else:
            cells.append(status_cell(row) or f"no results of {split}")
            cells += [""] * (len(heads) - len(cells) - 1)
        cells.append(paper_cell(table.paper.get(row.key)))
        rows.append(cells)
        best = row is results.best
        kinds.append("best" if best else "" if mean else "failed")
    gain = paper_cell(table.paper.get(PUBLISHED_GAIN), sign=True)
    best, real = results.best, results.reference
    if gain or (best and real):
        breaks.add(len(rows))
        cells = ["best selected − reference", "", ""]
        for metric in HEADLINE:
            cells.append("")
            if metric in METRICS:
                found = best and results.difference(best, split, metric)
                cells.append(difference_cell(found))
        rows.append([*cells, gain])
        kinds.append("")
    caption = arms_caption(results, split)
    numbers = set(range(1, len(heads) - 1))
    return TextTable(
        f"All arms, {split}", heads, rows, caption, numbers, kinds, breaks, f"arms-{split}"
    )


def arms_caption(results: Results, split: str) -> list[str]:
    """How to read the table of a split, a sentence or two per line, in full for the first split."""
    table, real = results.table, results.reference
    runs = results.runs(real, split) if real else []
    images = f"{runs[0]['images']:,} images of {split}" if runs else f"images of {split}"
    chosen = f" The epoch was chosen on {table.splits[0]}"
    chosen += ", so these numbers are optimistic." if split == table.splits[0] else "."
    refused = sorted({d.note for d in results.differences if d.split == split and d.mean is None})
    refused = [f"Not compared: {note}." for note in refused if "no predictions" not in note]
    if split != results.reported:
        return [f"On {images}, read as the table of {results.reported}.{chosen}", *refused]
    lines = [f"In percent, mean ± deviation over seeds, on {images}.{chosen}"]
    of_split = [d for d in results.differences if d.split == split and d.p is not None]
    tests = [d for d in of_split if (d.family, d.metric) == ("reference", METRICS[0])]
    to = f"“{real.label if real else table.reference}”"
    if results.by_labels:
        to = "real tiles only with as many labels"
        lines.append("Every seed has its own draw of labels, so that “seeds” counts draws too.")
    delta = f"Δ: percent points to {to}, paired by seed"
    if tests:
        unit = (
            f"{tests[0].groups} groups (patients, slides)"
            if tests[0].groups
            else "single images, as no groups are known: tiles of one slide are alike, so the"
            " intervals are too narrow if there are several"
        )
        lines += [
            f"{delta} and by image, with a 95% interval that counts the training and the test set"
            " as random.",
            f"* p < 0.05, ** p < 0.01 after Holm's correction for {len(tests)} comparisons;"
            f" resampled were {unit}.",
        ]
    else:
        lines.append(f"{delta}; not tested: that takes {FEWEST_SEEDS} seeds that both arms have.")
    if any(row.status == "partial" for row in table.rows):
        lines.append("† Not all seeds are there; see what failed.")
    if any("(of " in tiles_cell(row) for row in table.rows):
        lines.append("(of N): fewer synthetic tiles were accepted than were asked for.")
    if results.best is not None:
        lines.append(f"Bold: the selected arm that is best on {table.splits[0]}.")
    lines.append("paper: as published, on other tiles; empty where it is not known.")
    lines.append(results.updates())
    return lines + refused


CONTROLS = {  # by family of differences: how to find pairs, a title, and the question
    "random": (
        random_pairs,
        "Selected against random",
        "Is the selection worth anything? Percent points to random choice from the same pool and in"
        " the same amount",
    ),
    "pseudo": (
        pseudo_pairs,
        "Selected against pseudo-labelled real tiles",
        "Are synthetic tiles worth more than real ones that the same judge labelled? Percent points"
        " to the same number of these",
    ),
}


def control_table(results: Results, split: str, family: str) -> TextTable:
    """Selected arms against one of `CONTROLS`."""
    pairs, title, question = CONTROLS[family]
    heads = ["selected", "against", *(f"Δ {word(metric)}" for metric in METRICS), "p (accuracy)"]
    rows = []
    for key, control in pairs(results.table.rows, results.controls):
        row, other = results.rows[key], results.rows[control]
        found = [results.difference(row, split, metric, family) for metric in METRICS]
        cells = [difference_cell(one) for one in found]
        if found[0] is not None and found[0].mean is None:
            cells[0] = shortened(found[0].note)
        p = found[0] and found[0].p_holm
        rows.append([row.label, other.label, *cells, "" if p is None else p_value(p)])
    caption = [f"{question}, paired as above; p after Holm's correction."]
    numbers = set(range(2, len(heads)))
    return TextTable(f"{title}, {split}", heads, rows, caption, numbers, name=family)


def fidelity_table(results: Results) -> TextTable:
    """Fidelity and copies of the synthetic tiles, arm by arm."""
    heads = ["synthetic tiles of", "tiles", "FID", "KID × 1000", "precision", "recall"]
    heads += ["flagged as copies", "of the pool", "by chance"]
    rows, extractors, warnings = [], {}, {}
    for row in results.table.rows:
        titles = [line.partition(" of ")[0] for line in row.failures]  # of the jobs
        failed = ["failed" * (job in titles) for job in ("fidelity", "copy check")]
        if row.fidelity is None and row.copies is None and not any(failed):
            continue
        m, c = fidelity_numbers(row), copies_numbers(row)
        kid = m.get("kid")
        cells = [row.label, f"{m['images_fake']:,}" if m else ""]
        cells.append(failed[0] if m.get("fid") is None else digits(m["fid"], 4))
        parts = [] if kid is None else [digits(1000 * kid, 3), digits(1000 * m["kid_std"], 2)]
        cells.append(" ± ".join(parts))
        cells += ["" if m.get(k) is None else f"{m[k]:.3f}" for k in ("precision", "recall")]
        if row.chosen_copies:
            tiles, flagged = (row.chosen_copies[name] for name in ("tiles", "flagged"))
            cells.append(f"{flagged:,} of {tiles:,} ({share(flagged, tiles)})")
        else:
            cells.append(failed[1])
        cells += [share(c[k], c["tiles"]) if c else "" for k in ("flagged", "expected_by_chance")]
        rows.append(cells)
        if row.fidelity:
            name = (row.fidelity.get("extractor") or {}).get("name", "unknown")
            real = row.fidelity.get("real") or {}
            extractors[name, real.get("dir"), m.get("images_real")] = None
            warnings.update(dict.fromkeys(row.fidelity.get("warnings", ())))
    caption = [
        f"FID, KID, precision and recall of the chosen tiles in features of {name}, against"
        + (f" {images:,} real tiles" if images else " real tiles")
        + (f" of {folder}." if folder else ".")
        for name, folder, images in extractors
    ]
    if any(row.copies for row in results.table.rows):
        caption.append(
            "Copies: tiles that are nearer to a training tile than new tissue is, of those that"
            " were chosen (the first draw, where each seed has its own) and of the whole pool;"
            " as many as “by chance” are expected to be flagged where nothing was copied."
        )
    caption += warnings
    kept = [i for i in range(len(heads)) if any(cells[i] for cells in rows)]
    heads, rows = [heads[i] for i in kept], [[cells[i] for i in kept] for cells in rows]
    numbers = set(range(1, len(heads)))
    return TextTable("The synthetic tiles", heads, rows, caption, numbers, name="fidelity")


def digits(value: float, count: int) -> str:
    """A number with `count` digits, or with all of those before the point: never 3.37e+03."""
    return f"{value:.0f}" if abs(value) >= 10**count - 0.5 else f"{value:.{count}g}"


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


def failures(results: Results) -> list[str]:
    """One line per failed job, and what the arms warn about."""
    lines = [
        f"{row.label} ({row.status}): {line}" for row in results.table.rows for line in row.failures
    ]
    lines += [
        f"{row.label}: not run"
        for row in results.table.rows
        if row.status == "missing" and not row.failures
    ]
    return lines


def markdown(results: Results) -> str:
    """All tables, for GitHub."""
    title = results.table.title or results.table.name
    lines = [f"# {escape_markdown(title)}", "", escape_markdown(results.headline()) + ".", ""]
    for table in text_tables(results):
        lines += [f"## {table.title}", "", to_markdown(table), ""]
        lines += [f"- {escape_markdown(line)}" for line in table.caption] + [""]
    for title, notes in (("What failed", failures(results)), ("Notes", results.notes)):
        if notes:
            lines += [f"## {title}", "", *(f"- {escape_markdown(note)}" for note in notes), ""]
    return "\n".join(lines)


def csv_rows(results: Results) -> Iterable[dict[str, Any]]:
    """A row per arm and split: fractions in full precision, unknown values None."""
    table = results.table
    factors = list(dict.fromkeys(name for row in table.rows for name in row.factors))
    for row in table.rows:
        summary = row.summary or {}
        fidelity, copies = fidelity_numbers(row), copies_numbers(row)
        for split in table.splits:
            mean, std = results.stats(row, split)
            known = (summary.get("bootstrap") or {}).get(split) or {}
            cells: dict[str, Any] = {
                "row": row.key,
                "label": row.label,
                "kind": row.kind,
                "status": row.status,
                **{f"factor_{name}": row.factors.get(name) for name in factors},
                **{name: getattr(row, name) for name in ("images", "synthetic", "wanted")},
                "split": split,
                "seeds": len(results.runs(row, split)),
                **{name: summary.get(name) for name in ("updates", "epochs", "validations")},
            }
            for metric in (*HEADLINE, *OF_PROBABILITIES):
                cells[metric] = mean.get(metric)
                cells[f"{metric}_std"] = std.get(metric)
                if metric in METRICS:
                    low, high = known.get(metric) or (None, None)
                    cells |= {f"{metric}_low": low, f"{metric}_high": high}
            for family, prefix in PREFIXES.items():
                for metric in METRICS:
                    found = results.difference(row, split, metric, family)
                    name = f"{prefix}_{metric}"
                    cells[name] = found and found.mean
                    for field in ("low", "high", "p", "p_holm"):
                        cells[f"{name}_{field}"] = found and getattr(found, field)
            compared = results.difference(row, split, METRICS[0])
            cells["compared_groups"] = compared and compared.groups
            cells["compared_note"] = compared and compared.note
            for name in ("fid", "kid", "kid_std", "precision", "recall"):
                cells[f"fidelity_{name}"] = fidelity.get(name)
            for name in ("flagged", "tiles", "expected_by_chance"):
                cells[f"copies_{name}"] = copies.get(name)
            for name in ("flagged", "tiles"):
                cells[f"chosen_copies_{name}"] = (row.chosen_copies or {}).get(name)
            for metric in HEADLINE:
                cells[f"paper_{metric}"] = (table.paper.get(row.key) or {}).get(metric)
            cells["failures"] = "; ".join(row.failures)
            yield cells
