"""What a classifier said about each image of a set: its metrics, and a CSV to compare arms with.

Letters: N images, K classes.
"""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldm.errors import UserError
from ldm.evaluation.metrics import calibration_error, confusion_matrix, macro_auc, scores
from ldm.files import write_text

COLUMNS = ("path", "group", "label", "predicted")
PROBABILITY = "p_"


def predictions_name(split: str) -> str:
    return f"predictions_{split}.csv"


@dataclass
class Predictions:
    """Predictions for the images of a set, in the order of the set."""

    classes: list[str]  # K names in label order
    paths: list[str]  # below the folder of the set, with `/`
    labels: np.ndarray  # true classes, (N,) int64
    predicted: np.ndarray  # likewise, of the classifier
    probabilities: np.ndarray  # (N, K), rows sum to 1
    groups: list[str] | None = None  # patient, slide or region of each image; None where unknown

    @classmethod
    def of(cls, tiles, probabilities: np.ndarray) -> "Predictions":
        """Predictions for a set, an `ldm.evaluation.sets.TransformedTiles`, by their (N, K)."""
        labels, predicted = np.array(tiles.labels), probabilities.argmax(axis=1)
        names = tiles.relative_paths
        return cls(tiles.classes, names, labels, predicted, probabilities, tiles.groups)

    def scores(self) -> dict[str, Any]:
        """`ldm.evaluation.metrics.scores` of the set, its `auc` and `calibration_error`."""
        matrix = confusion_matrix(self.labels, self.predicted, len(self.classes))
        return {
            **scores(matrix, self.classes),
            "auc": macro_auc(self.probabilities, self.labels),
            "calibration_error": calibration_error(self.probabilities, self.labels),
        }

    def write(self, path: Path) -> None:
        """Columns path, group, label, predicted and p_CLASS for each class."""
        names = np.array(self.classes)
        columns = (self.paths, self.groups or "", names[self.labels], names[self.predicted])
        table = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
        shares = pd.DataFrame(self.probabilities, columns=[PROBABILITY + c for c in self.classes])
        # Nine digits give float32 back exactly.
        text = table.join(shares).to_csv(index=False, float_format="%.9g", lineterminator="\n")
        write_text(path, text)

    @classmethod
    def read(cls, path: Path) -> "Predictions":
        """Read what `write` wrote; UserError for another table."""
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
            if tuple(table.columns[: len(COLUMNS)]) != COLUMNS or table.empty:
                raise ValueError("no such columns, or no rows")
            paths, groups, labels, predicted = (table[name].tolist() for name in COLUMNS)
            names = [name.removeprefix(PROBABILITY) for name in table.columns[len(COLUMNS) :]]
            number = {name: k for k, name in enumerate(names)}
            probabilities = table.iloc[:, len(COLUMNS) :].to_numpy(np.float64)
            if not np.allclose(probabilities.sum(axis=1), 1, atol=1e-4):
                raise ValueError("the probabilities of an image do not sum to 1")
            return cls(
                names,
                paths,
                np.array([number[name] for name in labels]),
                np.array([number[name] for name in predicted]),
                probabilities,
                groups if all(groups) else None,
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}: not a table of predictions ({error}); remove it, or the folder of its"
                " run, and run again"
            ) from None


def check_same_images(a: Predictions, b: Predictions, name_a: str, name_b: str) -> None:
    """Raise a UserError unless two sets of predictions are of the same images in the same order."""
    if a.classes != b.classes:
        raise UserError(f"{name_a} has classes {a.classes}, {name_b} {b.classes}; not comparable")
    rows = (zip(one.paths, np.array(one.classes)[one.labels], strict=True) for one in (a, b))
    for number, (one, other) in enumerate(zip_longest(*rows), 1):
        if one != other:
            in_a, in_b = (f"{row[0]} ({row[1]})" if row else "nothing" for row in (one, other))
            raise UserError(
                f"{name_a} has {in_a} in row {number}, {name_b} {in_b}; evaluate both on the same"
                " set"
            )
    if a.groups != b.groups:
        raise UserError(f"{name_a} and {name_b} have different groups; evaluate both with the same")
