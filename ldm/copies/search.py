"""Exact nearest training tiles, in bounded memory.

Letters: M queries, N training tiles, R orientations of a query (8, or 1), D numbers per tile,
B queries and C training tiles of a block. All vectors have length 1, so the distance of two is
sqrt(2 - 2 cos), in [0, 2].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

BLOCK_QUERIES = 64
BLOCK_TRAIN = 8192


@dataclass(frozen=True)
class Neighbours:
    """The nearest training tile of each query, over all orientations of the query.

    Attributes:
        index: Training tile, (M,) int64.
        orientation: Of the query, (M,) int64 in [0, R).
        distance: To that tile, (M,) float64.
        scale: Distance to the k-th nearest training tile, (M,) float64.
    """

    index: Tensor
    orientation: Tensor
    distance: Tensor
    scale: Tensor

    @property
    def relative(self) -> Tensor:
        """Distance in units of the query's own neighbourhood, (M,) in [0, 1].

        A tile in a crowd (smooth stroma) is near to many training tiles, a copy to one of them
        alone. Carlini et al. 2023, "Extracting training data from diffusion models", section 4.2,
        divide by the mean distance of the 50 nearest instead of the k-th distance.
        """
        # k identical training tiles leave no scale; what equals them all is a copy.
        return torch.where(self.scale > 0, self.distance / self.scale, 0.0)


@torch.no_grad()
def nearest(
    queries: Tensor,
    train: Tensor,
    k: int,
    orient: Callable[[Tensor], Tensor],
    groups: Tensor | None = None,
    own: Tensor | None = None,
    device: torch.device | str = "cpu",
    what: str = "search",
) -> Neighbours:
    """Search by blocks of matrix products: N x D numbers and one block are in memory.

    Args:
        queries: M rows of what `orient` takes.
        train: (N, D) of length 1, any float type.
        k: Which neighbour gives the scale, in [1, N].
        orient: From B rows to (B, R, D).
        groups: Group of each training tile, (N,) int64.
        own: Group of each query, (M,) int64, whose training tiles are not looked at: with groups
            0, 1, ... N - 1, a training tile itself. At least k others must be left.
        what: Name on the progress bar.
    """
    train = train.to(device)
    excludes = groups is not None and own is not None
    if excludes:
        groups, own = groups.to(device), own.to(device)
    found = []
    starts = range(0, len(queries), BLOCK_QUERIES)
    for start in tqdm(starts, desc=what, unit="block", dynamic_ncols=True, leave=False):
        rows = slice(start, start + BLOCK_QUERIES)
        views = _unit(orient(queries[rows].to(device).float()))  # (B, R, D)
        B, R, D = views.shape
        best = views.new_full((B, 0), 0.0)
        best_index = torch.empty(B, 0, dtype=torch.int64, device=device)
        for first in range(0, len(train), BLOCK_TRAIN):
            block = _unit(train[first : first + BLOCK_TRAIN].float())  # (C, D)
            cosine = (views.view(B * R, D) @ block.T).view(B, R, -1).amax(dim=1)  # (B, C)
            if excludes:
                same = own[rows, None] == groups[None, first : first + BLOCK_TRAIN]
                cosine.masked_fill_(same, -torch.inf)
            values, columns = cosine.topk(min(k, cosine.shape[1]), dim=1)
            merged = torch.cat([best, values], dim=1)
            indices = torch.cat([best_index, columns + first], dim=1)
            best, order = merged.topk(min(k, merged.shape[1]), dim=1)
            best_index = indices.gather(1, order)
        found.append(_exact(views, train, best, best_index[:, 0]))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _unit(vectors: Tensor) -> Tensor:
    """Length 1 again, which half precision keeps to three digits only."""
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _exact(
    views: Tensor, train: Tensor, best: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, orientation, distance and scale of B queries, on the CPU.

    The distance is taken from the difference of the two vectors: 2 - 2 cos would leave nothing
    but rounding of a copy's.
    """
    nearest_tile = _unit(train[index].float())
    # (B, R); MPS has no float64
    distances = (views - nearest_tile[:, None]).cpu().double().norm(dim=2)
    distance, orientation = distances.min(dim=1)
    scale = (2 - 2 * best[:, -1].cpu().double()).clamp(min=0).sqrt()
    return index.cpu(), orientation, distance, torch.maximum(scale, distance)
