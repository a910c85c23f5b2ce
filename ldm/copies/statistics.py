"""Statistics of distances to the training set: does a generator copy?

Letters: M synthetic tiles, N training tiles, H held-out tiles.
"""

import math
from dataclasses import dataclass

import numpy as np

from ldm.errors import UserError

FEWEST_IN_CELL = 10  # tiles of either set; the normal approximation of U needs some
TILES_PER_CELL = 50  # tiles of the smaller set, on average
MOST_CELLS = 20
KMEANS_ROWS = 10_000  # training tiles that the cells are found on


def fewest_held_out(level: float) -> int:
    """How many held-out tiles allow a rate of false alarms as low as `level`."""
    return math.ceil(1 / level - 1e-9) - 1


def alarm_threshold(held_out: np.ndarray, level: float) -> float:
    """The value below which a new tile falls with a probability of at most `level`.

    The k-th smallest of the H held-out values with k = floor(level (H + 1)): whatever their
    distribution, a tile of the same one is below it with a probability of k / (H + 1), or less
    with ties (split conformal prediction, Vovk et al. 2005).
    """
    k = math.floor(level * (len(held_out) + 1) + 1e-9)
    assert k >= 1, (level, len(held_out))
    threshold = float(np.sort(held_out)[k - 1])
    if threshold <= 0:
        raise UserError(
            f"`holdout`: {k} or more tiles equal training tiles pixel by pixel; give tiles that the"
            " generator never saw"
        )
    return threshold


def mann_whitney_z(a: np.ndarray, b: np.ndarray) -> float:
    """Standardised Mann-Whitney U, with ties; negative where the values of `a` are the smaller."""
    from scipy.stats import rankdata, tiecorrect

    n, m = len(a), len(b)
    ranks = rankdata(np.concatenate([a, b]))  # of equal values, their mean rank
    u = ranks[:n].sum() - n * (n + 1) / 2
    variance = n * m * (n + m + 1) / 12 * tiecorrect(ranks)
    return float((u - n * m / 2) / math.sqrt(variance)) if variance > 0 else 0.0


@dataclass(frozen=True)
class CopyingTest:
    """C_T and what it rests on."""

    c_t: float | None  # None where no cell has enough tiles
    cells: int  # cells that count
    left_out: int  # cells with held-out or synthetic tiles, too few of one of them
    weight: float  # share of the held-out tiles that lie in cells that count


def copying_test(
    synthetic: np.ndarray,
    synthetic_cells: np.ndarray,
    held_out: np.ndarray,
    held_out_cells: np.ndarray,
) -> CopyingTest:
    """C_T of Meehan, Chaudhuri & Dasgupta 2020, "A non-parametric test to detect data-copying".

    In each cell, the standardised Mann-Whitney U of the distances of synthetic tiles to the
    training set against those of held-out tiles; then their mean, weighted by the cells' shares of
    the held-out tiles. Strongly negative: synthetic tiles are nearer to the training set than new
    real ones, the generator copies. Strongly positive: it underfits.

    Args:
        synthetic, held_out: Distances to the nearest training tile, (M,) and (H,).
        synthetic_cells, held_out_cells: The cell of each tile.
    """
    total, weight, used, left_out = 0.0, 0, 0, 0
    for cell in np.union1d(synthetic_cells, held_out_cells):
        a, b = synthetic[synthetic_cells == cell], held_out[held_out_cells == cell]
        if min(len(a), len(b)) < FEWEST_IN_CELL:
            left_out += 1
            continue
        total += len(b) * mann_whitney_z(a, b)
        weight += len(b)
        used += 1
    share = weight / len(held_out)
    return CopyingTest(total / weight if weight else None, used, left_out, share)


def authenticity(distance: np.ndarray, neighbour_distance: np.ndarray) -> float:
    """Share of tiles that are no copies (Alaa et al. 2022, "How faithful is your synthetic data?").

    A tile counts as authentic where it is farther from its nearest training tile than that one is
    from its own nearest other.

    Args:
        distance: To the nearest training tile, (M,).
        neighbour_distance: Of that training tile to its nearest other, (M,).
    """
    return float(np.mean(distance > neighbour_distance))


def training_cells(train: np.ndarray, fewest: int) -> np.ndarray:
    """k-means cells of training tiles, (N, D) -> (N,) int.

    A synthetic or held-out tile belongs to the cell of its nearest training tile, whichever way it
    is turned.

    Args:
        fewest: Tiles of the smaller of the two other sets; the number of cells follows from it,
            at most 20.
    """
    from sklearn.cluster import KMeans

    cells = max(1, min(MOST_CELLS, fewest // TILES_PER_CELL, len(train)))
    some = np.linspace(0, len(train) - 1, min(len(train), KMEANS_ROWS)).astype(int)
    return KMeans(cells, n_init=1, random_state=0).fit(train[some]).predict(train)
