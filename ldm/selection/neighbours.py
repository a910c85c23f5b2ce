"""Neighbours in feature space, in parts of bounded memory.

Letters: N images, M tiles, D features. All distances are Euclidean and computed in float64, where
the expansion |x|^2 + |y|^2 - 2 x.y of unit vectors is exact to about 1e-8 in the distance.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 2048  # rows of a distance matrix that are held together


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, D) and (M, D) -> (N, M) float64, never below 0."""
    x, y = x.double(), y.double()
    products = x @ y.T
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * products).clamp_(min=0)


def in_chunks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Parts of at most CHUNK rows, each with its place."""
    for start in range(0, len(x), CHUNK):
        yield slice(start, start + CHUNK), x[start : start + CHUNK]


def neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest other row, (N, D) -> (N,) float64; k < N."""
    assert 1 <= k < len(x), (k, len(x))
    result = torch.empty(len(x), dtype=torch.float64)
    for place, part in in_chunks(x):
        squared = squared_distances(part, x)
        own = torch.arange(len(part))
        squared[own, own + place.start] = -1.0  # a row is its own nearest, before any copy of it
        result[place] = squared.kthvalue(k + 1, dim=1).values.sqrt()
    return result


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For every row of x the nearest of y: its index (N,) and its distance (N,) float64."""
    index = torch.empty(len(x), dtype=torch.int64)
    for place, part in in_chunks(x):
        index[place] = squared_distances(part, y).argmin(dim=1)
    return index, paired_distances(x, y[index])


def paired_distances(x: Tensor, y: Tensor) -> Tensor:
    """Distance of row i of x to row i of y, from these two alone: (N,) float64."""
    result = torch.empty(len(x), dtype=torch.float64)
    for place, part in in_chunks(x):
        result[place] = (part.double() - y[place].double()).square().sum(1).sqrt()
    return result
