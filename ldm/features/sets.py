"""Sets of tiles: their files, their features, and the safetensors files that keep features.

Letters: N images, V views of an image, D features, K classes.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ldm.data.images import class_folders, is_image, list_images, listing_sha256
from ldm.data.tiles import OVERVIEW, TileFolder
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
from ldm.files import file_sha256, write_bytes

log = logging.getLogger(__name__)

FORMAT = "histodiffusion features 1"
REFERENCE_FORMAT = "histodiffusion fidelity reference 1"  # of earlier versions, which are read
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TileFiles:
    """The image files of a set, in an order of their own.

    Attributes:
        root: Folder of the set.
        paths: N files.
        names: Their paths below the folder, with `/`.
        labels: Class of each in [0, K); -1 in a set without classes.
        classes: K names in label order; none in a set without classes.
        part: Which of the tiles in the folder these are, for people; as a rule "all" of them.
    """

    root: Path
    paths: list[Path]
    names: list[str]
    labels: list[int]
    classes: list[str]
    part: str = "all"

    @classmethod
    def below(cls, root: Path, labelled: bool, classes: Sequence[str] | None = None) -> "TileFiles":
        """All images below a folder.

        Args:
            labelled: Folders of `root` are classes, and images beside them do not count.
            classes: The classes there must be; None for those of the folder.

        Raises:
            UserError: Other classes, or a folder without images.
        """
        index = TileFolder(root, 1, labelled=labelled, classes=classes, check=False)
        return cls(root, index.paths, index.relative_paths, index.labels, index.classes)

    @classmethod
    def if_classes(cls, root: Path, what: str) -> "TileFiles":
        """Images of root/CLASS/** where there are folders, else those in the folder itself.

        Args:
            what: How error messages call the folder, for example `--fake`.

        Raises:
            UserError: There are no images.
        """
        classes = class_folders(root)
        found = [(path, k) for k, name in enumerate(classes) for path in list_images(root / name)]
        loose = sorted(
            path
            for path in root.iterdir()
            if is_image(path.name) and path.name != OVERVIEW and path.is_file()
        )
        if not classes:
            found = [(path, -1) for path in loose]
        elif loose:
            log.warning("%s: %d images beside the class folders are not used", root, len(loose))
        if not found:
            raise UserError(f"{what}: {root} has no images; give a folder of tiles")
        paths, labels = [path for path, _ in found], [label for _, label in found]
        names = [path.relative_to(root).as_posix() for path in paths]
        return cls(root, paths, names, labels, classes)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> list[str]:
        """Class of each file; empty names in a set without classes."""
        return [self.classes[label] if label >= 0 else "" for label in self.labels]

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each file."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(file_sha256, self.paths))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and contents, whatever the order, see `tiles_digest`."""
        return _digest(self.names, self.digests)

    @property
    def listing(self) -> str:
        """SHA-256 over contents and names in this order, as eval.py records it of a set."""
        return listing_sha256(self.digests, self.names)

    def stamp(self) -> str:
        """SHA-256 over names, sizes and times of the files: when it is the same, so are they."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            # With the time of the last change of status, which no program can set back.
            s = os.stat(path)
            digest.update(f"{name}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}\n".encode())
        return digest.hexdigest()

    def select(self, rows: Sequence[int], part: str | None = None) -> "TileFiles":
        """The files at some places, with their digests where these are known."""
        lists = ([values[i] for i in rows] for values in (self.paths, self.names, self.labels))
        chosen = TileFiles(self.root, *lists, self.classes, part or self.part)
        if "digests" in vars(self):
            vars(chosen)["digests"] = [self.digests[i] for i in rows]
        return chosen

    def distinct(self) -> "TileFiles":
        """The files without byte-identical repetitions."""
        first = {digest: i for i, digest in reversed(list(enumerate(self.digests)))}
        return self.select(sorted(first.values()))


def tiles_digest(paths: Sequence[Path], names: Sequence[str]) -> str:
    """SHA-256 over names and contents of files, to tell a set from one made anew in its place.

    Args:
        paths: Files.
        names: Their paths below the set's folder, with `/`.
    """
    return _digest(names, [file_sha256(path) for path in paths])


def _digest(names: Sequence[str], digests: Sequence[str]) -> str:
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(zip(names, digests, strict=True)))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class FeatureSet:
    """Features of a set of tiles, with what they belong to.

    Attributes:
        values: (N, D), or (N, V, D) of several views; rows of length 1 unless `facts` say "raw".
        labels: (N,) int64 in [0, K), -1 in a set without classes.
        files: N paths below the folder, with `/`.
        classes: K names in label order.
        extractor: SHA-256 that names the network, see `Extractor.identity`.
        tiles: SHA-256 over the images, see `tiles_digest`.
        network: Name of the network, for people.
        trained_on: Which tiles the network was trained on, see `Extractor`.
        others: Further values by name, (N, ...): "logits", (N, K), of a classifier of `classes`.
        facts: What else is known of files and network, see `compute`.
    """

    values: Tensor
    labels: Tensor
    files: list[str]
    classes: list[str]
    extractor: str
    tiles: str
    network: str = ""
    trained_on: str | None = None
    others: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

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

        Raises:
            UserError: Unreadable images, or features that are not finite.
        """
        stamp = files.stamp() if raw else ""  # before the files are read
        found = extractor.extract(
            files.paths, batch_size, num_workers, views, f"features of {files.root.name}"
        )
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
        metadata = {
            "format": FORMAT,
            "files": json.dumps(self.files),
            "classes": json.dumps(self.classes),
            "extractor": self.extractor,
            "tiles": self.tiles,
            "network": self.network,
            "trained_on": self.trained_on or "",
        }
        if self.facts:
            metadata["facts"] = json.dumps(self.facts)
        write_tensors(path, {FEATURES: self.values, "labels": self.labels, **self.others}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "FeatureSet":
        """Read what `save` wrote, or a reference file of scripts/fidelity.py of earlier versions.

        Raises:
            UserError: A missing or foreign file.
        """
        tensors, metadata = read_tensors(path, FORMAT, REFERENCE_FORMAT)
        facts = json.loads(metadata.get("facts", "{}"))
        values, labels = tensors.pop(FEATURES), tensors.pop("labels")
        if metadata["format"] == REFERENCE_FORMAT:
            classes = facts.pop("class_names")
            if not classes:
                labels = torch.full_like(labels, -1)
            return cls(values, labels, [], classes, "", "", facts={"raw": True, **facts})
        return cls(
            values=values,
            labels=labels,
            files=json.loads(metadata["files"]),
            classes=json.loads(metadata["classes"]),
            extractor=metadata["extractor"],
            tiles=metadata["tiles"],
            network=metadata.get("network", ""),
            trained_on=metadata.get("trained_on") or None,
            others=tensors,
            facts=facts,
        )

    def in_order(self) -> "FeatureSet":
        """The same set sorted by class and file name, whatever order it came in."""
        labels = self.labels.tolist()
        order = sorted(range(len(labels)), key=lambda i: (labels[i], self.files[i]))
        if order == list(range(len(labels))):
            return self
        return replace(
            self,
            values=self.values[order],
            labels=self.labels[order],
            files=[self.files[i] for i in order],
            others={name: value[order] for name, value in self.others.items()},
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
        cache: Safetensors file. It is used when it holds the same images, classes, network and
            kind of values, and written otherwise. A path that does not end so is a folder, which
            holds a file for each network and set, named by the first 16 digits of their digests.
        batch_size, num_workers, views, raw: See `FeatureSet.compute`.

    Raises:
        UserError: Unreadable images, or features that are not finite.
    """
    if cache.suffix != SUFFIX:
        cache = cache / f"{extractor.identity[:16]}-{files.digest[:16]}{SUFFIX}"
    known = _readable(cache)
    if known is not None:
        if (
            (known.extractor, known.tiles) == (extractor.identity, files.digest)
            and (known.files, known.classes) == (files.names, files.classes)
            and (known.logits is not None) == extractor.classifies(files.classes)
            and known.facts.get("views", WHOLE.name) == views.name
            and known.facts.get("raw", False) == raw
        ):
            log.info("%s: %d images, features from %s", files.root, len(known.files), cache)
            return known
        log.info("%s: images or network differ from those of %s; computing anew", files.root, cache)
    result = FeatureSet.compute(files, extractor, batch_size, num_workers, views, raw)
    result.save(cache)
    log.info("%s: features of %d images with %s", files.root, len(result.files), extractor.name)
    return result


def _readable(cache: Path) -> FeatureSet | None:
    """The content of a cache file; None where there is none that can be read."""
    if not cache.is_file():
        return None
    try:
        return FeatureSet.load(cache)
    except UserError as error:
        log.info("%s; computing anew", error)
        return None


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(contiguous, metadata))


def read_tensors(
    path: str | os.PathLike, *formats: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file whose metadata name one of `formats`.

    Raises:
        UserError: A missing or damaged file, or one of another format.
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
    if metadata.get("format") not in formats:
        raise UserError(f"{path} does not hold {formats[0]!r}; make it with scripts/vis.py")
    return tensors, metadata
