"""Synthetic tiles that started from real ones: how far are they from their own sources?

Letters: M synthetic tiles, N training tiles, D numbers of a small picture (`ldm.features.pixels`).
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ldm.data.folders import manifest_column
from ldm.data.tile_files import TileFiles
from ldm.features.pixels import oriented_vectors

BLOCK = 256  # tiles whose orientations are in memory together


@dataclass(frozen=True)
class Variations:
    """The sources of synthetic tiles."""

    sources: list[str]  # as the manifest names them, M; empty texts for tiles made of noise
    # The training tile that each is, (M,) int64; -1 where it is none that was compared.
    index: Tensor
    # To it in pixels, in the nearest orientation, (M,) float64; else not a number.
    distance: np.ndarray


def find_variations(
    synthetic: TileFiles,
    listed: TileFiles,
    train: TileFiles,
    vectors: Tensor,
    train_vectors: Tensor,
) -> Variations | None:
    """The variations among synthetic tiles; None where the folder's manifest names no sources.

    A source is named relative to the folder that sampling started from, which need not be the
    training folder: it is the one training tile whose path ends as its own does, or the reverse.

    Args:
        synthetic, train: The M and N tiles that are compared.
        listed: All training tiles, those among them that repeat others byte by byte.
        vectors, train_vectors: Small pictures, (M, D) and (N, D).
    """
    known = manifest_column(synthetic.root, "source")
    sources = [known.get(name, "") for name in synthetic.names]
    if not any(sources):
        return None
    by_file = defaultdict(list)
    for name, digest in zip(listed.names, listed.digests, strict=True):
        by_file[PurePosixPath(name).name].append((name, digest))
    compared = {digest: i for i, digest in enumerate(train.digests)}

    def place(source: str) -> int:
        alike = by_file[PurePosixPath(source).name]
        digests = {digest for name, digest in alike if name == source}
        digests = digests or {digest for name, digest in alike if _ends_alike(name, source)}
        return compared.get(*digests, -1) if len(digests) == 1 else -1

    index = torch.tensor([place(source) if source else -1 for source in sources])
    distance = np.full(len(sources), np.nan)
    for rows in (index >= 0).nonzero().flatten().split(BLOCK):
        views = torch.nn.functional.normalize(oriented_vectors(vectors[rows].double()), dim=2)
        own = torch.nn.functional.normalize(train_vectors[index[rows]].double(), dim=1)
        distance[rows.numpy()] = (views - own[:, None]).norm(dim=2).amin(dim=1).numpy()
    return Variations(sources, index, distance)


def _ends_alike(a: str, b: str) -> bool:
    return f"/{a}".endswith(f"/{b}") or f"/{b}".endswith(f"/{a}")
