"""Logistic regression on features: what a network knows of the classes.

Letters: N images, D features, K classes.
"""

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.errors import UserError

log = logging.getLogger(__name__)

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


def cross_validated(features: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> Any:
    """A logistic regression whose penalty is chosen by its cross-entropy on left-out tiles.

    Nothing but these tiles is looked at. Folds are drawn class by class, with a fixed seed.

    Args:
        features: (N, D).
        labels: (N,) in [0, K).
        classes: K names.

    Raises:
        UserError: A class has a single tile, so that none can be left out.
    """
    from sklearn.metrics import log_loss
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        name = classes[int(counts.argmin())]
        raise UserError(
            f"class {name} has {counts.min()} labelled tiles and needs at least 2 for a judge by"
            " logistic regression; add labelled tiles or use --strategy centroid"
        )
    folds = StratifiedKFold(min(FOLDS, int(counts.min())), shuffle=True, random_state=0)
    parts = list(folds.split(features, labels))

    def loss(strength: float) -> float:
        p = np.empty((len(labels), len(classes)))
        for known, left_out in parts:
            model = logistic_regression(features[known], labels[known], strength)
            p[left_out] = model.predict_proba(features[left_out])
        return log_loss(labels, p)

    return logistic_regression(features, labels, min(STRENGTHS, key=loss))
