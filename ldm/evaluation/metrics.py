"""Classification metrics of a whole set, all from one confusion matrix.

Letters: N images, K classes. Macro metrics are not means over batches: a loader sorted by class
gives batches of one class, and the mean of their macro F1 has little to do with that of the set.

Conventions, for class k with TP, FP, FN, TN against the rest:

    sensitivity = TP / (TP + FN)      specificity = TN / (TN + FP)
    precision   = TP / (TP + FP)      f1 = 2 TP / (2 TP + FP + FN)

A class that is never predicted has sensitivity and F1 0. A quotient 0 / 0 (the sensitivity of a
class without images, say) is undefined: None for that class and left out of the macro mean, as
scikit-learn leaves labels that do not occur out of its macro F1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

HEADLINE = ("accuracy", "macro_f1", "sensitivity", "specificity")


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts (K, K) int64, true class by row and predicted class by column.

    Args:
        labels: True classes, (N,) integers in [0, K).
        predictions: Predicted classes, (N,) integers in [0, K).

    Raises:
        ValueError: Lengths differ or a class is out of range.
    """
    true, predicted = np.asarray(labels), np.asarray(predictions)
    if true.ndim != 1 or true.shape != predicted.shape:
        raise ValueError(f"labels {true.shape} and predictions {predicted.shape} must both be (N,)")
    for name, values in (("labels", true), ("predictions", predicted)):
        if values.size and not (values.min() >= 0 and values.max() < num_classes):
            raise ValueError(f"{name} must be in [0, {num_classes})")
    pairs = true.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro and per-class metrics as a plain dict that JSON can hold.

    Args:
        confusion: Counts (K, K) as `confusion_matrix` gives; matrices of parts of a set add up.
        classes: K names in label order.

    Returns:
        `accuracy`, `macro_f1`, `sensitivity` (macro recall), `specificity` (macro), `images`,
        `per_class` (name -> images, predicted, precision, sensitivity, specificity, f1) and
        `confusion` (rows are true classes).

    Raises:
        ValueError: No images, or K names are not K classes.
    """
    confusion = np.asarray(confusion)
    if confusion.shape != (len(classes), len(classes)):
        raise ValueError(f"confusion matrix {confusion.shape} is not for {len(classes)} classes")
    total = int(confusion.sum())
    if total == 0:
        raise ValueError("metrics of a set without images are undefined")
    correct = np.diag(confusion)  # TP, (K,)
    images = confusion.sum(axis=1)  # TP + FN, (K,)
    predicted = confusion.sum(axis=0)  # TP + FP, (K,)
    others = total - images  # TN + FP, (K,)

    with np.errstate(invalid="ignore"):  # 0 / 0 is nan, as documented above
        columns = {
            "precision": correct / predicted,
            "sensitivity": correct / images,
            "specificity": (others - (predicted - correct)) / others,
            "f1": 2 * correct / (images + predicted),
        }
    per_class = {
        name: {
            "images": int(images[k]),
            "predicted": int(predicted[k]),
            **{key: _or_none(values[k]) for key, values in columns.items()},
        }
        for k, name in enumerate(classes)
    }
    return {
        "accuracy": float(correct.sum() / total),
        "macro_f1": _mean(columns["f1"]),
        "sensitivity": _mean(columns["sensitivity"]),
        "specificity": _mean(columns["specificity"]),
        "images": total,
        "per_class": per_class,
        "confusion": confusion.tolist(),
    }


def mean_and_std(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and sample standard deviation (n - 1) of the headline metrics over repeated runs.

    The deviation of a single run is None: it is unknown, not zero.
    """
    mean, std = {}, {}
    for name in HEADLINE:
        values = [run[name] for run in runs]
        defined = None not in values
        mean[name] = float(np.mean(values)) if defined else None
        std[name] = float(np.std(values, ddof=1)) if defined and len(values) > 1 else None
    return mean, std


def format_summary(summary: dict[str, Any]) -> str:
    """The table that `eval.py` prints: a row per seed, mean and deviation, a row per class."""
    split = summary["split"]
    runs = summary["per_seed"]
    header = f"{'seed':>10}  {'epoch':>5}  {'val acc':>7} | " + "  ".join(
        f"{name:>11}" for name in HEADLINE
    )
    lines = [
        f"{summary['train_folder']}: {summary['arch']} on {summary['n_train']} images,"
        f" {split} set of {summary['n_' + split]} images",
        header,
        "-" * len(header),
    ]

    def row(name: object, epoch: object, selected: float | None, values: dict[str, Any]) -> str:
        shown = "  ".join(f"{_shown(values[key]):>11}" for key in HEADLINE)
        return f"{name!s:>10}  {epoch!s:>5}  {_shown(selected) if selected else '':>7} | {shown}"

    for run in runs:
        lines.append(row(run["seed"], run["best_epoch"], run["val"]["accuracy"], run[split]))
    if len(runs) > 1:
        lines.append(row("mean", "", None, summary["mean"]))
        lines.append(row("deviation", "", None, summary["std"]))
    lines += ["", format_per_class([run[split] for run in runs])]
    if split == "val":
        lines += ["", VAL_WARNING]
    return "\n".join(lines)


VAL_WARNING = (
    "There is no test folder, so these numbers are of val, on which the epoch was chosen too:"
    " they are optimistic."
)


def format_per_class(runs: Sequence[dict[str, Any]]) -> str:
    """A row per class, each metric averaged over the runs."""
    keys = ("precision", "sensitivity", "specificity", "f1")
    names = list(runs[0]["per_class"])
    width = max(10, *(len(name) for name in names))
    lines = [f"{'class':>{width}}  {'images':>6}  " + "  ".join(f"{key:>11}" for key in keys)]
    for name in names:
        rows = [run["per_class"][name] for run in runs]
        cells = []
        for key in keys:
            values = [row[key] for row in rows if row[key] is not None]
            cells.append(_shown(float(np.mean(values)) if values else None))
        shown = "  ".join(f"{cell:>11}" for cell in cells)
        lines.append(f"{name:>{width}}  {rows[0]['images']:>6}  {shown}")
    return "\n".join(lines)


def _mean(values: np.ndarray) -> float | None:
    """Mean of the defined values; None when there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
