"""The number that is shown beside a finished job, read from what it wrote."""

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

from ldm.experiment.jobs import Job


def key_number(job: Job) -> str:
    """The key number of a job's result, in words; empty where there is nothing to say."""
    read = _READERS.get(job.kind)
    if read is None:
        return ""
    try:
        return read(job.output[0])
    except (OSError, LookupError, ValueError, TypeError, StopIteration):
        return ""  # something to show, not to fail for


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file."""
    return json.loads(path.read_text())


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header line."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _training(run: Path) -> str:
    result = run / "result.json"
    if result.is_file():
        accuracy = read_json(result)["best"]["val/accuracy"]
        return f"accuracy {accuracy:.2f} on val, over all noise levels"
    from ldm.run import RunFolder

    values: dict[str, float] = {}
    for row in RunFolder(run).read_metrics():
        values |= row
    if "val/aux_accuracy" in values:
        return f"auxiliary accuracy {values['val/aux_accuracy']:.2f} on val"
    if "val/psnr" in values:
        return f"PSNR {values['val/psnr']:.1f} dB on val"
    return f"loss {values['val/loss_simple_ema']:.3f} on val"


def _samples(pool: Path) -> str:
    rows = read_csv(pool / "manifest.csv")
    words = f"{len(rows)} tiles"
    try:
        probability = fmean(float(row["prob"]) for row in rows)
        return f"{words}, probability of the wanted class {probability:.2f}"
    except (LookupError, ValueError):
        return words  # no classifier guided


def _selection(folder: Path) -> str:
    counts = read_json(folder / "selection.json")["counts"].values()
    used = sum(row["accepted"] + row["filled"] for row in counts)
    return f"{used} of {sum(row['wanted'] for row in counts)} wanted"


def _accuracy(results: Path) -> str:
    content = read_json(next(results.rglob("result.json")))
    split = content["split"]
    return f"accuracy {content[split]['accuracy']:.3f} on {split}"


def _copies(folder: Path) -> str:
    row = read_json(folder / "report.json")["flagged"]["all"]
    return f"{row['flagged']} of {row['tiles']} flagged"


_READERS = {
    "tiles": lambda folder: f"{sum(1 for _ in folder.rglob('*.png'))} tiles",
    "train": _training,
    "sample": _samples,
    "features": lambda folder: f"{len(read_csv(folder / 'umap.csv'))} points",
    "select": _selection,
    "eval": _accuracy,
    "baseline": _accuracy,
    "copies": _copies,
}
