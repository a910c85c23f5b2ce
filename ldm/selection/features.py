"""Features of tiles, from the evaluation ViT or any other timm network.

Letters: N images, B batch, S side of the network's input in pixels, D features, K classes.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import file_sha256
from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.evaluation.sets import TransformedTiles
from ldm.evaluation.training import Compute
from ldm.evaluation.vit import (
    SHORT_NAMES,
    TileClassifier,
    eval_transform,
    load_pretrained,
    load_vit,
)
from ldm.run import write_bytes
from ldm.selection.centroids import read_safetensors

log = logging.getLogger(__name__)

FORMAT = "histodiffusion features 1"
# What timm calls the file in the repositories that its pretrained configurations name.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Extractor:
    """A network that turns tiles into features.

    Attributes:
        net: In evaluation mode; `forward_features` takes uint8 (B, 3, S, S) and gives (B, D).
        name: For people.
        identity: SHA-256 of its weights, architecture and input size.
    """

    net: TileClassifier
    name: str
    identity: str

    @classmethod
    def _of(cls, net: TileClassifier, name: str, weights: Path) -> "Extractor":
        facts = {**net.params, "num_classes": None, "weights": file_sha256(weights)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cls(net, name, digest)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike, device: torch.device | str) -> "Extractor":
        """The classifier of a checkpoint, or of a seed's folder, that eval.py wrote."""
        net, record = load_vit(path, device)
        best = Path(path).expanduser() / "checkpoints" / "best.ckpt"
        weights = best if best.is_file() else Path(path).expanduser()
        return cls._of(net, f"{record['model']['params']['arch']} of {path}", weights)

    @classmethod
    def from_timm(
        cls,
        name: str,
        weights: str | os.PathLike | None,
        device: torch.device | str,
        input_size: int | None = None,
    ) -> "Extractor":
        """A timm network with weights from a local file or from the caches of timm.

        Args:
            name: timm's name, with or without a tag such as `.augreg_in21k`.
            weights: Local file; None looks into the caches. Nothing is downloaded.
            input_size: S; None for the network's own.

        Raises:
            UserError: An unknown network, or no weights.
        """
        import timm

        full_name = f"{name}_patch16_224" if name in SHORT_NAMES else name
        config = timm.get_pretrained_cfg(full_name) if timm.is_model(full_name) else None
        settings = {}
        if config is not None:
            settings = {"mean": list(config.mean), "std": list(config.std)}
            input_size = input_size or config.input_size[-1]
        try:
            net = TileClassifier(name, 0, input_size or 224, **settings)
        except UserError as error:  # it speaks of the options of eval.py
            text = str(error).replace("--arch", "--model").replace("--input-size", "--input_size")
            raise UserError(text) from None
        path = Path(weights).expanduser() if weights else cached_weights(config)
        if path is None:
            raise UserError(
                f"--model {name}: its weights are not on this machine and nothing is downloaded;"
                " give --pretrained_weights FILE, or where there is internet run: python -c"
                f" \"import timm; timm.create_model('{full_name}', pretrained=True)\""
            )
        load_pretrained(net, path, what="--pretrained_weights")
        net = net.to(device).eval().requires_grad_(False)
        return cls._of(net, f"{name} with {path.name}", path)

    @torch.no_grad()
    def features(self, tiles: TransformedTiles, batch_size: int, num_workers: int) -> Tensor:
        """L2-normalised features of all tiles in their order, (N, D) float32 on the CPU.

        Raises:
            UserError: A feature is not finite or all are zero, which has no direction.
        """
        device = next(self.net.parameters()).device
        # Full precision: features are compared with those of other runs and machines.
        loader = Compute(device, "32", num_workers).loader(tiles, batch_size)
        rows = []
        for images, _ in tqdm(loader, desc="features", unit="batch", dynamic_ncols=True):
            rows.append(self.net.forward_features(images.to(device)).float().cpu())  # (B, D)
        features = torch.cat(rows)  # (N, D)
        norms = features.norm(dim=1)
        bad = (~(norms.isfinite() & (norms > 0))).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"{len(bad)} images have features without a direction (zero or not finite), the"
                f" first is {tiles.paths[bad[0]]}; use another --weights or --model"
            )
        return F.normalize(features, dim=1)


def cached_weights(config) -> Path | None:
    """The weights of a timm pretrained configuration in the Hugging Face or torch cache, if any."""
    if config is None:
        return None
    if config.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache

        repository, _, revision = config.hf_hub_id.partition("@")
        files = (config.hf_hub_filename,) if config.hf_hub_filename else HUB_FILES
        for file in files:
            found = try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(found, str):  # otherwise None, or a note that there is no such file
                return Path(found)
    if config.url:
        path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(config.url))
        if path.is_file():
            return path
    return None


def tiles_digest(paths: Sequence[Path], names: Sequence[str]) -> str:
    """SHA-256 over names and contents of files, to tell a set from one made anew in its place.

    Args:
        paths: Files.
        names: Their paths below the set's folder, with `/`.
    """
    digest = hashlib.sha256()
    for name, path in sorted(zip(names, paths, strict=True)):
        digest.update(f"{name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class FeatureSet:
    """Features of a labelled folder, with what they belong to.

    Attributes:
        values: (N, D) float32, rows of length 1.
        labels: (N,) int64 in [0, K).
        files: N paths below the folder, with `/`.
        classes: K names in label order.
        extractor: SHA-256 that names the network.
        tiles: SHA-256 over the images, see `tiles_digest`.
    """

    values: Tensor
    labels: Tensor
    files: list[str]
    classes: list[str]
    extractor: str
    tiles: str

    def save(self, path: str | os.PathLike) -> None:
        metadata = {
            "format": FORMAT,
            "files": json.dumps(self.files),
            "classes": json.dumps(self.classes),
            "extractor": self.extractor,
            "tiles": self.tiles,
        }
        tensors = {"features": self.values.contiguous(), "labels": self.labels.contiguous()}
        write_bytes(Path(path), save(tensors, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureSet":
        """Read what `save` wrote; UserError for a missing or foreign file."""
        tensors, metadata = read_safetensors(path, FORMAT)
        return cls(
            values=tensors["features"],
            labels=tensors["labels"],
            files=json.loads(metadata["files"]),
            classes=json.loads(metadata["classes"]),
            extractor=metadata["extractor"],
            tiles=metadata["tiles"],
        )


def folder_features(
    root: Path,
    extractor: Extractor,
    cache: Path,
    classes: Sequence[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
) -> FeatureSet:
    """Features of every image of root/CLASS/**, read from `cache` where nothing has changed.

    Args:
        cache: Safetensors file; used when it is of the same images, classes and network, else
            written.
        classes: The classes there must be; None for those of the folder.

    Raises:
        UserError: Other classes, empty class folders, unreadable images.
    """
    index = TileFolder(root, extractor.net.input_size, labelled=True, classes=classes, check=False)
    digest = tiles_digest(index.paths, index.relative_paths)
    if cache.is_file():
        known = FeatureSet.load(cache)
        same = known.extractor == extractor.identity and known.tiles == digest
        if same and known.classes == index.classes:
            log.info("%s: %d images, features from %s", root, len(known.files), cache)
            return known
        log.info("%s: images or network differ from those of %s; computing anew", root, cache)
    size = extractor.net.input_size
    tiles = TransformedTiles(root, size, eval_transform(size), random=False, classes=index.classes)
    tiles.load()
    result = FeatureSet(
        values=extractor.features(tiles, batch_size, num_workers),
        labels=torch.tensor(tiles.labels, dtype=torch.int64),
        files=list(tiles.relative_paths),
        classes=list(tiles.classes),
        extractor=extractor.identity,
        tiles=digest,
    )
    result.save(cache)
    log.info("%s: features of %d images with %s", root, len(result.files), extractor.name)
    return result
