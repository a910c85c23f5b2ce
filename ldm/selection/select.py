"""Choice of synthetic images by distance to class centroids, and the random control arm.

Letters: N images, K classes. A synthetic image of class k is a candidate for class k alone:

    accepted   centroid k is the nearest of all, and it is among the wanted number of the closest
    surplus    likewise, but enough others are closer
    rejected   another centroid is at least as near

In the control arm every image is a candidate; the wanted number is drawn at random.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from torch import Tensor

from ldm.errors import UserError
from ldm.selection.centroids import Centroids, centroid_distances
from ldm.selection.features import FeatureSet

ACCEPTED, SURPLUS, REJECTED = "accepted", "surplus", "rejected"


@dataclass(frozen=True)
class Decision:
    """What became of one synthetic image.

    Attributes:
        name: Its class.
        file: Path below the synthetic folder.
        distances: Mean squared distance to each centroid, in class order.
        nearest: Class of the nearest centroid.
        rank: Place among the candidates of the class, from 1; None when rejected.
        decision: accepted, surplus or rejected.
        reason: In words.
    """

    name: str
    file: str
    distances: tuple[float, ...]
    own_distance: float
    nearest: str
    rank: int | None
    decision: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Decisions for all images, class by class.

    Attributes:
        classes: K names.
        wanted: Images wanted of each class.
        decisions: Accepted and surplus images by rank, then rejected ones by distance.
    """

    classes: list[str]
    wanted: list[int]
    decisions: list[Decision]

    def accepted(self, name: str) -> list[Decision]:
        """Images of class `name` to be used, best first."""
        return [d for d in self.decisions if d.name == name and d.decision == ACCEPTED]

    def counts(self) -> dict[str, dict[str, int]]:
        """By class: generated, rejected, surplus, accepted, wanted and the shortfall."""
        result = {}
        for name, wanted in zip(self.classes, self.wanted, strict=True):
            found = [d.decision for d in self.decisions if d.name == name]
            accepted = found.count(ACCEPTED)
            result[name] = {
                "generated": len(found),
                "rejected": found.count(REJECTED),
                "surplus": found.count(SURPLUS),
                "accepted": accepted,
                "wanted": wanted,
                "shortfall": wanted - accepted,
            }
        return result

    def to_csv(self) -> str:
        """Every decision, a row per image."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        distances = [f"distance_{name}" for name in self.classes]
        writer.writerow(
            ["class", "file", "decision", "rank", "nearest", "own_distance", *distances, "reason"]
        )
        for d in self.decisions:
            rank = "" if d.rank is None else d.rank
            values = [f"{value:.9g}" for value in (d.own_distance, *d.distances)]
            writer.writerow([d.name, d.file, d.decision, rank, d.nearest, *values, d.reason])
        return stream.getvalue()


def wanted_per_class(counts: Sequence[int], ratio: int) -> list[int]:
    """`ratio` percent of each count, rounded to the nearest whole image (halves up).

    Raises:
        UserError: That is no image at all.
    """
    wanted = [(count * ratio + 50) // 100 for count in counts]
    if not any(wanted):
        raise UserError(
            f"--ratio {ratio}: that is less than one image of the {max(counts)} per class; raise it"
        )
    return wanted


def check_belongs(synthetic: FeatureSet, centroids: Centroids) -> None:
    """UserError unless the features and the centroids have the same classes and network."""
    if synthetic.classes != centroids.classes:
        raise UserError(
            f"the synthetic images have the classes {synthetic.classes}, the centroids"
            f" {centroids.classes}; run scripts/vis.py on folders with the same classes"
        )
    if synthetic.extractor != centroids.extractor:
        raise UserError(
            "the synthetic features and the centroids come from different networks; run"
            " scripts/vis.py again with one network for both"
        )


def select_by_distance(
    synthetic: FeatureSet, centroids: Centroids, wanted: Sequence[int]
) -> Selection:
    """Keep images whose nearest centroid is that of their class, the closest first.

    An image as near to another centroid is rejected; equal distances rank by file name. So the
    result does not depend on the order of the images.

    Args:
        wanted: Most images to accept, by class.
    """
    check_belongs(synthetic, centroids)
    distances = centroid_distances(synthetic.values, centroids.values)
    decisions = []
    for label, number in enumerate(wanted):
        candidates, rejected = [], []
        for i in _members(synthetic, label):
            own = float(distances[i, label])
            others = distances[i].tolist()
            others.pop(label)
            is_nearest = all(own < other for other in others)
            (candidates if is_nearest else rejected).append((own, synthetic.files[i], i))
        for rank, (_, _, i) in enumerate(sorted(candidates), 1):
            if rank <= number:
                decisions.append(
                    _decide(synthetic, distances, i, rank, ACCEPTED, "own centroid is the nearest")
                )
            else:
                reason = f"{number} others are closer"
                decisions.append(_decide(synthetic, distances, i, rank, SURPLUS, reason))
        for _, _, i in sorted(rejected):
            decisions.append(_decide(synthetic, distances, i, None, REJECTED, None))
    return Selection(list(synthetic.classes), list(wanted), decisions)


def select_at_random(
    synthetic: FeatureSet, centroids: Centroids, wanted: Sequence[int], seed: int
) -> Selection:
    """The control arm: draw from all images of a class, whatever their distances.

    The order of a class is a function of (seed, class, file names), and the first ones are taken,
    so a larger number contains a smaller one, as with the selection by distance.
    """
    check_belongs(synthetic, centroids)
    distances = centroid_distances(synthetic.values, centroids.values)
    decisions = []
    for label, number in enumerate(wanted):
        name = synthetic.classes[label]
        members = sorted(_members(synthetic, label), key=lambda i: synthetic.files[i])
        entropy = int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=16).digest(), "big")
        order = np.random.default_rng(entropy).permutation(len(members))
        for rank, position in enumerate(order, 1):
            drawn = rank <= number
            decisions.append(
                _decide(
                    synthetic,
                    distances,
                    members[position],
                    rank,
                    ACCEPTED if drawn else SURPLUS,
                    "drawn at random" if drawn else "not drawn",
                )
            )
    return Selection(list(synthetic.classes), list(wanted), decisions)


def _members(synthetic: FeatureSet, label: int) -> list[int]:
    return (synthetic.labels == label).nonzero().flatten().tolist()


def _decide(
    synthetic: FeatureSet,
    distances: Tensor,
    i: int,
    rank: int | None,
    decision: str,
    reason: str | None,
) -> Decision:
    values = distances[i].tolist()
    label = int(synthetic.labels[i])
    name = synthetic.classes[label]
    nearest = synthetic.classes[int(np.argmin(values))]
    if reason is None:
        tie = nearest == name
        reason = "another centroid is as near" if tie else f"nearest centroid is {nearest}"
    return Decision(
        name, synthetic.files[i], tuple(values), values[label], nearest, rank, decision, reason
    )
