"""Exact nearest training tiles over all orientations of a query.

Letters: M queries, N training tiles, R orientations of a query (8, or 1), D numbers per tile,
B queries and C training tiles of a block. All vectors have length 1, so the distance of two is
sqrt(2 - 2 cos), in [0, 2].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.features.neighbours import search

BLOCKS = (64, 8192)  # queries, which have 8 orientations each, and training tiles


@dataclass(frozen=True)
class Neighbours:
    """The nearest training tile of each query, over all orientations of the query."""

    index: Tensor  # training tile, (M,) int64
    orientation: Tensor  # orientation of the query, (M,) int64 in [0, R)
    distance: Tensor  # distance to that tile, (M,) float64
    scale: Tensor  # distance to the k-th nearest training tile, (M,) float64

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
    blocks: tuple[int, int] = BLOCKS,
) -> Neighbours:
    """Search by blocks of matrix products: N x D numbers and one block are in memory.

    Args:
        queries: M rows of what `orient` takes.
        train: (N, D) of length 1, any float type.
        k: Which neighbour gives the scale, in [1, N].
        orient: From B rows to (B, R, D).
        groups, own: Training tiles that are left out, see `search`.
        what: Name on the progress bar.
        blocks: Queries and training tiles of a block.
    """
    train = train.to(device)

    def views_of(rows: Tensor) -> Tensor:
        return _unit(orient(rows.to(device).float()))  # (B, R, D)

    def cosines(views: Tensor, place: slice) -> Tensor:
        block = _unit(train[place].float())  # (C, D)
        B, R, D = views.shape
        return (views.view(B * R, D) @ block.T).view(B, R, -1).amax(dim=1)  # (B, C)

    best, index = search(queries, len(train), cosines, k, groups, own, views_of, blocks, what)
    scale = (2 - 2 * best[:, -1].cpu().double()).clamp(min=0).sqrt()
    distances, orientations = [], []
    for start in range(0, len(queries), blocks[0]):
        rows = slice(start, start + blocks[0])
        # The distance is taken from the difference of the two vectors: 2 - 2 cos would leave
        # nothing but rounding of a copy's. MPS has no float64.
        closest = _unit(train[index[rows, 0]].float())
        differences = (views_of(queries[rows]) - closest[:, None]).cpu().double()  # (B, R, D)
        distance, orientation = differences.norm(dim=2).min(dim=1)
        distances.append(distance)
        orientations.append(orientation)
    distance = torch.cat(distances)
    return Neighbours(
        index[:, 0].cpu(), torch.cat(orientations), distance, torch.maximum(scale, distance)
    )


def _unit(vectors: Tensor) -> Tensor:
    """Length 1 again, which half precision keeps to three digits only."""
    return vectors / vectors.norm(dim=-1, keepdim=True)
