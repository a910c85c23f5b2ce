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

MATRIX, PER_CLASS, PICTURE = "confusion.csv", "per_class.csv", "confusion.png"
METRICS = ("precision", "sensitivity", "specificity", "f1")
WIDE_LABELS = 6  # characters of a class name above which column labels are tilted


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
    write_bytes(folder / PICTURE, draw_confusion(counts.mean(axis=0), names, title))


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([head, *rows])
    write_text(path, stream.getvalue())


def draw_confusion(counts: np.ndarray, classes: Sequence[str], title: str) -> bytes:
    """A PNG: colours are shares of the true class (rows), numbers are shares and images.

    Args:
        counts: (K, K), rows are true classes; means over seeds need not be whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    k = len(classes)
    images = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(images, 1)
    side = 1.8 + 0.72 * k
    figure = Figure(figsize=(max(side + 0.6, 4.2), max(side, 3.4)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, fraction=0.046, label="share of the true class")
    for i in range(k):
        for j in range(k):
            if not counts[i, j]:
                continue
            number = f"{counts[i, j]:.0f}" if counts[i, j] % 1 == 0 else f"{counts[i, j]:.1f}"
            axes.text(
                j, i, f"{100 * shares[i, j]:.0f}%\n{number}", ha="center", va="center", fontsize=8,
                color="white" if shares[i, j] > 0.7 else "black",
            )  # fmt: skip
    tilted = max(map(len, classes)) > WIDE_LABELS
    axes.set_xticks(
        range(k), classes, rotation=40 if tilted else 0, ha="right" if tilted else "center"
    )
    axes.set_yticks(range(k), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    figure.suptitle(title, fontsize=10, wrap=True)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
