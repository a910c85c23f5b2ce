"""From the files that jobs left behind to the `Table` that is printed."""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.cli import existing_path
from ldm.errors import UserError
from ldm.experiment.jobs import ROOT, Standing, State
from ldm.experiment.numbers import read_json
from ldm.experiment.plan import REAL, Arm, Plan
from ldm.experiment.results import Row, Table
from ldm.experiment.settings import nearest
from ldm.files import write_json
from ldm.run import git_revision, hardware, versions

log = logging.getLogger(__name__)

SUMMARY, RESULT = "summary.json", "result.json"
SPLITS = ("val", "test")
DIFFERENCE = "selected - real"  # key of what the paper says about its best arm


def gather(plan: Plan, standing: Mapping[str, Standing]) -> Table:
    """The table as far as its jobs have come.

    Args:
        standing: Of all jobs, see `ldm.experiment.jobs.Records.survey`.
    """
    rows = [gather_row(plan, arm, standing) for arm in plan.rows]
    done = [row.summary for row in rows if row.summary]
    classes = next((_classes(summary) for summary in done), [])
    names = [name for name, *_ in plan.combinations()]
    umaps = [plan.features(name) for name in dict.fromkeys(names)]
    settings = plan.settings
    return Table(
        name=settings.name,
        title=settings.title or settings.name,
        rows=rows,
        reference=REAL,
        splits=[s for s in SPLITS if not done or any(s in x["per_seed"][0] for x in done)],
        classes=classes,
        settings=plan.describe(),
        paper=read_paper(settings.paper, settings.name, [row.key for row in rows]),
        umap=next((folder for folder in umaps if (folder / "umap.png").is_file()), None),
        record={
            "versions": versions(),
            "hardware": hardware(),
            "revision": git_revision(),
            "jobs": {
                name: {
                    "title": one.job.title,
                    "state": one.state.value,
                    "command": one.record.command if one.state is State.DONE else None,
                    "number": one.record.number if one.state is State.DONE else None,
                    "seconds": one.record.seconds if one.record else None,
                }
                for name, one in standing.items()
            },
        },
    )


def gather_row(plan: Plan, arm: Arm, standing: Mapping[str, Standing]) -> Row:
    """One row, whatever became of its jobs."""
    done = {s: j for s, j in arm.jobs.items() if standing[j].state is State.DONE}
    folders = {seed: _result_folder(arm, seed) for seed in done}
    summary = merge(plan, arm, folders) if folders else None
    jobs = [*arm.jobs.values(), *arm.other_jobs]
    states = [standing[job].state for job in arm.jobs.values()]
    if all(state is State.DONE for state in states):
        status = "done"
    elif done:
        status = "partial"
    elif any(state in (State.FAILED, State.BLOCKED) for state in states):
        status = "failed"
    else:
        status = "missing"
    selection = None
    if arm.kind == "synthetic":
        folder = next(iter(arm.folders.values()))  # the first draw, where there are several
        if standing[f"select-{folder}"].state is State.DONE:
            selection = plan.data / folder
    counts = _selection_counts(selection)
    samples = plan.samples(arm.generator) if arm.generator else None
    pool = plan.copies(arm.generator) if arm.generator else None
    copies = _read_if_done(pool and pool / "report.json", f"copies-{arm.generator}", standing)
    images = summary.get("n_train") if summary else None
    return Row(
        key=arm.key,
        label=arm.label,
        factors=arm.factors,
        kind=arm.kind,
        status=status,
        failures=_failures(jobs, standing),
        images=images,
        synthetic=counts if selection else (0 if images is not None else None),
        wanted=arm.wanted,
        seeds=len(arm.jobs),
        summary=summary,
        predictions=_predictions(folders),
        fidelity=_read_if_done(arm.fidelity, f"fidelity-{arm.key}", standing),
        copies=copies,
        chosen_copies=_chosen_copies(selection, pool) if copies and selection and pool else None,
        samples=samples if samples and samples.is_dir() else None,
        selection=selection,
    )


def _result_folder(arm: Arm, seed: int) -> Path:
    assert arm.results is not None
    return arm.results / str(arm.folders[seed]) / f"seed{seed}"


def merge(plan: Plan, arm: Arm, folders: Mapping[int, Path]) -> dict[str, Any]:
    """summary.json over the seeds that are done, each of which another command trained.

    Patients or slides come in here: a better table of them changes intervals, not networks.
    """
    from ldm.evaluation.predictions import Predictions, predictions_name
    from ldm.evaluation.sets import GroupTable
    from ldm.evaluation.summary import OVER_IMAGES, write_summary

    places = list(folders.values())
    results = [read_json(place / RESULT) for place in places]
    data, groups = plan.settings.data, {}
    if data.groups is not None:
        table = GroupTable(Path(data.groups).expanduser(), data.group_column)
        for split in SPLITS:
            file = places[0] / predictions_name(split)
            if file.is_file():
                groups[split] = table.groups(split, Predictions.read(file).paths)
    # What eval.py said about the sets.
    said = [place.parent / SUMMARY for place in places]
    notes = [note for file in said if file.is_file() for note in read_json(file).get("notes", [])]
    if groups:
        notes = [note for note in notes if note != OVER_IMAGES]
    assert arm.results is not None
    return write_summary(arm.results, arm.key, results, places, groups, notes)


def _predictions(folders: Mapping[int, Path]) -> dict[int, dict[str, Path]]:
    found = {}
    for seed, folder in folders.items():
        files = {split: folder / f"predictions_{split}.csv" for split in SPLITS}
        found[seed] = {split: path for split, path in files.items() if path.is_file()}
    return {seed: files for seed, files in found.items() if files}


def _selection_counts(folder: Path | None) -> int | None:
    """Synthetic tiles in a training folder."""
    if folder is None:
        return None
    counts = read_json(folder / "selection.json")["counts"].values()
    return sum(row["accepted"] + row["filled"] for row in counts)


def _chosen_copies(selection: Path, pool: Path) -> dict[str, int]:
    """How many of the synthetic tiles in a training folder the check of their pool flagged."""
    from ldm.selection.select import USED
    from ldm.selection.training_folder import read_decisions

    decisions = read_decisions(selection, "selection")
    chosen = {name for name, decision in decisions.items() if decision in USED}
    with (pool / "copies.csv").open(newline="") as stream:
        flagged = {row["file"] for row in csv.DictReader(stream) if row["flagged"] == "yes"}
    return {"tiles": len(chosen), "flagged": len(chosen & flagged)}


def _failures(jobs: list[str], standing: Mapping[str, Standing]) -> list[str]:
    """A line per failed job that the row needs, each once."""
    found: dict[str, str] = {}
    for job in jobs:
        one = standing[job]
        if one.state is State.BLOCKED:
            one = standing[one.blocked_by]
        if one.state is State.FAILED:
            reason = one.record.reason if one.record else "unknown"
            found[one.job.name] = f"{one.job.title}: {reason}"
    return list(found.values())


def _read_if_done(
    path: Path | None, job: str, standing: Mapping[str, Standing]
) -> dict[str, Any] | None:
    if path is None or job not in standing or standing[job].state is not State.DONE:
        return None
    return read_json(path)


def _classes(summary: Mapping[str, Any]) -> list[str]:
    return list(summary["per_seed"][0]["val"]["per_class"])


def read_paper(path: str | None, table: str, keys: list[str]) -> dict[str, dict[str, float]]:
    """The numbers of the paper for one table: row key -> metric -> value, empty cells left out.

    Raises:
        UserError: No such file, or a row that the table does not have.
    """
    import yaml

    if path is None:
        return {}
    given = Path(path)
    source = given if given.is_file() else existing_path(ROOT / given, "paper", "file")
    try:
        content = yaml.safe_load(source.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"paper {source}: no YAML: {str(error).splitlines()[0]}") from None
    rows = content.get(table) or {}
    known = [DIFFERENCE, *keys]
    found = {}
    for key, cells in rows.items():
        if key not in known:
            raise UserError(f"paper {source}: {table} has no row {key}; {nearest(str(key), known)}")
        values = {metric: value for metric, value in (cells or {}).items() if value is not None}
        if values:
            found[key] = values
    return found


def write_json_table(table: Table, path: Path) -> None:
    """Everything of a table, for programs."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value

    write_json(path, plain(dataclasses.asdict(table)))
