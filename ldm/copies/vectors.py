"""Vectors of the three sets of a copy check, cached beside the report.

Letters: N tiles, S side of a network's input, D numbers per vector.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.copies import pixels
from ldm.data.tiles import TileFolder, decode_tiles, read_tile
from ldm.errors import UserError
from ldm.evaluation.sets import listing_sha256
from ldm.files import file_sha256, write_bytes
from ldm.models.vit import eval_transform
from ldm.selection.features import Extractor

FORMAT = "histodiffusion copy check 1"
PIXELS_PER_CALL = 4096  # tiles whose decoding is shown as one step


@dataclass(frozen=True)
class Tiles:
    """Files of one set.

    Attributes:
        root: Their folder.
        names: N paths below it, with `/`.
        paths: N files.
        digests: SHA-256 of each.
        labels: Class of each; empty names where there are no class folders.
    """

    root: Path
    names: list[str]
    paths: list[Path]
    digests: list[str]
    labels: list[str]

    @classmethod
    def below(cls, root: Path, labelled: bool = False) -> "Tiles":
        """All images below `root`; UserError where there are none.

        Args:
            labelled: Folders of `root` are classes, and images beside them do not count.
        """
        index = TileFolder(root, 1, labelled=labelled, check=False)  # no pixels needed: any size
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_sha256, index.paths))
        labels = [index.classes[label] if labelled else "" for label in index.labels]
        return cls(root, index.relative_paths, index.paths, digests, labels)

    def subset(self, indices: Sequence[int]) -> "Tiles":
        lists = (self.names, self.paths, self.digests, self.labels)
        return Tiles(self.root, *([values[i] for i in indices] for values in lists))

    def digest(self) -> str:
        """SHA-256 over names and contents."""
        return listing_sha256(self.digests, self.names)

    def distinct(self) -> "Tiles":
        """Without byte-identical repetitions."""
        first = {digest: i for i, digest in reversed(list(enumerate(self.digests)))}
        return self.subset(sorted(first.values()))

    def __len__(self) -> int:
        return len(self.names)


def cached(path: Path, tiles: Tiles, method: dict, compute: Callable[[], dict[str, Tensor]]):
    """`compute()`, or what it gave before for the same files and method.

    Args:
        path: Safetensors file, written anew where it is of others or damaged.
        method: What decides the result beside the files.
    """
    facts = json.dumps([FORMAT, method, tiles.digests], sort_keys=True)
    # A single entry: safetensors writes several in any order.
    metadata = {"made_of": hashlib.sha256(facts.encode()).hexdigest()}
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() == metadata:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        pass  # not there yet, or no longer whole
    tensors = compute()
    write_bytes(path, save(tensors, metadata))
    return tensors


def pixel_vectors(tiles: Tiles, cache: Path) -> tuple[Tensor, Tensor]:
    """Small pictures (N, D) float16 and contrasts (N,) float64, see `ldm.copies.pixels`.

    Raises:
        UserError: Unreadable images, by name.
    """

    def compute() -> dict[str, Tensor]:
        rows = []
        for start in tqdm(range(0, len(tiles), PIXELS_PER_CALL), desc=f"decode {tiles.root.name}"):
            rows += decode_tiles(tiles.paths[start : start + PIXELS_PER_CALL], pixels.pixel_vector)
        vectors = torch.stack([torch.from_numpy(vector) for vector, _ in rows])
        contrasts = torch.tensor([contrast for _, contrast in rows], dtype=torch.float64)
        return {"vectors": vectors, "contrasts": contrasts}

    method = {"side": pixels.SIDE, "floor": pixels.FLOOR}
    found = cached(cache, tiles, method, compute)
    return found["vectors"], found["contrasts"]


@torch.no_grad()
def network_vectors(
    tiles: Tiles, extractor: Extractor, turned: bool, batch_size: int, cache: Path
) -> Tensor:
    """Features as float32 of length 1: (N, D), or (N, 8, D) of all orientations with `turned`.

    Raises:
        UserError: Features that are zero or not finite, which have no direction.
    """
    size = extractor.net.input_size
    transform = eval_transform(size)
    device = next(extractor.net.parameters()).device

    views = len(pixels.ORIENTATIONS) if turned else 1

    def prepare(path: Path) -> Tensor:
        # Turned before it is resized and cropped: an odd margin would shift the crop of a turned
        # tile by a pixel, which networks notice.
        image = torch.from_numpy(pixels.centre_square(read_tile(path))).movedim(-1, 0)
        images = pixels.oriented(image[None])[0] if turned else image[None]  # (8 or 1, 3, H, H)
        pictures = (Image.fromarray(view.movedim(0, -1).numpy()) for view in images)
        return torch.stack([transform(picture) for picture in pictures])  # uint8 (..., 3, S, S)

    def compute() -> dict[str, Tensor]:
        rows = []
        step = max(1, batch_size // views)
        for start in tqdm(range(0, len(tiles), step), desc=f"features of {tiles.root.name}"):
            images = torch.cat(decode_tiles(tiles.paths[start : start + step], prepare))
            features = extractor.net.forward_features(images.to(device)).float()
            norms = features.norm(dim=1, keepdim=True)
            bad = (~(norms.isfinite() & (norms > 0))).flatten().nonzero().flatten().tolist()
            if bad:
                raise UserError(
                    f"{tiles.paths[start + bad[0] // views]}: its features have no direction (zero"
                    " or not finite); use another --weights or --model"
                )
            rows.append((features / norms).cpu())
        vectors = torch.cat(rows)
        return {"vectors": vectors.view(len(tiles), views, -1) if turned else vectors}

    method = {"extractor": extractor.identity, "turned": turned}
    return cached(cache, tiles, method, compute)["vectors"]
