"""From the files that jobs left behind to the `Table` that is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.cli import existing_path, nearest
from ldm.config import read_yaml, resolve
from ldm.errors import UserError
from ldm.evaluation.predictions import Predictions, predictions_name
from ldm.evaluation.summary import OVER_IMAGES, SPLITS, SUMMARY, write_summary
from ldm.experiment.jobs import Standing, State
from ldm.experiment.numbers import read_csv, read_json
from ldm.experiment.plan import REAL, Arm, Plan
from ldm.experiment.results import PUBLISHED_GAIN, Row, Table
from ldm.files import remove_leftovers, write_text
from ldm.run import git_revision, hardware, versions


def gather(plan: Plan, standing: Mapping[str, Standing]) -> Table:
    """The table as far as its jobs have come; it is written to OUT/table.json, too."""
    rows = [gather_row(plan, arm, standing) for arm in plan.rows]
    done = [row.summary for row in rows if row.summary]
    classes = list(done[0]["per_seed"][0]["val"]["per_class"]) if done else []
    pools = dict.fromkeys(arm.generator for arm in plan.rows if arm.generator)
    umaps = [plan.out / "features" / pool for pool in pools]
    settings = plan.settings
    table = Table(
        name=settings.name,
        title=settings.title or settings.name,
        rows=rows,
        reference=next(row.key for row in rows if row.kind == REAL),
        splits=[s for s in SPLITS if not done or any(s in x["per_seed"][0] for x in done)],
        classes=classes,
        settings=settings.model_dump(),
        paper=read_paper(settings.paper, settings.name, [row.key for row in rows]),
        umap=next((folder for folder in umaps if (folder / "umap.png").is_file()), None),
        record={
            "versions": versions(),
            "hardware": hardware(),
            "revision": git_revision(),
            "jobs": {
                name: {
                    "title": one.job.title,
                    "kind": one.job.kind,
                    "state": one.state.value,
                    "command": one.record.command if one.state is State.DONE else None,
                    "number": one.record.number if one.state is State.DONE else None,
                    "seconds": one.record.seconds if one.record else None,
                }
                for name, one in standing.items()
            },
        },
        models=_models(plan, standing),
        pools=_pools(plan, standing),
    )
    content = json.dumps(dataclasses.asdict(table), indent=2, default=str)
    remove_leftovers(plan.out)
    write_text(plan.out / "table.json", f"{content}\n")
    return table


def _models(plan: Plan, standing: Mapping[str, Standing]) -> dict[str, tuple[str, Path]]:
    """Label and run folder of the models from elsewhere, and of those that are trained."""
    found = {}
    for name, model in plan.settings.models.items():
        if model.run is not None:
            path = plan.model(name)
            found[name] = model.label or name, path if path.is_dir() else path.parents[1]
    for one in standing.values():
        if one.job.kind == "train" and one.state is State.DONE:
            (folder,) = one.job.output
            found[folder.name] = one.job.title, folder
    return found


def _pools(plan: Plan, standing: Mapping[str, Standing]) -> dict[str, tuple[str, Path]]:
    """Label and folder of the first pool of each generator."""
    found: dict[str, tuple[str, Path]] = {}
    for one in standing.values():
        if one.job.kind == "sample" and one.job.output[0].is_dir():
            (folder,) = one.job.output
            name = folder.name.partition("@")[0]
            found.setdefault(name, (plan.settings.generators[name].label or name, folder))
    return found


def gather_row(plan: Plan, arm: Arm, standing: Mapping[str, Standing]) -> Row:
    """One row, whatever became of its jobs."""

    def is_done(job: str) -> bool:
        return job in standing and standing[job].state is State.DONE

    places = {seed: arm.places[seed] for seed, job in arm.jobs.items() if is_done(job)}
    summary = merge(plan, arm, places) if places else None
    images = summary.get("n_train") if summary else None
    predictions = {seed: _predictions(place) for seed, place in places.items()}
    first = arm.first or arm.key
    found: dict[str, Any] = dict.fromkeys(
        ("fidelity", "copies", "chosen_copies", "samples", "selection")
    )
    if is_done(f"fidelity-{first}"):
        found["fidelity"] = read_json(plan.out / "fidelity" / f"{first}.json")
    synthetic = None if images is None else 0
    if arm.generator is not None:
        samples, pool = (plan.out / part / arm.generator for part in ("samples", "copies"))
        found["samples"] = samples if samples.is_dir() else None
        if is_done(f"copies-{arm.generator}"):
            found["copies"] = read_json(pool / "report.json")
        folder = next(iter(arm.folders.values()))  # the first draw, where there are several
        if is_done(f"select-{folder}"):
            found["selection"] = selection = plan.data / folder
            counts = read_json(selection / "selection.json")["counts"].values()
            synthetic = sum(one["accepted"] + one["filled"] for one in counts)
            if found["copies"]:
                found["chosen_copies"] = _chosen_copies(selection, pool)
    return Row(
        key=arm.key,
        label=arm.label,
        factors=arm.factors,
        kind=arm.kind,
        status=_status([standing[job].state for job in arm.jobs.values()]),
        failures=_failures([*arm.jobs.values(), *arm.other_jobs], standing),
        images=images,
        synthetic=synthetic,
        wanted=arm.wanted,
        seeds=len(arm.jobs),
        summary=summary,
        predictions={seed: files for seed, files in predictions.items() if files},
        **found,
    )


def _status(states: Sequence[State]) -> str:
    if all(state is State.DONE for state in states):
        return "done"
    if State.DONE in states:
        return "partial"
    return "failed" if {State.FAILED, State.BLOCKED} & set(states) else "missing"


def merge(plan: Plan, arm: Arm, places: Mapping[int, Path]) -> dict[str, Any]:
    """summary.json over the seeds (or draws) that are done, each of which another command trained.

    Patients or slides come in here: a better table of them changes intervals, not networks.
    """
    from ldm.evaluation.sets import GroupTable

    results = [read_json(place / "result.json") | {"seed": s} for s, place in places.items()]
    data, groups = plan.settings.data, {}
    if data.groups is not None:
        table = GroupTable(Path(data.groups).expanduser(), data.group_column)
        for split, file in _predictions(next(iter(places.values()))).items():
            groups[split] = table.groups(split, Predictions.read(file).paths)
    # What eval.py said about the sets.
    said = [place.parent / SUMMARY for place in places.values()]
    notes = [note for file in said if file.is_file() for note in read_json(file).get("notes", [])]
    if groups:
        notes = [note for note in notes if note != OVER_IMAGES]
    folders = list(places.values())
    return write_summary(plan.out / "eval" / arm.key, arm.key, results, folders, groups, notes)


def _predictions(place: Path) -> dict[str, Path]:
    """The predictions of a network by split, as far as they are there."""
    files = {split: place / predictions_name(split) for split in SPLITS}
    return {split: path for split, path in files.items() if path.is_file()}


def _chosen_copies(selection: Path, pool: Path) -> dict[str, int]:
    """How many of the synthetic tiles in a training folder the check of their pool flagged."""
    from ldm.selection.select import USED
    from ldm.selection.training_folder import read_decisions

    decisions = read_decisions(selection, "selection")
    chosen = {name for name, decision in decisions.items() if decision in USED}
    flagged = {row["file"] for row in read_csv(pool / "copies.csv") if row["flagged"] == "yes"}
    return {"tiles": len(chosen), "flagged": len(chosen & flagged)}


def _failures(jobs: Sequence[str], standing: Mapping[str, Standing]) -> list[str]:
    found: dict[str, str] = {}
    for job in jobs:
        one = standing[job]
        if one.state is State.BLOCKED:
            one = standing[one.blocked_by]
        if one.state is State.FAILED:
            reason = one.record.reason if one.record else "unknown"
            found[one.job.name] = f"{one.job.title}: {reason}"
    return list(found.values())


def read_paper(path: str | None, table: str, keys: list[str]) -> dict[str, dict[str, float]]:
    """The numbers of the paper for one table: row key -> metric -> value, empty cells left out."""
    if path is None:
        return {}
    source = existing_path(path, "paper", "file")
    rows = resolve(read_yaml(source)).get(table) or {}
    known = [PUBLISHED_GAIN, *keys]
    found = {}
    for key, cells in rows.items():
        if key not in known:
            raise UserError(f"paper {source}: {table} has no row {key}{nearest(key, known)}")
        values = {metric: value for metric, value in (cells or {}).items() if value is not None}
        if values:
            found[key] = values
    return found
