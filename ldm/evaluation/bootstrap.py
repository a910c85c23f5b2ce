"""How far the numbers of a set may be off because the set is small: bootstrap intervals.

Letters: N images, G groups, S seeds (networks), R resamples, K classes.

Tiles of one slide or region are alike, so it is groups that are drawn with replacement, each with
all its tiles (the first of the two strategies of Davison & Hinkley 1997, section 3.8, for nested
data; drawing again within the groups overstates the spread). An interval over tiles alone is too
narrow, often several times.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.sparse import coo_array

from ldm.evaluation.predictions import Predictions, check_same_images

RESAMPLES = 2000
LEVEL = 0.95
FEW_GROUPS = 20  # with fewer, percentile intervals are too narrow themselves
CHUNK_BYTES = 2**26


def resampled_confusions(
    runs: Sequence[Predictions], resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Confusion matrices of sets drawn with replacement, the same draw for all networks.

    Args:
        runs: Predictions of S networks for the same images, in the same order.
        resamples: R; yielded are parts of an array (R, S, K, K) along its first axis.
    """
    first = runs[0]
    for number, run in enumerate(runs[1:], 2):
        check_same_images(run, first, f"network {number}", "network 1")
    n, k = len(first.labels), len(first.classes)
    if first.groups is None:
        units, count = np.arange(n), n
    else:
        names, units = np.unique(first.groups, return_inverse=True)
        count = len(names)
    cells = [(s * k + first.labels) * k + run.predicted for s, run in enumerate(runs)]
    shape = (count, len(runs) * k * k)
    rows, columns = np.tile(units, len(runs)), np.concatenate(cells)
    counts = coo_array((np.ones(len(rows)), (rows, columns)), shape).tocsr()  # (G, S K K)
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_BYTES // (8 * max(count, shape[1])))
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(count, size=(size, count))
        times = np.stack([np.bincount(row, minlength=count) for row in drawn])  # (r, G)
        yield (times @ counts).reshape(size, len(runs), k, k)


def accuracy_and_macro_f1(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy and macro F1, (...), of many confusion matrices, (..., K, K), true classes by row.

    They are defined as in `ldm.evaluation.metrics.scores`.
    """
    correct = np.diagonal(confusions, axis1=-2, axis2=-1)  # (..., K)
    with np.errstate(invalid="ignore"):
        f1 = 2 * correct / (confusions.sum(-1) + confusions.sum(-2))
    # A class that occurs in neither row nor column is left out.
    return {
        "accuracy": correct.sum(-1) / confusions.sum((-1, -2)),
        "macro_f1": np.nanmean(f1, axis=-1),
    }


def intervals(
    runs: Sequence[Predictions], resamples: int = RESAMPLES, level: float = LEVEL
) -> dict[str, Any]:
    """Percentile intervals of the mean over networks, over groups where these are known.

    They tell what another test set of the same kind might have said of the same networks; how much
    networks of other seeds differ is the deviation beside the mean, and is not part of it.

    Returns:
        `accuracy` and `macro_f1` ([low, high], with a share `level` of the resamples inside),
        `groups` (their number; None where images were drawn), `resamples` and `level`.
    """
    found: dict[str, list[np.ndarray]] = {"accuracy": [], "macro_f1": []}
    for confusions in resampled_confusions(runs, resamples):
        for name, values in accuracy_and_macro_f1(confusions).items():
            found[name].append(values.mean(axis=1))  # over the networks
    tails = [50 * (1 - level), 50 * (1 + level)]
    groups = runs[0].groups
    return {
        **{
            name: [float(v) for v in np.percentile(np.concatenate(parts), tails)]
            for name, parts in found.items()
        },
        "groups": None if groups is None else len(set(groups)),
        "resamples": resamples,
        "level": level,
    }
