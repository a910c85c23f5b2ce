"""Which classes are taken for which: tables and a picture beside summary.json.

Letters: K classes, S seeds.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.files import write_bytes, write_text
from ldm.report.plots import confusion_picture

MATRIX, PER_CLASS, PICTURE = "confusion.csv", "per_class.csv", "confusion.png"
METRICS = ("precision", "sensitivity", "specificity", "f1")


def write_confusion(folder: Path, summary: dict[str, Any]) -> None:
    """Write confusion.csv and per_class.csv of val and test, and confusion.png of what is reported.

    Args:
        summary: Content of summary.json.
    """
    runs = summary["per_seed"]
    matrices, classes = [], []
    for split in ("val", "test"):
        for run in runs:
            if split not in run:
                continue
            values = run[split]
            names = list(values["per_class"])
            for name, row in zip(names, values["confusion"], strict=True):
                matrices.append([split, run["seed"], name, *row])
            for name, row in values["per_class"].items():
                cells = ["" if row[key] is None else f"{row[key]:.6g}" for key in METRICS]
                classes.append([split, run["seed"], name, row["images"], row["predicted"], *cells])
    _write_csv(folder / MATRIX, ["split", "seed", "label", *names], matrices)
    head = ["split", "seed", "class", "images", "predicted", *METRICS]
    _write_csv(folder / PER_CLASS, head, classes)
    split = summary["split"]
    counts = np.array([run[split]["confusion"] for run in runs])  # (S, K, K)
    title = f"{summary['train_folder']}: {summary['arch']}, {split} set"
    if len(runs) > 1:
        title += f", mean of {len(runs)} seeds"
    write_bytes(folder / PICTURE, confusion_picture(counts.mean(axis=0), names, title))


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([head, *rows])
    write_text(path, stream.getvalue())
