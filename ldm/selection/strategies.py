"""What makes a synthetic image good: five orders of the images of a class.

Letters: N synthetic images, R real tiles of a class, D features, K classes. A strategy says which
images are no candidates for their class, and why (`rejections`), and in which order the others are
taken (`order`). Images are numbered as in a `FeatureSet` that is in order (by class and file name),
so that nothing depends on the order of the folder, and ties go to the first file name.

A larger number of wanted images always contains a smaller one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.folders import manifest_column
from ldm.errors import UserError
from ldm.features.neighbours import (
    CHUNK,
    nearest,
    neighbour_distances,
    paired_distances,
    search,
    squared_distances,
)
from ldm.features.sets import FeatureSet

BANDWIDTH_NEIGHBOUR = 3  # of the kernel of `Coverage`


@dataclass(frozen=True)
class Strategy:
    """An order of the images of each class, here the highest score first."""

    rejections: Sequence[str | None]  # why an image is no candidate, (N,); None for those that are
    # (N,) float64, larger is better; None where they depend on what was chosen before.
    scores: Tensor | None
    score: str | None  # what the score is, in words; None where it says nothing of an image
    accepted: str  # why an image is accepted
    surplus: str  # why a candidate is not accepted; `{}` stands for the wanted number

    def order(
        self, members: np.ndarray, number: int, taken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The images `members` of one class, best first, and their scores, (n,) each.

        Args:
            members: Numbers of images, ascending.
            number: How many will be used: the order of the others may be rough.
            taken: Images of the class that are in the selection already.
        """
        scores = self.scores.numpy()
        order = members[np.argsort(-scores[members], kind="stable")]
        return order, scores[order] if self.score else np.full(len(order), np.nan)


def _against_rivals(
    values: Tensor, synthetic: FeatureSet, reason: str, tie: str
) -> tuple[Tensor, list[str | None]]:
    """The value of the own class, (N,), of values (N, K) of which the larger is better.

    Also why images are rejected: another class has a larger value (`reason`, with the class and
    the value in braces), or an equal one (`tie`).
    """
    own = values.gather(1, synthetic.labels[:, None])[:, 0]
    best, winner = values.scatter(1, synthetic.labels[:, None], -torch.inf).max(dim=1)
    reasons: list[str | None] = [None] * len(own)
    for i in (best >= own).nonzero().flatten().tolist():
        text = tie if best[i] == own[i] else reason
        reasons[i] = text.format(synthetic.classes[winner[i]], best[i].item())
    return own, reasons


def by_nearness(synthetic: FeatureSet, distances: Tensor) -> tuple[Tensor, list[str | None]]:
    """Minus the own one of distances (N, K) to centroids, (N,), and why images are rejected."""
    reason, tie = "nearest centroid is {}", "another centroid is as near"
    return _against_rivals(-distances, synthetic, reason, tie)


def by_centroid(synthetic: FeatureSet, distances: Tensor) -> Strategy:
    """The published selection: images whose nearest centroid is their class's, closest first.

    Args:
        distances: To every centroid, (N, K), see `centroid_distances`.
    """
    own, reasons = by_nearness(synthetic, distances)
    return Strategy(
        reasons,
        own,
        score="minus the distance to the centroid",
        accepted="own centroid is the nearest",
        surplus="{} others are closer",
    )


def by_confidence(synthetic: FeatureSet, probabilities: Tensor) -> Strategy:
    """Images that the judge gives to their class, the most probable first.

    Args:
        probabilities: Of the judge, (N, K), see `ldm.features.judge.Judge`.
    """
    reason = "judged {}, probability {:.3f}"
    own, reasons = _against_rivals(probabilities, synthetic, reason, reason)
    return Strategy(
        reasons,
        own,
        score="probability by the judge",
        accepted="judged to be of its class",
        surplus="{} others are more probable",
    )


def by_manifest(synthetic: FeatureSet, root: Path) -> Strategy:
    """Images by the probability that the guiding classifier gave them, column `prob`.

    The manifest has no probabilities of other classes, so an image is rejected unless its own
    class has more than half: only then no other class can have more.
    """
    known = manifest_column(root, "prob")

    def probability(file: str) -> float:
        try:
            return float(known[file])
        except (KeyError, ValueError):
            return np.nan

    own = torch.tensor([probability(file) for file in synthetic.files], dtype=torch.float64)
    missing = (~((own >= 0) & (own <= 1))).nonzero().flatten().tolist()
    if missing:
        file = synthetic.files[missing[0]]
        raise UserError(
            f"`confidence` manifest: {root}/manifest.csv has no probability (column prob) of"
            f" {len(missing)} images, the first is {file} ({known.get(file, 'no row')!r}); give a"
            " folder as sample_diffusion.py wrote it with a classifier, or use `confidence` judge"
        )
    reasons = [None if p > 0.5 else f"probability {p:.3f} is not above 0.5" for p in own.tolist()]
    return Strategy(
        reasons,
        own,
        score="probability by the guiding classifier",
        accepted="more than half of the probability",
        surplus="{} others are more probable",
    )


def at_random(synthetic: FeatureSet, seed: int) -> Strategy:
    """The control arm: all images of a class are candidates, whatever they look like.

    The order of a class is a function of (seed, class, file names).
    """
    scores = torch.zeros(len(synthetic.files), dtype=torch.float64)
    for label, name in enumerate(synthetic.classes):
        members = (synthetic.labels == label).nonzero().flatten()
        digest = blake2b(f"{seed}:{name}".encode(), digest_size=16).digest()
        generator = np.random.default_rng(int.from_bytes(digest, "big"))
        places = torch.arange(len(members), dtype=torch.float64)
        scores[members[generator.permutation(len(members))]] = -places
    rejections = [None] * len(scores)
    return Strategy(rejections, scores, None, accepted="drawn at random", surplus="not drawn")


def _real_of_class(real: FeatureSet, label: int, least: int, why: str) -> Tensor:
    own = real.values[real.labels == label]
    if len(own) < least:
        raise UserError(
            f"{why}: class {real.classes[label]} has {len(own)} real tiles and needs at least"
            f" {least}; add labelled tiles or use `strategy` centroid"
        )
    return own


def by_realism(synthetic: FeatureSet, real: FeatureSet, k: int) -> Strategy:
    """Realism by nearest neighbours (Kynkaanniemi et al. 2019, section 5), highest first.

    Each real tile r of class y has a ball that reaches to its k-th nearest other tile of y. The
    realism of an image x of y is the largest ratio radius(r) / |x - r| over these tiles: at least 1
    inside a ball, infinite on a tile. (The paper leaves out the half of the balls with the largest
    radii; labelled tiles are too few for that here.) Rejected are images outside all balls, and
    those that have a real tile of another class as near as the nearest of their own.
    """
    realism = torch.empty(len(synthetic.labels), dtype=torch.float64)
    reasons: list[str | None] = [None] * len(realism)
    for label in range(len(synthetic.classes)):
        members = (synthetic.labels == label).nonzero().flatten()
        own = _real_of_class(real, label, k + 1, f"`neighbors` {k}")
        foreign = (real.labels != label).nonzero().flatten()
        radii = neighbour_distances(own, k)  # (R,)
        x = synthetic.values[members]

        def ratios(part: Tensor, place: slice, own=own, radii=radii) -> Tensor:
            ratio = radii[place].square() / squared_distances(part, own[place])
            return ratio.nan_to_num(nan=torch.inf)  # 0 / 0 on a tile with equal neighbours

        best = search(x, len(own), ratios)[1][:, 0]  # the tile whose ball counts
        distance = paired_distances(x, own[best])
        ratio = radii[best] / distance
        realism[members] = torch.where(distance == 0, torch.inf, ratio)

        near_own = nearest(x, own)[1]
        for i in (realism[members] < 1).nonzero().flatten().tolist():
            reasons[members[i]] = "outside the balls of its class"
        if len(foreign):
            other, near_other = nearest(x, real.values[foreign])
            for i in (near_other <= near_own).nonzero().flatten().tolist():
                name = real.classes[real.labels[foreign[other[i]]]]
                reasons[members[i]] = f"nearest real tile is {name}"
    return Strategy(
        reasons,
        realism,
        score=f"realism, {k} neighbours",
        accepted="inside a ball of its class",
        surplus="{} others are more realistic",
    )


@dataclass(frozen=True)
class Coverage(Strategy):
    """Images that are spread as the real tiles of their class are.

    Greedy minimisation of the squared maximum mean discrepancy (Gretton et al. 2012) between the
    chosen images S and the real tiles of the class, with the kernel
    k(x, y) = exp(-|x - y|^2 / (2 h^2)), where h is the median distance of a real tile to its third
    nearest other one. Since k(x, x) = 1 for every x, the image that makes it smallest when added
    to S is the one with the largest

        score(x) = mean over real r of k(x, r) - sum over s in S of k(x, s) / (|S| + 1),

    which is kernel herding (Chen et al. 2010). Candidates are images whose nearest centroid is
    their own. The score of an image is its value when it was chosen; images that are not chosen
    are ordered by their last one.
    """

    synthetic: FeatureSet
    real: list[Tensor]  # features of the real tiles of each class, (R, D)

    @classmethod
    def of(cls, synthetic: FeatureSet, real: FeatureSet, distances: Tensor) -> Strategy:
        labels = range(len(real.classes))
        return cls(
            by_nearness(synthetic, distances)[1],
            None,
            "gain in coverage when chosen",
            "adds most to the coverage of its class",
            "{} others add more",
            synthetic,
            [_real_of_class(real, label, 2, "`strategy` coverage") for label in labels],
        )

    def order(self, members, number, taken):
        if not len(members):
            return members, np.zeros(0)
        own = self.real[int(self.synthetic.labels[members[0]])]  # (R, D)
        k = min(BANDWIDTH_NEIGHBOUR, len(own) - 1)
        width = 2 * neighbour_distances(own, k).median().square().clamp(min=1e-12).item()
        centre = own.mean(dim=0)  # close to all: smaller numbers, smaller rounding errors
        x = self.synthetic.values[members] - centre  # (n, D)
        squares = x.square().sum(dim=1)  # (n,)

        def kernel(y: Tensor) -> Tensor:
            """k of every candidate with one image, (D,) -> (n,)."""
            squared = squares + y.square().sum() - 2 * (x @ y)
            return squared.clamp_(min=0).div_(-width).exp_().double()

        squared = (squared_distances(part, own - centre) for part in x.split(CHUNK))
        target = torch.cat([part.div_(-width).exp_().mean(dim=1) for part in squared])
        total = torch.zeros(len(x), dtype=torch.float64)
        for y in self.synthetic.values[taken] - centre:
            total += kernel(y)

        free = torch.zeros(len(x), dtype=torch.float64)  # minus infinity where chosen
        chosen, scores = [], []
        for count in range(len(taken), len(taken) + min(number, len(x))):
            gain = target - total / (count + 1) + free
            best = int(gain.argmax())
            chosen.append(best)
            scores.append(float(gain[best]))
            total += kernel(x[best])
            free[best] = -torch.inf
        gain = target - total / (len(taken) + len(chosen) + 1)
        others = np.setdiff1d(np.arange(len(x)), chosen)
        others = others[np.argsort(-gain.numpy()[others], kind="stable")]
        order = np.concatenate([np.array(chosen, dtype=np.int64), others])
        return members[order], np.concatenate([scores, gain.numpy()[others]])


@dataclass(frozen=True)
class Choice:
    """A strategy as a user names it, with its options."""

    name: str  # centroid, confidence, knn, coverage or random
    neighbors: int  # of knn
    confidence: str  # of confidence: judge or manifest
    seed: int  # of random

    @property
    def needs_judge(self) -> bool:
        """Whether images are ordered by the probabilities of a judge."""
        return self.name == "confidence" and self.confidence == "judge"

    def settings(self) -> dict[str, Any]:
        """Name and the options that this strategy has, for the record."""
        own = {"knn": "neighbors", "confidence": "confidence", "random": "seed"}.get(self.name)
        return {"strategy": self.name, **({own: getattr(self, own)} if own else {})}

    def make(
        self,
        synthetic: FeatureSet,
        real: FeatureSet,
        distances: Tensor,
        synthetic_root: Path,
        probabilities: Tensor | None,
    ) -> Strategy:
        """The strategy for these images.

        Args:
            synthetic: In order.
            distances: Of the synthetic images to every centroid, (N, K).
            probabilities: Of the judge, (N, K); None where there is none, see `needs_judge`.
        """
        strategies = {
            "centroid": lambda: by_centroid(synthetic, distances),
            "confidence": lambda: (
                by_confidence(synthetic, probabilities)
                if self.needs_judge
                else by_manifest(synthetic, synthetic_root)
            ),
            "knn": lambda: by_realism(synthetic, real, self.neighbors),
            "coverage": lambda: Coverage.of(synthetic, real, distances),
            "random": lambda: at_random(synthetic, self.seed),
        }
        if self.name not in strategies:
            raise UserError(f"`strategy` {self.name!r} must be among {', '.join(strategies)}")
        return strategies[self.name]()
