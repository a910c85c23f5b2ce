"""The interface of everything that turns tiles into features, and the loop that runs it.

Letters: N tiles, B batch, V views of a tile, H W pixels of a file, D features, K classes.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.data.images import read_tile, require_good
from ldm.devices import within_memory
from ldm.errors import UserError
from ldm.progress import Bar

AHEAD = 2  # batches that are decoded while another one is computed

FEATURES, LOGITS = "features", "logits"


class Extracted(NamedTuple):
    """What an extractor found in a set of files, in their order, on the CPU.

    Attributes:
        features: (N, D), or (N, V, D) of several views, as the network gives them.
        others: Further values by name, of the same form: "logits", (N, K), of a classifier.
        sizes: Width and height of each file in pixels.
    """

    features: Tensor
    others: dict[str, Tensor]
    sizes: list[tuple[int, int]]


class Views(NamedTuple):
    """The pictures of a tile that a network sees.

    Attributes:
        name: A word for files that keep features.
        count: V, the same number for every tile.
        of: From a tile, uint8 (H, W, 3), to its V pictures.
    """

    name: str
    count: int
    of: Callable[[np.ndarray], Sequence[np.ndarray]]


WHOLE = Views("whole", 1, lambda tile: [tile])


@dataclass(frozen=True)
class Extractor:
    """Something that turns tiles into features, with its fixed pre-processing.

    Attributes:
        name: What it is and where it comes from, for people.
        network: What it is alone.
        identity: SHA-256 of all that decides the features: architecture, weights, pre-processing.
        transform: From a tile, uint8 (H, W, 3), to what is stacked into a batch. It is called by
            several threads at the same time.
        forward: From a batch on `device` to its values by name: "features", (B, D), and of a
            classifier "logits", (B, K).
        device: Device of the network.
        preprocessing: What is done to a tile, in words.
        weights: File of the weights; None where there is none.
        weights_sha256: SHA-256 of that file.
        classes: K class names of a classifier, in the order of its logits.
        trained_on: Which labelled tiles the network was trained on, see `training_tiles`; None
            where that is not recorded.
    """

    name: str
    network: str
    identity: str
    transform: Callable[[np.ndarray], Tensor]
    forward: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    preprocessing: str
    weights: Path | None = None
    weights_sha256: str = ""
    classes: list[str] | None = field(default=None)
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
            "identity": record_identity(*facts),
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

        step = max(1, batch_size // views.count)
        rows: list[dict[str, Tensor]] = []
        sizes: list[tuple[int, int]] = []
        bad: list[str] = []
        batches = _in_batches(paths, prepare, step, num_workers)
        cudnn = torch.backends.cudnn
        flags = cudnn.flags(enabled=cudnn.enabled, deterministic=True, allow_tf32=False)
        with within_memory(batch_size), flags:
            for batch in Bar(batches, what, -(-len(paths) // step), unit="batch"):
                bad += [outcome for outcome in batch if isinstance(outcome, str)]
                if not bad:  # otherwise, only find out which other files are bad
                    sizes += [size for _, size in batch]
                    rows += self._rows([image for images, _ in batch for image in images])
        require_good(bad, len(paths))
        values = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if views.count > 1:
            values = {name: v.unflatten(0, (-1, views.count)) for name, v in values.items()}
        return Extracted(values.pop(FEATURES), values, sizes)

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


def record_identity(network: str, weights_sha256: str, preprocessing: str) -> str:
    """SHA-256 that names a network in records beside measured values."""
    return sha256(json.dumps([network, weights_sha256, preprocessing]).encode()).hexdigest()


def directions(features: Tensor, paths: Sequence[Path]) -> Tensor:
    """Features scaled to length 1, (N, ..., D) float32."""
    norms = features.norm(dim=-1).view(len(features), -1)
    bad = (~(norms.isfinite() & (norms > 0)).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} images have features without a direction (zero or not finite), the"
            f" first is {paths[bad[0]]}; use another network"
        )
    return F.normalize(features, dim=-1)


def require_finite(features: Tensor, paths: Sequence[Path]) -> None:
    """Check that no feature is infinite or not a number."""
    bad = (~features.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(
            f"{len(bad)} images have features that are not finite, the first is"
            f" {paths[bad[0]]}; check the weights of the network"
        )


def _in_batches(
    paths: Sequence[Path], prepare: Callable[[Path], Any], step: int, threads: int
) -> Iterator[list[Any]]:
    """Prepared files by batches, in order; a file that is bad is the text of its error instead.

    At most `AHEAD` batches wait in memory.
    """

    def attempt(path: Path) -> Any:
        try:
            return prepare(path)
        except UserError as error:
            return str(error)

    waiting: deque[list] = deque()
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for start in range(0, len(paths), step):
            waiting.append([pool.submit(attempt, path) for path in paths[start : start + step]])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        for batch in waiting:
            yield [future.result() for future in batch]
