"""What a network knows of the classes: logistic regression on its features.

Letters: N images, D features, K classes.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.features.sets import SUFFIX, FeatureSet, read_tensors, write_tensors
from ldm.files import digest_of
from ldm.progress import FIRST_SIGN, Bar

log = logging.getLogger(__name__)

FORMAT = "histodiffusion probe 1"
# Inverse strengths of the L2 penalty that are chosen among.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
MAX_ITERATIONS = 5000
FOLDS = 5  # of the cross-validation of a probe that sees few labelled tiles and nothing else


def logistic_regression(features: np.ndarray, labels: np.ndarray, strength: float) -> Any:
    """A fitted multinomial logistic regression on standardised features.

    Args:
        features: (N, D).
        labels: (N,).
        strength: Inverse of the L2 penalty.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(features, labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        log.warning("logistic regression of strength %g: not at its optimum yet", strength)
    return model


def folds_of(labels: np.ndarray, classes: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of labelled tiles of which one is left out: places of the others, and of its own.

    Drawn class by class, with a fixed seed.

    Args:
        labels: (N,) in [0, K).
        classes: K names.
    """
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        name = classes[int(counts.argmin())]
        raise UserError(
            f"class {name} has {counts.min()} labelled tiles and needs at least 2 for a judge"
            " by logistic regression or label spreading; add labelled tiles or use `strategy`"
            " centroid"
        )
    folds = StratifiedKFold(min(FOLDS, int(counts.min())), shuffle=True, random_state=0)
    return list(folds.split(labels, labels))


class FeatureClassifier:
    """A classifier of features, with what it says of labelled tiles that it does not see."""

    # (N, K) log-probabilities of the N labelled tiles, each of them without its label.
    left_out: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Logits (M, K) of features (M, D)."""
        raise NotImplementedError

    def scores(self, labels: Tensor) -> dict[str, float]:
        """Cross-entropy and accuracy on the left-out tiles, whose labels are (N,)."""
        right = self.left_out.argmax(dim=1) == labels
        return {
            "cross_entropy": float(F.nll_loss(self.left_out, labels)),
            "accuracy": float(right.double().mean()),
        }


@dataclass(frozen=True)
class Probe(FeatureClassifier):
    """A logistic regression whose penalty was chosen on left-out tiles."""

    weight: Tensor  # (K, D) float64, from features to logits
    bias: Tensor  # (K,) float64
    # (N, K) log-probabilities of the tiles it was fitted on, each of them by a regression of the
    # same penalty that did not see it.
    left_out: Tensor

    @classmethod
    def fit(cls, features: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> "Probe":
        """Choose the penalty by the cross-entropy of left-out tiles, then fit on all.

        Nothing but these tiles is looked at.

        Args:
            features: (N, D).
            labels, classes: See `folds_of`, which also says what is raised.
        """
        parts = folds_of(labels, classes)
        ranked = []
        total = len(STRENGTHS) * len(parts) + 1
        bar = Bar(total=total, desc="regression", unit="fit", delay=FIRST_SIGN, leave=False)
        for strength in STRENGTHS:
            p = np.empty((len(labels), len(classes)))
            for known, left_out in parts:
                model = logistic_regression(features[known], labels[known], strength)
                p[left_out] = model.predict_proba(features[left_out])
                bar.update()
            log_p = np.log(np.maximum(p, np.finfo(float).tiny))
            ranked.append((-log_p[np.arange(len(labels)), labels].mean(), strength, log_p))
        _, strength, log_p = min(ranked, key=lambda one: one[0])
        scaler, model = (m for _, m in logistic_regression(features, labels, strength).steps)
        bar.close()
        weight, bias = model.coef_ / scaler.scale_, model.intercept_
        bias = bias - weight @ scaler.mean_
        if len(classes) == 2:  # scikit-learn has the logit of the second class alone
            weight, bias = (np.concatenate([np.zeros_like(v), v]) for v in (weight, bias))
        return cls(*(torch.from_numpy(v) for v in (weight, bias, log_p)))

    @classmethod
    def of(cls, real: FeatureSet, cache: Path | None = None) -> "Probe":
        """The probe of labelled tiles, read from a file in the folder `cache` if it is there."""
        facts = [real.extractor, real.tiles, real.files, real.labels.tolist(), real.classes]
        path = None if cache is None else cache / f"probe-{digest_of(facts)[:16]}{SUFFIX}"
        if path is not None and path.is_file():
            return cls(**read_tensors(path, FORMAT)[0])
        probe = cls.fit(real.values.double().numpy(), real.labels.numpy(), real.classes)
        if path is not None:
            write_tensors(path, vars(probe), {"format": FORMAT})
        return probe

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return features.double() @ self.weight.T + self.bias
