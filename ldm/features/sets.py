"""Features of sets of tiles, and the safetensors files that keep them.

Letters: N images, V views of an image, D features, K classes.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.data.tile_files import TileFiles
from ldm.errors import UserError
from ldm.features.extractor import (
    FEATURES,
    LOGITS,
    WHOLE,
    Extractor,
    Views,
    directions,
    require_finite,
)
from ldm.files import digest_of, lock_file, remove_leftovers, require_class_names, write_bytes

log = logging.getLogger(__name__)

FORMAT = "histodiffusion features 1"
REFERENCE_FORMAT = "histodiffusion fidelity reference 1"  # of earlier versions, which are read
CENTROIDS_FORMAT = "histodiffusion centroids 1"
SUFFIX = ".safetensors"
TEXTS = ("extractor", "tiles", "network", "trained_on")  # fields of a set in a file's metadata


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of tiles, with what they belong to."""

    # (N, D), or (N, V, D) of several views; rows of length 1 unless `facts` say "raw".
    values: Tensor
    labels: Tensor  # (N,) int64 in [0, K), -1 in a set without classes
    files: list[str]  # N paths below the folder, with `/`
    classes: list[str]  # K names in label order
    extractor: str  # SHA-256 that names the network, see `Extractor.identity`
    tiles: str  # SHA-256 over the images, see `TileFiles.digest`
    network: str = ""  # name of the network, for people
    trained_on: str | None = None  # which tiles the network was trained on, see `Extractor`
    # Further values by name, (N, ...): "logits", (N, K), of a classifier of `classes`.
    others: dict[str, Tensor] = field(default_factory=dict)
    # What else is known of files and network, see `compute`.
    facts: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def centroids(self) -> Tensor:
        """Mean of the features of each class, which is not normalised again, (K, D) float32."""
        counts = torch.bincount(self.labels, minlength=len(self.classes))  # (K,)
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise UserError(f"classes {empty} have no images, so they have no centroid")
        sums = torch.zeros(len(counts), self.values.shape[1], dtype=torch.float64)
        sums.index_add_(0, self.labels, self.values.double())
        return (sums / counts[:, None]).float()

    @property
    def logits(self) -> Tensor | None:
        """(N, K) float32 of a network that classifies these classes; None of any other."""
        return self.others.get(LOGITS)

    @property
    def class_names(self) -> list[str]:
        """Class of each image; an empty list for a set without classes."""
        return [self.classes[label] for label in self.labels.tolist()] if self.classes else []

    @classmethod
    def compute(
        cls,
        files: TileFiles,
        extractor: Extractor,
        batch_size: int = 64,
        num_workers: int = 2,
        views: Views = WHOLE,
        raw: bool = False,
    ) -> "FeatureSet":
        """Features of files by a network.

        Args:
            batch_size, num_workers, views: See `Extractor.extract`.
                Views other than the tile itself are named in the facts.
            raw: Keep the features as the network gives them, and facts about the files with them:
                root, part, stamp, sha256 (see `TileFiles.listing`), pixels and formats (numbers of
                images by "WIDTHxHEIGHT" and by extension), extractor (`Extractor.record`).
        """
        stamp = files.stamp() if raw else ""  # before the files are read
        what = f"features of {files.root.name}"
        found = extractor.extract(files.paths, batch_size, num_workers, views, what, files.read)
        facts: dict[str, Any] = {} if views is WHOLE else {"views": views.name}
        if raw:
            require_finite(found.features, files.paths)
            formats = Counter(path.suffix.lower()[1:] for path in files.paths)
            facts |= {
                "raw": True,
                "root": str(files.root),
                "part": files.part,
                "stamp": stamp,
                "sha256": files.listing,
                "pixels": dict(Counter(f"{w}x{h}" for w, h in found.sizes).most_common()),
                "formats": dict(formats.most_common()),
                "extractor": extractor.record(),
            }
        others = dict(found.others)
        if not extractor.classifies(files.classes):
            others.pop(LOGITS, None)
        return cls(
            values=found.features if raw else directions(found.features, files.paths),
            labels=torch.tensor(files.labels, dtype=torch.int64),
            files=list(files.names),
            classes=list(files.classes),
            extractor=extractor.identity,
            tiles=files.digest,
            network=extractor.name,
            trained_on=extractor.trained_on,
            others=others,
            facts=facts,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file."""
        metadata = {"format": FORMAT, "files": json.dumps(self.files)}
        metadata |= {"classes": json.dumps(self.classes)}
        metadata |= {name: getattr(self, name) or "" for name in TEXTS}
        if self.facts:
            metadata["facts"] = json.dumps(self.facts)
        write_tensors(path, {FEATURES: self.values, "labels": self.labels, **self.others}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureSet":
        """Read what `save` wrote, or a reference of scripts/fidelity.py of earlier versions."""
        tensors, metadata = read_tensors(path, FORMAT, REFERENCE_FORMAT)
        facts = json.loads(metadata.get("facts", "{}"))
        values, labels = tensors.pop(FEATURES), tensors.pop("labels")
        if metadata["format"] == REFERENCE_FORMAT:
            classes = facts.pop("class_names")
            if not classes:
                labels = torch.full_like(labels, -1)
            return cls(values, labels, [], classes, "", "", facts={"raw": True, **facts})
        files, classes = (json.loads(metadata[name]) for name in ("files", "classes"))
        require_class_names(classes, str(path))
        texts = [metadata.get(name, "") for name in TEXTS[:-1]]
        trained_on = metadata.get(TEXTS[-1]) or None
        return cls(values, labels, files, classes, *texts, trained_on, tensors, facts)

    def save_centroids(self, path: str | os.PathLike) -> None:
        """Write `centroids` with what they belong to as a safetensors file."""
        facts = {"extractor": self.extractor, "tiles": self.tiles}
        facts |= {"format": CENTROIDS_FORMAT, "classes": json.dumps(self.classes)}
        write_tensors(path, {"centroids": self.centroids}, facts)

    def in_order(self) -> "FeatureSet":
        """The same set sorted by class and file name, whatever order it came in."""
        labels = self.labels.tolist()
        order = sorted(range(len(labels)), key=lambda i: (labels[i], self.files[i]))
        return self if order == list(range(len(labels))) else self.select(order)

    def select(self, rows: list[int]) -> "FeatureSet":
        """The images at some places, in that order; the digest stays that of the set."""
        return replace(
            self,
            values=self.values[rows],
            labels=self.labels[rows],
            files=[self.files[i] for i in rows],
            others={name: value[rows] for name, value in self.others.items()},
        )

    @classmethod
    def joined(cls, sets: Sequence["FeatureSet"]) -> "FeatureSet":
        """The same images as several networks see them: features side by side, of length 1."""
        if len(sets) == 1:
            return sets[0]
        return replace(
            sets[0],
            values=torch.cat([one.values for one in sets], dim=1) / len(sets) ** 0.5,
            extractor=digest_of([one.extractor for one in sets]),
            network=" + ".join(one.network for one in sets),
            trained_on=next((one.trained_on for one in sets if one.trained_on), None),
            others={},
        )


def cached_features(
    files: TileFiles,
    extractor: Extractor,
    cache: Path,
    batch_size: int = 64,
    num_workers: int = 2,
    views: Views = WHOLE,
    raw: bool = False,
) -> FeatureSet:
    """Features of files, read from `cache` where nothing has changed.

    Args:
        cache: Safetensors file. It is used when it holds the same images, network and kind of
            values, with the classes of now, and written otherwise. A path that does not end so
            is a folder, which holds a file for each network and set, named by the first 16 digits
            of their digests.
        batch_size, num_workers, views, raw: See `FeatureSet.compute`.
    """
    if cache.suffix != SUFFIX:
        cache = cache / f"{extractor.identity[:16]}-{files.digest[:16]}{SUFFIX}"
    lock = cache.with_name(f".{cache.name}.lock")
    if lock.exists():
        log.info("%s: another process may be computing these features; this one waits", files.root)
    with lock_file(lock, wait=True) as alone:
        try:
            known = _read_cached(files, extractor, cache, views, raw)
            if known is not None:
                return known
            if alone is not None:
                remove_leftovers(cache)
            result = FeatureSet.compute(files, extractor, batch_size, num_workers, views, raw)
            result.save(cache)
        finally:
            if alone is not None:
                lock.unlink(missing_ok=True)
    log.info("%s: features of %d images with %s", files.root, len(result.files), extractor.name)
    return result


def _read_cached(
    files: TileFiles, extractor: Extractor, cache: Path, views: Views, raw: bool
) -> FeatureSet | None:
    """What a cache holds of these files; None where it is missing, damaged or of something else."""
    if not cache.is_file():
        return None
    try:
        known = FeatureSet.load(cache)
    except UserError as error:
        log.info("%s; computing anew", error)
        return None
    if (
        (known.extractor, known.tiles) != (extractor.identity, files.digest)
        or known.files != files.names
        or (known.logits is not None) != extractor.classifies(files.classes)
        or known.facts.get("views", WHOLE.name) != views.name
        or known.facts.get("raw", False) != raw
    ):
        log.info("%s: other images, network or kind of values than in %s", files.root, cache)
        return None
    log.info("%s: %d images, features from %s", files.root, len(known.files), cache)
    # The same tiles may be labelled for one command and unlabelled for another.
    labels = torch.tensor(files.labels, dtype=torch.int64)
    return replace(known, labels=labels, classes=list(files.classes))


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata))


def read_tensors(
    path: str | os.PathLike, *formats: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata name one of `formats`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; make it with scripts/vis.py")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}); run scripts/vis.py") from None
    if metadata.get("format") not in formats:
        raise UserError(f"{path} does not hold {formats[0]!r}; make it with scripts/vis.py")
    return tensors, metadata
