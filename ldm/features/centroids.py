"""Class centroids in feature space, and distances to them.

Letters: N images, D features, K classes.
"""

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.features.neighbours import in_chunks
from ldm.features.sets import read_tensors, write_tensors
from ldm.files import require_class_names

FORMAT = "histodiffusion centroids 1"


def class_centroids(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the (normalised) features of each class; the mean itself is not normalised again.

    Args:
        features: (N, D), of every class some.
        labels: (N,) int64 in [0, K).

    Returns:
        (K, D) float32, summed in float64.
    """
    counts = torch.bincount(labels, minlength=num_classes)  # (K,)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"classes {empty} (by label) have no images, so they have no centroid")
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    return (sums / counts[:, None]).float()


def centroid_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Mean squared distance (over D) of images (N, D) to centroids (K, D), (N, K) float64.

    Each entry is computed from its own row alone, so it depends neither on the order of the images
    nor on how many there are.
    """
    shape = (len(features), len(centroids))
    distances = torch.empty(shape, dtype=torch.float64, device=features.device)
    for place, part in in_chunks(features):
        for k, centroid in enumerate(centroids.double()):
            distances[place, k] = (part.double() - centroid).square().mean(dim=1)
    return distances


@dataclass(frozen=True)
class Centroids:
    """Centroids with what they belong to.

    Attributes:
        values: (K, D) float32.
        classes: K names in label order.
        extractor: SHA-256 that names the network the features come from.
        tiles: SHA-256 over the labelled images, see `TileFiles.digest`.
    """

    values: Tensor
    classes: list[str]
    extractor: str
    tiles: str

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file."""
        metadata = {
            "format": FORMAT,
            "classes": json.dumps(self.classes),
            "extractor": self.extractor,
            "tiles": self.tiles,
        }
        write_tensors(path, {"centroids": self.values}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Centroids":
        """Read what `save` wrote; UserError for a missing or foreign file."""
        tensors, metadata = read_tensors(path, FORMAT)
        classes = json.loads(metadata["classes"])
        require_class_names(classes, str(path))
        return cls(tensors["centroids"], classes, metadata["extractor"], metadata["tiles"])
