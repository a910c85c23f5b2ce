"""Class centroids in feature space, and distances to them.

Letters: N images, D features, K classes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.errors import UserError
from ldm.files import write_bytes

if TYPE_CHECKING:
    from ldm.selection.features import FeatureSet

FORMAT = "histodiffusion centroids 1"
CHUNK = 2048  # images whose distances are computed together


def class_centroids(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean of the (normalised) features of each class; the mean itself is not normalised again.

    Args:
        features: (N, D).
        labels: (N,) int64 in [0, K).

    Returns:
        (K, D) float32, summed in float64.

    Raises:
        UserError: A class has no images.
    """
    counts = torch.bincount(labels, minlength=num_classes)  # (K,)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"classes {empty} (by label) have no images, so they have no centroid")
    sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64)
    sums.index_add_(0, labels, features.double())
    return (sums / counts[:, None]).float()


def centroid_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Mean squared distance (over the D features) of every image to every centroid.

    Args:
        features: (N, D).
        centroids: (K, D).

    Returns:
        (N, K) float64. Each entry is computed from its own row alone, so it depends neither on the
        order of the images nor on how many there are.
    """
    centroids = centroids.double()
    distances = torch.empty(len(features), len(centroids), dtype=torch.float64)
    for start in range(0, len(features), CHUNK):
        part = features[start : start + CHUNK].double()
        for k, centroid in enumerate(centroids):
            distances[start : start + CHUNK, k] = (part - centroid).square().mean(dim=1)
    return distances


@dataclass(frozen=True)
class Centroids:
    """Centroids with what they belong to.

    Attributes:
        values: (K, D) float32.
        classes: K names in label order.
        extractor: SHA-256 that names the network the features come from.
        tiles: SHA-256 over the labelled images, see `ldm.selection.features.tiles_digest`.
    """

    values: Tensor
    classes: list[str]
    extractor: str
    tiles: str

    @classmethod
    def of(cls, real: "FeatureSet") -> "Centroids":
        """Those of labelled tiles."""
        values = class_centroids(real.values, real.labels, len(real.classes))
        return cls(values, real.classes, real.extractor, real.tiles)

    def save(self, path: str | os.PathLike) -> None:
        metadata = {
            "format": FORMAT,
            "classes": json.dumps(self.classes),
            "extractor": self.extractor,
            "tiles": self.tiles,
        }
        write_bytes(Path(path), save({"centroids": self.values.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Centroids":
        """Read what `save` wrote; UserError for a missing or foreign file."""
        tensors, metadata = read_safetensors(path, FORMAT)
        classes = json.loads(metadata["classes"])
        return cls(tensors["centroids"], classes, metadata["extractor"], metadata["tiles"])


def read_safetensors(
    path: str | os.PathLike, expected: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata say `format: expected`.

    Raises:
        UserError: Missing, damaged, or another kind of file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; make it with scripts/vis.py")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); run scripts/vis.py") from None
    if metadata.get("format") != expected:
        raise UserError(f"{path} does not hold {expected!r}; make it with scripts/vis.py")
    return tensors, metadata
