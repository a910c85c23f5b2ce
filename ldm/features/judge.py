"""A judge: what several networks together say of the class of a tile.

Letters: N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.features.probe import FeatureClassifier, Probe
from ldm.features.sets import FeatureSet
from ldm.features.spreading import Spreading
from ldm.models.classifier import fit_temperature


@dataclass(frozen=True)
class Judge:
    """What several networks together say of a tile: the geometric mean of their probabilities.

    A network that classifies these very classes is asked itself, any other by a logistic
    regression on its features, or by labels that are spread over unlabelled tiles. All are
    calibrated by temperature (Guo et al. 2017). A temperature is at least 1: that all of a few
    left-out tiles are right does not make a judge surer.
    """

    # The regression (or spreading) of each network; None for a classifier.
    probes: list[FeatureClassifier | None]
    temperatures: list[float]  # of each network
    temperature: float = 1.0  # of the mean
    # Digest of the further tiles that classifiers were calibrated on, if any.
    calibrated_on: str | None = None
    # Digest of the unlabelled tiles that the labels were spread over, if any.
    spread_over: str | None = None

    @classmethod
    def fit(
        cls,
        real: Sequence[FeatureSet],
        cache: Path | None = None,
        val: Sequence[FeatureSet] | None = None,
        unlabelled: Sequence[FeatureSet] | None = None,
    ) -> "Judge":
        """The judge of labelled tiles.

        Args:
            real: Their features, by network.
            cache: Folder that keeps the regressions.
            val: Features of further labelled tiles, by network. They calibrate the classifiers
                alone, since these may have been trained on `real` and be sure of all of it;
                without them the temperature of a classifier is 1.
            unlabelled: Features of tiles over which the labels are spread, by network.

        Raises:
            UserError: A regression has too few real tiles.
        """
        labels, left_out = real[0].labels, []
        probes: list[FeatureClassifier | None] = []
        temperatures = []
        for k, one in enumerate(real):
            if one.logits is not None:
                probes.append(None)
                temperatures.append(1.0 if val is None else _softened(val[k].logits, val[k].labels))
                continue
            if unlabelled is None:
                probe = Probe.of(one, cache)
            else:
                probe = Spreading(one.values, labels.numpy(), one.classes, unlabelled[k].values)
            probes.append(probe)
            temperatures.append(_softened(probe.left_out, labels))
            left_out.append((probe.left_out / temperatures[-1]).log_softmax(dim=1))
        together = 1.0
        if len(left_out) > 1:
            together = _softened(torch.stack(left_out).mean(dim=0), labels)
        on_val = val is not None and None in probes
        return cls(
            probes,
            temperatures,
            together,
            val[0].tiles if on_val else None,
            unlabelled[0].tiles if unlabelled else None,
        )

    def alone(self, k: int) -> "Judge":
        """The judge by one of the networks."""
        return replace(
            self, probes=[self.probes[k]], temperatures=[self.temperatures[k]], temperature=1.0
        )

    def probabilities(self, sets: Sequence[FeatureSet]) -> Tensor:
        """Probabilities (N, K) float64 of tiles whose features each network has computed."""
        logits = [
            (s.logits.double() if probe is None else probe.logits(s.values)) / temperature
            for s, probe, temperature in zip(sets, self.probes, self.temperatures, strict=True)
        ]
        if len(logits) == 1:
            return logits[0].softmax(dim=1)
        mean = torch.stack([values.log_softmax(dim=1) for values in logits]).mean(dim=0)
        return (mean / self.temperature).softmax(dim=1)


def _softened(logits: Tensor, labels: Tensor) -> float:
    """The temperature of logits (N, K), at least 1."""
    return max(1.0, fit_temperature(logits, labels))
