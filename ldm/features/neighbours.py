"""The search for nearest neighbours in feature space, in parts of bounded memory.

Letters: N queries, M candidates, D features, B and C rows of one block of each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.progress import Bar

CHUNK = 2048  # rows of a matrix of distances that are held together
BLOCKS = (CHUNK, 8192)  # queries and candidates that are compared together


@torch.no_grad()
def search(
    queries: Tensor,
    count: int,
    closeness: Callable[[Tensor, slice], Tensor],
    k: int = 1,
    groups: Tensor | None = None,
    own: Tensor | None = None,
    prepare: Callable[[Tensor], Tensor] = lambda rows: rows,
    blocks: tuple[int, int] | None = None,
    what: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Find the k closest candidates of every query, by any measure, block by block.

    Args:
        queries: N rows of anything.
        count: M, number of candidates.
        closeness: From B prepared queries and the place of C candidates to (B, C); larger is
            closer.
        k: How many to find, in [1, M].
        groups: Group of each candidate, (M,).
        own: Group of each query, (N,), whose candidates are left out: with groups 0, 1, ... M - 1,
            a candidate itself. At least k others must be left.
        prepare: What is done to the queries of a block once.
        blocks: Queries and candidates of a block; `BLOCKS` if omitted.
        what: Name on a progress bar; None for no bar.

    Returns:
        Closeness and index of the found candidates, (N, k) each, the closest first. Of equally
        close ones, the first is found for k = 1.
    """
    step, width = blocks or BLOCKS
    values, indices = [], []
    starts = range(0, len(queries), step)
    for start in Bar(starts, what, unit="block", leave=False, disable=what is None):
        rows = prepare(queries[start : start + step])
        best = best_index = None
        for first in range(0, count, width):
            columns = slice(first, min(first + width, count))
            found = closeness(rows, columns)  # (B, C)
            if groups is not None and own is not None:
                same = own[start : start + step, None] == groups[None, columns]
                found = found.masked_fill(same.to(found.device), -torch.inf)
            block, index = _largest(found, k)
            index = index + first
            if best is not None:
                block, order = _largest(torch.cat([best, block], dim=1), k)
                index = torch.cat([best_index, index], dim=1).gather(1, order)
            best, best_index = block, index
        values.append(best)
        indices.append(best_index)
    if not values:
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat(values), torch.cat(indices)


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (or all, where there are fewer) and where they are."""
    if k == 1:
        return values.max(dim=1, keepdim=True)  # the first of equal ones, unlike topk
    return values.topk(min(k, values.shape[1]), dim=1)


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances, (N, D) and (M, D) -> (N, M) float64, never below 0.

    The expansion |x|^2 + |y|^2 - 2 x.y of unit vectors is exact to about 1e-8 in the distance.
    """
    x, y = x.double(), y.double()
    products = x @ y.T
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * products).clamp_(min=0)


def centroid_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Mean squared distance (over D) of images (N, D) to centroids (K, D), (N, K) float64.

    Each entry is computed from its own row alone, so it depends neither on the order of the images
    nor on how many there are.
    """
    parts = []
    for part in features.split(CHUNK):
        columns = [(part.double() - c).square().mean(dim=1) for c in centroids.double()]
        parts.append(torch.stack(columns, dim=1))
    return torch.cat(parts)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest row of y for every row of x: its index (N,) and its distance (N,) float64."""
    _, index = search(x, len(y), lambda part, place: -squared_distances(part, y[place]))
    return index[:, 0], paired_distances(x, y[index[:, 0]])


def neighbour_distances(x: Tensor, k: int) -> Tensor:
    """Distance of every row to its k-th nearest other row, (N, D) -> (N,) float64; k < N."""
    assert 1 <= k < len(x), (k, len(x))
    rows = torch.arange(len(x), device=x.device)
    closest, _ = search(
        x, len(x), lambda part, place: -squared_distances(part, x[place]), k, rows, rows
    )
    return (-closest[:, -1]).sqrt()


def paired_distances(x: Tensor, y: Tensor) -> Tensor:
    """Distance of row i of x to row i of y, from these two alone: (N,) float64."""
    pairs = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    return torch.cat([(a.double() - b.double()).square().sum(1).sqrt() for a, b in pairs])
