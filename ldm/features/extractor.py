"""The interface of everything that turns tiles into features, and the loop that runs it.

Letters: N tiles, B batch, V views of a tile, H W pixels of a file, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.images import attempts, read_tile, require_good
from ldm.devices import within_memory
from ldm.errors import UserError
from ldm.files import digest_of
from ldm.progress import Bar

AHEAD = 2  # batches that are decoded while another one is computed

FEATURES, LOGITS = "features", "logits"


class Extracted(NamedTuple):
    """What an extractor found in a set of files, in their order, on the CPU."""

    features: Tensor  # (N, D), or (N, V, D) of several views, as the network gives them
    # Further values by name, of the same form: "logits", (N, K), of a classifier.
    others: dict[str, Tensor]
    sizes: list[tuple[int, int]]  # width and height of each file in pixels


class Views(NamedTuple):
    """The pictures of a tile that a network sees."""

    name: str  # a word for files that keep features
    count: int  # V, the same number for every tile
    # From a tile, uint8 (H, W, 3), to its V pictures.
    of: Callable[[np.ndarray], Sequence[np.ndarray]]


WHOLE = Views("whole", 1, lambda tile: [tile])


@dataclass(frozen=True)
class Extractor:
    """Something that turns tiles into features, with its fixed pre-processing."""

    name: str  # what it is and where it comes from, for people
    network: str  # what it is alone
    identity: str  # SHA-256 of all that decides the features: architecture, weights, pre-processing
    # From a tile, uint8 (H, W, 3), to what is stacked into a batch. It is called by several threads
    # at the same time.
    transform: Callable[[np.ndarray], Tensor]
    # From a batch on `device` to its values by name: "features", (B, D), and of a classifier
    # "logits", (B, K).
    forward: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    preprocessing: str  # what is done to a tile, in words
    weights: Path | None = None  # file of the weights; None where there is none
    weights_sha256: str = ""  # SHA-256 of that file
    classes: list[str] | None = None  # K class names of a classifier, in the order of its logits
    # Which labelled tiles the network was trained on, see `TileFiles.listing`; None if unknown.
    trained_on: str | None = None

    def classifies(self, classes: Sequence[str]) -> bool:
        """Whether the network is a classifier of these very classes."""
        return self.classes == list(classes)

    def record(self) -> dict[str, Any]:
        """Facts about the network that stand beside a value measured with it."""
        facts = [self.network, self.weights_sha256, self.preprocessing]
        return {
            "name": self.network,
            "weights": str(self.weights),
            "weights_sha256": self.weights_sha256,
            "preprocessing": self.preprocessing,
            "identity": digest_of(facts),
        }

    @torch.no_grad()
    def extract(
        self,
        paths: Sequence[Path],
        batch_size: int = 64,
        num_workers: int = 2,
        views: Views = WHOLE,
        what: str = "features",
        read: Callable[[Path], np.ndarray] = read_tile,
    ) -> Extracted:
        """Compute the features of image files, in full float32 precision on every device.

        Features of different runs and machines are compared, so nothing here is rounded to less.

        Args:
            batch_size: Images (or views) that pass through the network together.
            num_workers: Threads that decode images.
            views: The pictures of a tile that the network sees.
            what: Name on the progress bar.
            read: Decodes a file, to uint8 (H, W, 3).
        """

        def prepare(path: Path) -> tuple[list[Tensor], tuple[int, int]]:
            tile = read(path)
            height, width = tile.shape[:2]
            return [self.transform(picture) for picture in views.of(tile)], (width, height)

        step, threads = max(1, batch_size // views.count), max(1, num_workers)
        prepared = attempts(prepare, paths, threads, -(-AHEAD * step // threads))
        rows: list[dict[str, Tensor]] = []
        outcomes: list[Any] = []  # the size of each file, or what is wrong with it
        failed = False
        cudnn = torch.backends.cudnn
        flags = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)
        with within_memory(batch_size), flags:
            for _ in Bar(range(0, len(paths), step), what, unit="batch"):
                batch = list(islice(prepared, step))
                bad = [isinstance(outcome, UserError) for outcome in batch]
                outcomes += [one if b else one[1] for one, b in zip(batch, bad, strict=True)]
                failed = failed or any(bad)
                if not failed:  # otherwise, only find out which other files are bad
                    rows += self._rows([image for images, _ in batch for image in images])
        require_good(outcomes)
        values = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if views.count > 1:
            values = {name: v.unflatten(0, (-1, views.count)) for name, v in values.items()}
        return Extracted(values.pop(FEATURES), values, outcomes)

    def _rows(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """The values of each image; images of one shape pass through the network together."""
        found: dict[int, dict[str, Tensor]] = {}
        for shape in dict.fromkeys(image.shape for image in images):
            places = [i for i, image in enumerate(images) if image.shape == shape]
            values = self.forward(torch.stack([images[i] for i in places]).to(self.device))
            values = {name: value.cpu() for name, value in values.items()}
            for row, place in enumerate(places):
                found[place] = {name: value[row] for name, value in values.items()}
        return [found[i] for i in range(len(images))]


def directions(features: Tensor, paths: Sequence[Path]) -> Tensor:
    """Features scaled to length 1, (N, ..., D) float32."""
    norms = features.norm(dim=-1)
    remedy = "without a direction (zero or not finite), the first is {}; use another network"
    _require(norms.isfinite() & (norms > 0), paths, remedy)
    return F.normalize(features, dim=-1)


def require_finite(features: Tensor, paths: Sequence[Path]) -> None:
    """Check that no feature is infinite or not a number."""
    remedy = "that are not finite, the first is {}; check the weights of the network"
    _require(features.isfinite(), paths, remedy)


def _require(good: Tensor, paths: Sequence[Path], remedy: str) -> None:
    bad = (~good.view(len(good), -1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{len(bad)} images have features {remedy.format(paths[bad[0]])}")
