"""Sets of tiles whose fidelity is measured: their files, their features, and a file of these.

Letters: N images, D features.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ldm.data.images import class_folders, is_image, list_images
from ldm.data.tile_files import OVERVIEW
from ldm.errors import UserError
from ldm.evaluation.extractors import FidelityExtractor
from ldm.evaluation.sets import listing_sha256
from ldm.files import file_sha256, write_bytes
from ldm.selection.centroids import read_safetensors
from ldm.selection.training_folder import DECISIONS, PREFIX, RECORD

log = logging.getLogger(__name__)

FORMAT = "histodiffusion fidelity reference 1"


@dataclass(frozen=True)
class TileFiles:
    """The files of a set, in the order that `ldm.data.tiles.TileFolder` has them in.

    Attributes:
        root: Folder.
        paths: N files.
        names: Their paths below the folder, with `/`.
        classes: Class of each; empty for a folder without class folders.
        part: Which of the tiles in the folder these are, for people; "all" of them, as a rule.
    """

    root: Path
    paths: list[Path]
    names: list[str]
    classes: list[str]
    part: str = "all"

    @classmethod
    def below(cls, root: Path, synthetic: bool, what: str) -> "TileFiles":
        """Images of root/CLASS/** where there are folders, else those in the folder itself.

        Of a training folder that scripts/distance.py made, the real or the synthetic ones alone.

        Args:
            synthetic: Which part of such a folder is meant.
            what: How error messages call the folder, for example `--fake`.

        Raises:
            UserError: No images.
        """
        found = class_folders(root)
        paths, classes = [], []
        for name in found:
            inside = list_images(root / name)
            paths += inside
            classes += [name] * len(inside)
        loose = sorted(
            path
            for path in root.iterdir()
            if is_image(path.name) and path.name != OVERVIEW and path.is_file()
        )
        if not found:
            paths = loose
        elif loose:
            log.warning("%s: %d images beside the class folders are not used", root, len(loose))
        part = "all"
        if (root / RECORD).is_file() and (root / DECISIONS).is_file():
            part = "synthetic" if synthetic else "real"
            keep = [p.name.startswith(PREFIX) == synthetic for p in paths]
            paths = [p for p, kept in zip(paths, keep, strict=True) if kept]
            classes = [c for c, kept in zip(classes, keep, strict=True) if kept] if found else []
        if not paths:
            which = "" if part == "all" else f"{part} "
            raise UserError(f"{what}: {root} has no {which}images; give a folder of tiles")
        names = [path.relative_to(root).as_posix() for path in paths]
        return cls(root, paths, names, classes, part)

    def stamp(self) -> str:
        """SHA-256 over names, sizes and times of the files: when it is the same, so are they."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            # With the time of the last change of status, which no program can set back.
            s = os.stat(path)
            digest.update(f"{name}\0{s.st_size}\0{s.st_mtime_ns}\0{s.st_ctime_ns}\n".encode())
        return digest.hexdigest()

    def sha256(self) -> str:
        """SHA-256 over names and contents, the one that eval.py records of a set."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(file_sha256, self.paths))
        return listing_sha256(digests, self.names)


@dataclass(frozen=True)
class SetFeatures:
    """Features of a set, with what they belong to.

    Attributes:
        values: (N, D) float32, as the network gives them.
        classes: Class of each; empty for a set without.
        root: Folder that the images were in.
        part: See `TileFiles`.
        sha256: See `TileFiles.sha256`.
        stamp: See `TileFiles.stamp`.
        extractor: Record of the network, see `FidelityExtractor.record`.
        pixels: Number of images by "WIDTHxHEIGHT".
        formats: Number of images by extension.
    """

    values: Tensor
    classes: list[str]
    root: str
    part: str
    sha256: str
    stamp: str
    extractor: dict[str, Any]
    pixels: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)

    @classmethod
    def compute(
        cls, files: TileFiles, extractor: FidelityExtractor, batch_size: int, num_workers: int
    ) -> "SetFeatures":
        stamp, sha256 = files.stamp(), files.sha256()
        values, sizes = extractor.features(files.paths, batch_size, num_workers)
        return cls(
            values=values,
            classes=files.classes,
            root=str(files.root),
            part=files.part,
            sha256=sha256,
            stamp=stamp,
            extractor=extractor.record(),
            pixels=dict(Counter(f"{w}x{h}" for w, h in sizes).most_common()),
            formats=dict(Counter(p.suffix.lower()[1:] for p in files.paths).most_common()),
        )

    def record(self) -> dict[str, Any]:
        """What stands beside a measured value."""
        return {
            "dir": self.root,
            "part": self.part,
            "images": len(self.values),
            "sha256": self.sha256,
            "pixels": self.pixels,
            "formats": self.formats,
        }

    def save(self, path: Path) -> None:
        names = sorted(set(self.classes))
        labels = [names.index(c) for c in self.classes]
        facts = {
            "class_names": names,
            "root": self.root,
            "part": self.part,
            "sha256": self.sha256,
            "stamp": self.stamp,
            "extractor": self.extractor,
            "pixels": self.pixels,
            "formats": self.formats,
        }
        tensors = {
            "features": self.values.contiguous(),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        write_bytes(path, save(tensors, {"format": FORMAT, "facts": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> "SetFeatures":
        """Read what `save` wrote; UserError for a missing or foreign file."""
        try:
            tensors, metadata = read_safetensors(path, FORMAT)
        except UserError:
            raise UserError(
                f"--stats {path}: not a file that scripts/fidelity.py --stats wrote; give another"
                " name"
            ) from None
        facts = json.loads(metadata["facts"])
        names = facts.pop("class_names")
        classes = [names[i] for i in tensors["labels"].tolist()]
        return cls(values=tensors["features"], classes=classes, **facts)


def reference(
    files: TileFiles | None,
    extractor: FidelityExtractor,
    stats: Path | None,
    overwrite: bool,
    batch_size: int,
    num_workers: int,
) -> SetFeatures:
    """Features of the real set, from the file `stats` where it is of these images and network.

    Args:
        files: None when the file stands for them.
        stats: File of features; made where there is none. None keeps none.
        overwrite: Make it anew when it is of others.

    Raises:
        UserError: It is of other images or of another network, or no such file.
    """
    known = SetFeatures.load(stats) if stats is not None and stats.exists() else None
    differs = []
    if known is not None:
        if known.extractor["identity"] != extractor.identity:
            theirs = known.extractor
            differs.append(
                f"another extractor ({theirs['name']}, weights {theirs['weights_sha256'][:8]};"
                f" now {extractor.name}, weights {extractor.weights_sha256[:8]})"
            )
        # Contents are read only where the files may have changed.
        if (
            files is not None
            and files.stamp() != known.stamp
            and (files.part, files.sha256()) != (known.part, known.sha256)
        ):
            differs.append(f"other images than those in {files.root} now")
    if files is None:
        assert known is not None, "the command has checked that there is one of them"
        if differs:
            raise UserError(f"--stats {stats}: is of {differs[0]}; give --real or another file")
        return known
    if known is not None and not differs:
        log.info("%s: %d images, features from %s", files.root, len(known.values), stats)
        return known
    if known is not None and not overwrite:
        raise UserError(
            f"--stats {stats}: is of {' and '.join(differs)}; give another name, or --overwrite to"
            " make it anew"
        )
    found = SetFeatures.compute(files, extractor, batch_size, num_workers)
    if stats is not None:
        found.save(stats)
        log.info("%s: features of %d images in %s", files.root, len(found.values), stats)
    return found


def set_warnings(real: SetFeatures, fake: SetFeatures, trained_on: str | None) -> list[str]:
    """What makes two sets differ beside their content, and what the network has seen.

    Args:
        trained_on: Set that the network was trained on, see `FidelityExtractor`.
    """
    warnings = []
    if real.sha256 == fake.sha256:
        warnings.append("both sets are the same files")
    if real.pixels.keys() != fake.pixels.keys():
        warnings.append(
            f"tiles differ in size ({_most(real.pixels)} real, {_most(fake.pixels)} fake pixels):"
            " resampling counts as a difference; resize both alike first"
        )
    if real.formats.keys() != fake.formats.keys():
        warnings.append(
            f"files differ in format ({_most(real.formats)} real, {_most(fake.formats)} fake):"
            " traces of compression count as a difference"
        )
    if not (real.classes and fake.classes):
        plain = real.root if not real.classes else fake.root
        warnings.append(f"{plain} has no class folders: there are no values per class")
    if trained_on is not None and trained_on == real.sha256:
        warnings.append(
            "the extractor was trained on the very tiles of the real set, whose features lie apart"
            " from those of new tiles; take held-out tiles or another extractor"
        )
    return warnings


def _most(counts: dict[str, int]) -> str:
    names = list(counts)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def require_known_classes(real: Sequence[str], fake: Sequence[str], root: Path) -> None:
    """UserError when a set with classes has some that the real set, which has classes, lacks."""
    unknown = sorted(set(fake) - set(real))
    if real and unknown:
        raise UserError(
            f"--fake {root}: class folders {unknown} are not among those of the real set"
            f" {sorted(set(real))}; rename or remove them"
        )
