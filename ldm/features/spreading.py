"""Few labels spread over many unlabelled tiles along the neighbourhoods of their features.

Letters: n labelled tiles, N tiles of the graph, M new tiles, D features, K classes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.tile_files import TileFiles
from ldm.features.probe import FeatureClassifier, folds_of

NEIGHBOURS = 50  # at most, and in small sets a tenth of the tiles that a class has on average
LEAST_NEIGHBOURS = 5
ALPHA = 0.9  # share that a tile takes from its neighbours in each round; the rest is its own label
ROUNDS = 1000  # at most; about 150 until nothing changes any more
MOST_TILES = 20_000  # unlabelled ones: the search for neighbours takes the square of it


def drawn(count: int) -> np.ndarray:
    """Which of `count` unlabelled tiles are used, in order: all, or `MOST_TILES` at random."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST_TILES])


def unlabelled_pool(root: Path) -> TileFiles:
    """The tiles of a folder that labels are spread over; names of folders below it are ignored.

    They are drawn before a network sees them, whatever is labelled, so that their features serve
    all draws of labels.
    """
    pool = TileFiles.below(root, False)
    return pool if len(pool) <= MOST_TILES else pool.select(drawn(len(pool)).tolist())


class Spreading(FeatureClassifier):
    """A classifier that uses the shape of a large unlabelled set: label spreading.

    Each labelled tile passes its label to its nearest neighbours in feature space, these pass it to
    theirs, and so on; a new tile takes the mean of its nearest tiles. Source: Zhou et al.,
    "Learning with local and global consistency", NeurIPS 2003.

    Args:
        features: Of the labelled tiles, (n, D).
        labels: (n,) in [0, K).
        classes: K names.
        unlabelled: Features of further tiles, (N - n, D). Of more than `MOST_TILES`, that many are
            drawn with a fixed seed.

    Attributes:
        neighbours: How many of them each tile has.
        left_out: (n, K) log-probabilities of the labelled tiles, each of them from the labels of
            other folds.

    Raises:
        UserError: A class has a single labelled tile.
    """

    def __init__(
        self, features: Tensor, labels: np.ndarray, classes: Sequence[str], unlabelled: Tensor
    ):
        from sklearn.neighbors import NearestNeighbors
        from sklearn.preprocessing import StandardScaler

        folds = folds_of(labels, classes)
        values = torch.cat([features, unlabelled[drawn(len(unlabelled))]]).double().numpy()
        self._scaler = StandardScaler().fit(values)
        values = self._scaler.transform(values).astype(np.float32)
        count = min(NEIGHBOURS, len(values) // (10 * len(classes)))
        count = min(max(count, LEAST_NEIGHBOURS), len(values))
        self.neighbours = count
        self._search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(values)
        self._graph = self._search.kneighbors_graph(values)
        known = np.full(len(values), -1)
        known[: len(labels)] = labels
        self._shares = self._spread(known)  # (N, K)
        left_out = np.empty((len(labels), len(classes)))
        for _, hidden in folds:
            without = known.copy()
            without[hidden] = -1
            left_out[hidden] = self._spread(without)[hidden]
        self.left_out = _logarithm(left_out)

    def _spread(self, labels: np.ndarray) -> np.ndarray:
        """Shares of the classes in each tile, (N, K), from labels (N,) that are -1 if unknown."""
        from sklearn.semi_supervised import LabelSpreading

        model = LabelSpreading(kernel=lambda *_: self._graph, alpha=ALPHA, max_iter=ROUNDS)
        return model.fit(np.zeros((len(labels), 1)), labels).label_distributions_

    def logits(self, features: Tensor) -> Tensor:
        """Log-probabilities (M, K) float64 of features (M, D)."""
        queries = self._scaler.transform(features.double().numpy()).astype(np.float32)
        neighbours = self._search.kneighbors(queries, return_distance=False)  # (M, k)
        return _logarithm(self._shares[neighbours].mean(axis=1))


def _logarithm(shares: np.ndarray) -> Tensor:
    """Logarithm of shares (M, K) that sum to 1, or to 0 where no label reached a tile."""
    shares = shares + 1e-6
    return torch.from_numpy(np.log(shares / shares.sum(axis=1, keepdims=True)))
