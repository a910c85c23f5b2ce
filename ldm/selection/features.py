"""Features of tiles, from the evaluation ViT or any other timm network.

Letters: N images, B batch, S side of the network's input in pixels, D features, K classes.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.data.tiles import TileFolder
from ldm.errors import UserError
from ldm.evaluation.runs import RESULT
from ldm.evaluation.sets import TransformedTiles, listing_sha256
from ldm.evaluation.training import make_loader
from ldm.files import file_sha256, write_bytes
from ldm.models.vit import (
    SHORT_NAMES,
    TileClassifier,
    eval_transform,
    load_pretrained,
    load_vit,
)
from ldm.selection.centroids import read_safetensors

log = logging.getLogger(__name__)

FORMAT = "histodiffusion features 1"
SUFFIX = ".safetensors"
# What timm calls the file in the repositories that its pretrained configurations name.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Extractor:
    """A network that turns tiles into features.

    Attributes:
        net: In evaluation mode; `forward_features` takes uint8 (B, 3, S, S) and gives (B, D).
        name: For people.
        identity: SHA-256 of its weights, architecture and input size.
        trained_on: Which labelled tiles it was trained on, as `training_tiles` has it; None where
            that is not recorded.
        weights: File that they were read from.
    """

    net: TileClassifier
    name: str
    identity: str
    trained_on: str | None = None
    weights: Path | None = None

    @classmethod
    def _of(
        cls, net: TileClassifier, name: str, weights: Path, trained_on: str | None = None
    ) -> "Extractor":
        facts = {**net.params, "num_classes": None, "weights": file_sha256(weights)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return cls(net, name, digest, trained_on, weights)

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike, device: torch.device | str, what: str = "--weights"
    ) -> "Extractor":
        """The classifier of a checkpoint, or of a seed's folder, that eval.py wrote.

        Args:
            what: How error messages call it.
        """
        net, record = load_vit(path, device, what)
        best = Path(path).expanduser() / "checkpoints" / "best.ckpt"
        weights = best if best.is_file() else Path(path).expanduser()
        name = f"{record['model']['params']['arch']} of {path}"
        return cls._of(net, name, weights, _recorded_training_tiles(weights))

    @classmethod
    def from_timm(
        cls,
        name: str,
        weights: str | os.PathLike | None,
        device: torch.device | str,
        input_size: int | None = None,
        what: str = "--model",
    ) -> "Extractor":
        """A timm network with weights from a local file or from the caches of timm.

        Args:
            name: timm's name, with or without a tag such as `.augreg_in21k`.
            weights: Local file; None looks into the caches. Nothing is downloaded.
            input_size: S; None for the network's own.
            what: How error messages call the network.

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
            text = str(error).replace("--arch", what).replace("--input-size", "--input_size")
            raise UserError(text) from None
        path = Path(weights).expanduser() if weights else cached_weights(config)
        if path is None:
            raise UserError(
                f"{what} {name}: its weights are not on this machine and nothing is downloaded;"
                " give --pretrained_weights FILE, or where there is internet run: python -c"
                f" \"import timm; timm.create_model('{full_name}', pretrained=True)\""
            )
        load_pretrained(net, path, what="--pretrained_weights")
        net = net.to(device).eval().requires_grad_(False)
        return cls._of(net, f"{name} with {path.name}", path)

    def classifies(self, classes: Sequence[str]) -> bool:
        """Whether the network is a classifier of these very classes."""
        return self.net.classes == list(classes)

    @torch.no_grad()
    def features(
        self, tiles: TransformedTiles, batch_size: int, num_workers: int
    ) -> tuple[Tensor, Tensor | None]:
        """L2-normalised features and logits of all tiles in their order, float32 on the CPU.

        Returns:
            (N, D), and (N, K) or None: only a network that classifies these classes has logits.

        Raises:
            UserError: A feature is not finite or all are zero, which has no direction.
        """
        device = next(self.net.parameters()).device
        # Full precision: features are compared with those of other runs and machines.
        loader = make_loader(tiles, num_workers, batch_size=batch_size)
        rows, logits = [], []
        for batch in tqdm(loader, desc="features", unit="batch", dynamic_ncols=True):
            images = batch["image"].to(device)
            if self.classifies(tiles.classes):
                features, scores = self.net.features_and_logits(images)  # (B, D), (B, K)
                logits.append(scores.float().cpu())
            else:
                features = self.net.forward_features(images)  # (B, D)
            rows.append(features.float().cpu())
        features = torch.cat(rows)  # (N, D)
        norms = features.norm(dim=1)
        bad = (~(norms.isfinite() & (norms > 0))).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"{len(bad)} images have features without a direction (zero or not finite), the"
                f" first is {tiles.paths[bad[0]]}; use another --weights or --model"
            )
        return F.normalize(features, dim=1), torch.cat(logits) if logits else None


def training_tiles(tiles: TileFolder) -> str:
    """SHA-256 of labelled tiles as eval.py records it of its training set."""
    return listing_sha256([file_sha256(path) for path in tiles.paths], tiles.relative_paths)


def _recorded_training_tiles(checkpoint: Path) -> str | None:
    """What eval.py wrote beside a checkpoint SEED/checkpoints/best.ckpt about its training set."""
    try:
        return json.loads((checkpoint.parents[1] / RESULT).read_text())["data"]["train"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


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
        network: Its name, for people.
        trained_on: Which tiles the network was trained on, see `Extractor`.
        logits: (N, K) float32 of a network that classifies these classes; None of any other.
    """

    values: Tensor
    labels: Tensor
    files: list[str]
    classes: list[str]
    extractor: str
    tiles: str
    network: str = ""
    trained_on: str | None = None
    logits: Tensor | None = None

    def save(self, path: str | os.PathLike) -> None:
        metadata = {
            "format": FORMAT,
            "files": json.dumps(self.files),
            "classes": json.dumps(self.classes),
            "extractor": self.extractor,
            "tiles": self.tiles,
            "network": self.network,
            "trained_on": self.trained_on or "",
        }
        tensors = {"features": self.values.contiguous(), "labels": self.labels.contiguous()}
        if self.logits is not None:
            tensors["logits"] = self.logits.contiguous()
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
            network=metadata.get("network", ""),
            trained_on=metadata.get("trained_on") or None,
            logits=tensors.get("logits"),
        )

    def in_order(self) -> "FeatureSet":
        """The same sorted by class and file name, whatever order they came in."""
        labels = self.labels.tolist()
        order = sorted(range(len(labels)), key=lambda i: (labels[i], self.files[i]))
        if order == list(range(len(labels))):
            return self
        return replace(
            self,
            values=self.values[order],
            labels=self.labels[order],
            files=[self.files[i] for i in order],
            logits=None if self.logits is None else self.logits[order],
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
            written. A path that does not end so is a folder, which holds a file for each network
            and set, named by the first 16 digits of their digests.
        classes: The classes there must be; None for those of the folder.

    Raises:
        UserError: Other classes, empty class folders, unreadable images.
    """
    index = TileFolder(root, extractor.net.input_size, labelled=True, classes=classes, check=False)
    digest = tiles_digest(index.paths, index.relative_paths)
    if cache.suffix != SUFFIX:
        cache = cache / f"{extractor.identity[:16]}-{digest[:16]}{SUFFIX}"
    if cache.is_file():
        known = FeatureSet.load(cache)
        same = known.extractor == extractor.identity and known.tiles == digest
        same &= (known.logits is not None) == extractor.classifies(index.classes)
        if same and known.classes == index.classes:
            log.info("%s: %d images, features from %s", root, len(known.files), cache)
            return known
        log.info("%s: images or network differ from those of %s; computing anew", root, cache)
    size = extractor.net.input_size
    tiles = TransformedTiles(root, size, eval_transform(size), random=False, classes=index.classes)
    tiles.load()
    values, logits = extractor.features(tiles, batch_size, num_workers)
    result = FeatureSet(
        values=values,
        labels=torch.tensor(tiles.labels, dtype=torch.int64),
        files=list(tiles.relative_paths),
        classes=list(tiles.classes),
        extractor=extractor.identity,
        tiles=digest,
        network=extractor.name,
        trained_on=extractor.trained_on,
        logits=logits,
    )
    result.save(cache)
    log.info("%s: features of %d images with %s", root, len(result.files), extractor.name)
    return result
