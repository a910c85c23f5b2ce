"""Classification metrics of a whole set, from one confusion matrix or from all probabilities.

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
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import rankdata

HEADLINE = ("accuracy", "macro_f1", "sensitivity", "specificity")
OF_PROBABILITIES = ("auc", "calibration_error")  # not in results of earlier versions
CALIBRATION_BINS = 15


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, num_classes: int) -> np.ndarray:
    """Counts (K, K) int64, true class by row and predicted class by column, of (N,) integers."""
    true, predicted = np.asarray(labels), np.asarray(predictions)
    assert true.ndim == 1 and true.shape == predicted.shape, (true.shape, predicted.shape)
    assert all(((v >= 0) & (v < num_classes)).all() for v in (true, predicted)), num_classes
    pairs = true.astype(np.int64) * num_classes + predicted.astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def scores(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro and per-class metrics, as JSON can hold them, of counts (K, K)."""
    confusion = np.asarray(confusion)
    assert confusion.shape == (len(classes), len(classes)), (confusion.shape, classes)
    total = int(confusion.sum())
    assert total, "metrics of a set without images are undefined"
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
            **{key: _mean(values[k : k + 1]) for key, values in columns.items()},
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


def calibration_error(
    probabilities: ArrayLike, labels: ArrayLike, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error in [0, 1] (Guo et al. 2017, eq. 5), of the predicted class.

    Images are sorted into `bins` equal ranges of their highest probability; the error is the mean
    over the images of |accuracy - mean confidence| of their range.

    Args:
        probabilities: (N, K), rows sum to 1.
        labels: True classes, (N,).
    """
    p, true = _checked(probabilities, labels)
    confidence = p.max(axis=1)  # (N,)
    correct = p.argmax(axis=1) == true
    where = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # ranges (low, high]
    # |sum correct - sum confidence| of a range is its size times its gap.
    gaps = np.bincount(where, correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def macro_auc(probabilities: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve, the mean over classes of each against the rest.

    The area of a class is the probability that an image of it has a higher probability of it than
    another image, equal ones counting half (Hand & Till 2001). Classes without images, and one that
    has all, are left out; None if there is no other.

    Args:
        probabilities, labels: As for `calibration_error`.
    """
    p, true = _checked(probabilities, labels)
    own = true[:, None] == np.arange(p.shape[1])  # (N, K)
    positive = own.sum(axis=0)  # (K,)
    pairs = positive * (len(p) - positive)
    ranks = (rankdata(p, axis=0) * own).sum(axis=0)
    above = ranks - positive * (positive + 1) / 2  # pairs in the right order
    return _mean(np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0))


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    p, true = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    assert p.ndim == 2 and true.shape == p.shape[:1] and len(p), (p.shape, true.shape)
    assert np.allclose(p.sum(axis=1), 1, atol=1e-4), "the probabilities of an image sum to 1"
    return p, true


def mean_and_std(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean and sample standard deviation (n - 1) of the headline metrics over repeated runs.

    The deviation of a single run is None: it is unknown, not zero. `OF_PROBABILITIES` are there
    where all runs have them.
    """
    mean, std = {}, {}
    extra = [name for name in OF_PROBABILITIES if all(name in run for run in runs)]
    for name in [*HEADLINE, *extra]:
        values = [run[name] for run in runs]
        defined = None not in values
        mean[name] = float(np.mean(values)) if defined else None
        std[name] = float(np.std(values, ddof=1)) if defined and len(values) > 1 else None
    return mean, std


def format_summary(summary: dict[str, Any]) -> str:
    """The table that `eval.py` prints: a row per seed, mean and deviation, a row per class."""
    split, runs = summary["split"], summary["per_seed"]
    rows = [
        {
            "seed": str(run["seed"]),
            "epoch": "-" if run["best_epoch"] is None else str(run["best_epoch"]),
            "val acc": run["val"]["accuracy"],
            **run[split],
        }
        for run in runs
    ]
    if len(runs) > 1:
        rows += [{"seed": "mean", **summary["mean"]}, {"seed": "deviation", **summary["std"]}]
    lines = [
        f"{summary['train_folder']}: {summary['arch']} on {summary['n_train']} images,"
        f" {split} set of {summary['n_' + split]} images",
        _table(rows, ["seed", "epoch"], ["val acc", *HEADLINE, "auc"]),
    ]
    interval = summary.get("bootstrap", {}).get(split)
    if interval:
        lines.append(format_intervals(interval))
    lines += ["", format_per_class([run[split] for run in runs])]
    notes = summary.get("notes", [])
    if split == "val" and VAL_WARNING not in notes:
        notes = [*notes, VAL_WARNING]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return "\n".join(lines)


def format_intervals(interval: dict[str, Any]) -> str:
    """What `ldm.evaluation.bootstrap.intervals` gives, on a line."""
    of = "images" if interval["groups"] is None else f"{interval['groups']} groups"
    ranges = ", ".join(
        f"{name} {interval[name][0]:.4f} to {interval[name][1]:.4f}"
        for name in ("accuracy", "macro_f1")
    )
    return f"{interval['level']:.0%} over {of}: {ranges}"


VAL_WARNING = (
    "There is no test folder, so these numbers are of val, on which the epoch was chosen too:"
    " they are optimistic."
)


def format_per_class(runs: Sequence[dict[str, Any]]) -> str:
    """A row per class, each metric averaged over the runs where it is defined."""
    metrics = ["precision", "sensitivity", "specificity", "f1"]
    rows = []
    for name, first in runs[0]["per_class"].items():
        values = np.array([[run["per_class"][name][key] for key in metrics] for run in runs], float)
        means = map(_mean, values.T)
        rows.append(
            {"class": name, "images": first["images"], **dict(zip(metrics, means, strict=True))}
        )
    return _table(rows, ["class", "images"], metrics)


def _table(rows: Sequence[dict[str, Any]], names: list[str], numbers: list[str]) -> str:
    """Text of a table; a number that is missing or None is `-`."""
    table = pd.DataFrame(rows, columns=[*names, *numbers]).astype(dict.fromkeys(numbers, float))
    return table.to_string(index=False, float_format="{:.4f}".format, na_rep="-")


def _mean(values: np.ndarray) -> float | None:
    """Mean of the defined values; None when there are none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None
