"""Which synthetic images are used, and a record of every decision.

Letters: N images, K classes. A synthetic image of class k is looked at for class k alone:

    accepted   a candidate of the strategy, and among the wanted number of the best
    surplus    a candidate, but enough others are better
    filled     no candidate, but the best of those where candidates are too few and that was asked
    rejected   no candidate

A check of the training folder (scripts/copy_check.py) may take further ones out: `removed`.
The images in the training folder are those of the decisions in USED.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ldm.errors import UserError
from ldm.features.sets import FeatureSet
from ldm.files import csv_text
from ldm.selection.strategies import Strategy

ACCEPTED, SURPLUS, FILLED, REJECTED = "accepted", "surplus", "filled", "rejected"
REMOVED = "removed"
FILL_REASON = "fills a shortfall, though "
USED = (ACCEPTED, FILLED)  # for training
KINDS = (ACCEPTED, SURPLUS, FILLED, REJECTED)  # of a selection; a record may also have REMOVED


@dataclass(frozen=True)
class Selection:
    """Decisions for all images, class by class: accepted, surplus, filled, rejected, best first."""

    classes: list[str]  # K names
    wanted: list[int]  # images wanted of each class
    labels: np.ndarray  # class of each image, (N,)
    files: list[str]  # their paths below the synthetic folder
    decisions: list[str]  # one of KINDS each
    ranks: list[int]  # place among those that may be used, from 1; 0 when rejected
    scores: np.ndarray  # of the strategy, (N,), larger is better; not a number where there is none
    distances: np.ndarray  # mean squared distance to each centroid, (N, K)
    reasons: list[str]  # in words
    probabilities: np.ndarray | None = None  # of a judge, (N, K); None where there is none

    def of_class(self, name: str, *decisions: str) -> list[int]:
        """Rows of class `name` with one of these decisions, best first."""
        rows = np.flatnonzero(self.labels == self.classes.index(name)).tolist()
        return [i for i in rows if self.decisions[i] in decisions]

    def used(self, name: str) -> list[str]:
        """Files of class `name` for the training folder, best first."""
        return [self.files[i] for i in self.of_class(name, *USED)]

    def agreement(self) -> dict[str, dict[str, float | None]]:
        """Share of images whose judged class is the wanted one, by class: of all, of the used."""
        right = self.probabilities.argmax(axis=1) == self.labels

        def share(rows: list[int]) -> float | None:
            return float(right[rows].mean()) if rows else None

        return {
            name: {
                "before": share(self.of_class(name, *KINDS)),
                "after": share(self.of_class(name, *USED)),
            }
            for name in self.classes
        }

    def counts(self) -> dict[str, dict[str, int]]:
        """By class: generated, rejected, surplus, accepted, wanted, shortfall and filled.

        The shortfall is what was wanted and not accepted, whether it was filled up or not.
        """
        keys = ("generated", "rejected", "surplus", "accepted", "wanted", "shortfall", "filled")
        result = {}
        for name, wanted in zip(self.classes, self.wanted, strict=True):
            number = {decision: len(self.of_class(name, decision)) for decision in KINDS}
            number |= {"generated": sum(number.values()), "wanted": wanted}
            number["shortfall"] = wanted - number[ACCEPTED]
            result[name] = {key: number[key] for key in keys}
        return result

    def to_csv(self) -> str:
        """Every decision, a row per image."""
        rows, nearest = [], self.distances.argmin(axis=1)
        for i, (file, label) in enumerate(zip(self.files, self.labels.tolist(), strict=True)):
            distances = [f"{value:.9g}" for value in self.distances[i]]
            row = {
                "class": self.classes[label],
                "file": file,
                "decision": self.decisions[i],
                "rank": self.ranks[i] or "",
                "score": "" if np.isnan(self.scores[i]) else f"{self.scores[i]:.9g}",
                "nearest": self.classes[nearest[i]],
                "own_distance": distances[label],
                **{f"distance_{c}": d for c, d in zip(self.classes, distances, strict=True)},
                "reason": self.reasons[i],
            }
            if self.probabilities is not None:
                p = self.probabilities[i]
                row |= {"judged": self.classes[p.argmax()], "confidence": f"{p.max():.6f}"}
            rows.append(row)
        return csv_text(rows, list(rows[0]))


def wanted_per_class(counts: Sequence[int], ratio: int) -> list[int]:
    """`ratio` percent of each count, rounded to the nearest whole image (halves up)."""
    wanted = [(count * ratio + 50) // 100 for count in counts]
    if not any(wanted):
        raise UserError(
            f"`ratio` {ratio}: that is less than one image of the {max(counts)} per class; raise it"
        )
    return wanted


def select(
    strategy: Strategy,
    synthetic: FeatureSet,
    distances: np.ndarray,
    wanted: Sequence[int],
    fill: bool = False,
    probabilities: np.ndarray | None = None,
) -> Selection:
    """Decide on every image.

    Args:
        synthetic: In order, the one that `strategy` was made for.
        distances: To every centroid, (N, K), for the record.
        wanted: Most images to use, by class.
        fill: Use the best of the rejected images where candidates are too few.
        probabilities: Of a judge, (N, K), for the record.
    """
    labels, none = synthetic.labels.numpy(), np.zeros(0, dtype=np.int64)
    rejected = np.array([reason is not None for reason in strategy.rejections], dtype=bool)
    rows: list[tuple] = []  # number of an image, decision, rank, score, reason
    for label, number in enumerate(wanted):
        of_class = labels == label
        members = np.flatnonzero(of_class & ~rejected)
        candidates, scores = strategy.order(members, number, none)
        for i, score, rank in zip(candidates, scores, count(1), strict=False):
            if rank <= number:
                rows.append((i, ACCEPTED, rank, score, strategy.accepted))
            else:
                rows.append((i, SURPLUS, rank, score, strategy.surplus.format(number)))
        most = max(len(candidates), number) if fill else 0  # ranks of those that are used
        taken, members = candidates[:number], np.flatnonzero(of_class & rejected)
        others, scores = strategy.order(members, max(0, most - len(candidates)), taken)
        for i, score, rank in zip(others, scores, count(len(candidates) + 1), strict=False):
            reason = strategy.rejections[i]
            if rank <= most:
                rows.append((i, FILLED, rank, score, f"{FILL_REASON}{reason}"))
            else:
                rows.append((i, REJECTED, 0, score, reason))
    index, decisions, ranks, scores, reasons = zip(*rows, strict=True) if rows else [()] * 5
    index = np.array(index, dtype=np.int64)
    return Selection(
        classes=list(synthetic.classes),
        wanted=list(wanted),
        labels=labels[index],
        files=[synthetic.files[i] for i in index],
        decisions=list(decisions),
        ranks=list(ranks),
        scores=np.array(scores),
        distances=distances[index],
        reasons=list(reasons),
        probabilities=None if probabilities is None else probabilities[index],
    )
