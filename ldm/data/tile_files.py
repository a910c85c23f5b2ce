"""The image files of a set of tiles, with their classes: listed, compared and told apart.

Nothing is decoded, and torch is not imported: a command that only looks at files starts at once.

Letters: N files, K classes.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.data.arrays import file_of, is_array
from ldm.data.images import EXTENSIONS, class_folders, list_images, read_tile
from ldm.data.storage import top_folder
from ldm.errors import UserError
from ldm.files import digest_of_text, file_sha256, require_class_names
from ldm.progress import FIRST_SIGN, Bar

if TYPE_CHECKING:
    import numpy as np

    from ldm.data.index import CorpusIndex

log = logging.getLogger(__name__)

OVERVIEW = "grid.png"  # what sample_diffusion.py draws beside its class folders
ALL = "all"


@dataclass(frozen=True)
class TileFiles:
    """The image files of a set.

    They are sorted within each class, and classes follow in label order: the order that every
    training set, table and file of features has them in.
    """

    root: Path
    names: list[str]  # paths of the N files below the root, with `/`
    labels: list[int]  # index of each file's class; -1 in a set without classes
    classes: list[str]  # K names in label order; empty for a set without classes
    part: str = ALL  # which of the tiles in the folder these are, for people
    # Patient, slide or region of each file (its own path where unknown); None without an index.
    groups: list[str] | None = None

    @classmethod
    def below(
        cls,
        root: str | os.PathLike,
        labelled: bool = True,
        classes: Sequence[str] | None = None,
        index: "CorpusIndex | None" = None,
        number: int = 0,
    ) -> "TileFiles":
        """List the images of a folder.

        Args:
            root: Folder of the set; of a labelled one, ROOT/CLASS/** holds the images, and images
                beside the classes are reported and left out. Or a file of arrays, or a part of it,
                whose rows are named like such files.
            classes: The classes there must be, in label order. Default: the folders' names, sorted.
            index: Index of the folder, which is then not walked; tiles with a problem are left out.
            number: Number of the folder among the roots of the index.
        """
        root = Path(root).expanduser()
        if not (root.is_dir() or is_array(root)):
            reason = "is not a folder" if root.exists() else "does not exist"
            raise UserError(f"tile folder {root} {reason}; check the path")
        group_of = None
        if index is not None:
            table = index.tiles(number)
            group_of = dict(zip(table["path"], table["group"], strict=True))
        names = _by_class(root, labelled, group_of and list(group_of))
        chosen = [""]
        if labelled:
            if not names:
                raise UserError(
                    f"{root}: no class folders; a labelled set is {root}/CLASS/image files, or a"
                    " file of arrays by its name"
                )
            chosen = matching_classes(f"{root}: class folders", sorted(names), classes)
        for name in chosen:
            if not names[name]:
                raise UserError(
                    f"{'class' if labelled else 'tile'} folder {root / name} has no images"
                    f" ({' '.join(sorted(EXTENSIONS))}); add some"
                )
        files = cls._of(root, {name: names[name] for name in chosen}, labelled)
        groups = group_of and [group_of[name] or name for name in files.names]
        return replace(files, groups=groups)

    @classmethod
    def if_classes(cls, root: Path, what: str) -> "TileFiles":
        """List the images of the class folders where there are any, else those in the folder.

        Args:
            what: How errors call the folder.
        """
        labelled = bool(class_folders(root))
        names = _by_class(root, labelled)
        if not labelled:
            names[""] = [name for name in names[""] if name != OVERVIEW]
        names = {name: paths for name, paths in names.items() if paths}
        if not names:
            raise UserError(f"{what}: {root} has no images; give a folder of tiles")
        return cls._of(root, names, labelled)

    @classmethod
    def _of(cls, root: Path, names: Mapping[str, list[str]], labelled: bool) -> "TileFiles":
        """The set of these paths by class, in label order."""
        labels = [k if labelled else -1 for k, paths in enumerate(names.values()) for _ in paths]
        return cls(root, list(chain(*names.values())), labels, list(names) if labelled else [])

    @cached_property
    def paths(self) -> list[Path]:
        """The N files."""
        return [self.root / path for path in self.names]

    @property
    def class_names(self) -> list[str]:
        """Class of each file by name; empty for a set without classes."""
        return [self.classes[label] for label in self.labels] if self.classes else []

    @property
    def counts(self) -> dict[str, int]:
        """Number of files of each class."""
        return {name: self.labels.count(label) for label, name in enumerate(self.classes)}

    def read(self, path: Path) -> "np.ndarray":
        """Decode one of `paths`, to uint8 (H, W, 3)."""
        return read_tile(path)

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of the content of each file; files are read when this is first asked for."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = pool.map(content_sha256, self.paths)
            options = {"total": len(self.paths), "unit": "file", "leave": False}
            return list(Bar(digests, "contents", delay=FIRST_SIGN, **options))

    # Three SHA-256 of the same facts, paths and contents, since each is recorded in files of its
    # own: with a changed line, none that was recorded before would be that of the same tiles.

    @property
    def listing(self) -> str:
        """Digest of the set as results of eval.py, copy checks and fidelity record it."""
        rows = zip(self.names, self.digests, strict=True)
        return digest_of_text(f"{digest} {name}\n" for name, digest in rows)

    @property
    def digest(self) -> str:
        """Digest of the set in any order, as features, centroids and selections record it."""
        rows = sorted(zip(self.names, self.digests, strict=True))
        return digest_of_text(f"{name}\0{digest}\n" for name, digest in rows)

    @property
    def inclusion(self) -> str:
        """Digest of the set as a subset that includes it records it."""
        rows = zip(self.names, self.digests, strict=True)
        return digest_of_text(f"{name} {digest}\n" for name, digest in rows)

    def stamp(self) -> str:
        """SHA-256 over paths, sizes and times of the files, which are not read.

        As long as it is the same, so are the files: the time of the last change of status, which no
        program can set back, is included. A new hard link to a file changes it too.
        """
        lines = []
        for name, path in zip(self.names, self.paths, strict=True):
            state = os.stat(file_of(path))
            times = f"{state.st_mtime_ns}\0{state.st_ctime_ns}"
            lines.append(f"{name}\0{state.st_size}\0{times}\n")
        return digest_of_text(lines)

    def select(self, rows: Iterable[int], part: str | None = None) -> "TileFiles":
        """The files at some places, with their digests where these are known.

        Args:
            part: Which of the tiles in the folder they are, for people; by default as these.
        """
        rows = list(rows)
        chosen = replace(
            self,
            names=[self.names[i] for i in rows],
            labels=[self.labels[i] for i in rows],
            groups=None if self.groups is None else [self.groups[i] for i in rows],
            part=self.part if part is None else part,
        )
        if "digests" in vars(self):
            vars(chosen)["digests"] = [self.digests[i] for i in rows]
        return chosen

    def distinct(self) -> "TileFiles":
        """These files without byte-identical repetitions; the first of each is kept."""
        first = {digest: i for i, digest in reversed(list(enumerate(self.digests)))}
        return self.select(sorted(first.values()))

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class TilesInMemory(TileFiles):
    """Tiles that are no files yet, where the files of a set are expected; names are numbers."""

    arrays: Sequence["np.ndarray"] = ()  # N, uint8 (H, W, 3)

    def read(self, path: Path) -> "np.ndarray":
        return self.arrays[int(path.name)]

    @cached_property
    def digests(self) -> list[str]:
        return [pixels_sha256(one) for one in self.arrays]


def pixels_sha256(pixels: "np.ndarray") -> str:
    """SHA-256 of the pixels of a tile, hexadecimal."""
    return sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of an image file, or of the pixels of a row of an array."""
    try:
        return file_sha256(path)
    except NotADirectoryError:
        return pixels_sha256(read_tile(path))


def _by_class(root: Path, labelled: bool, indexed: list[str] | None = None) -> dict[str, list[str]]:
    """Paths of the images below a folder, by class ("" without classes).

    Args:
        indexed: The paths, if an index lists them; the folder is then not walked.
    """
    paths = indexed
    if indexed is None:
        paths = [path.relative_to(root).as_posix() for path in list_images(root)]
    if not labelled:
        return {"": paths}
    names: dict[str, list[str]] = {}
    if indexed is None:  # classes without images too
        names = {name: [] for name in class_folders(root)}
    for path in paths:
        names.setdefault(top_folder(path) or "", []).append(path)
    loose = [path for path in names.pop("", []) if path != OVERVIEW]
    if loose:
        log.warning("%s: %d images beside the class folders are not used", root, len(loose))
    return names


def matching_classes(where: str, found: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The classes in label order: those wanted, if these are the ones found.

    Args:
        where: How the error calls those that were found.
    """
    spellings: dict[str, str] = {}
    for name in (*(wanted or ()), *found):
        other = spellings.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(f"{where}: {other} and {name} differ in case only; rename one")
    classes = list(wanted or found)
    require_class_names(classes, where)
    missing = sorted(set(classes) - set(found))
    extra = sorted(set(found) - set(classes))
    if missing or extra:
        raise UserError(
            f"{where} {list(found)} differ from the classes {classes} (missing {missing}, extra"
            f" {extra}); rename, add or remove some"
        )
    return classes


def new_rows(
    pool: TileFiles, labelled: TileFiles, held_out: Mapping[str, TileFiles], setting: str
) -> list[int]:
    """Unlabelled tiles that are neither among the labelled ones nor repeat another byte by byte.

    Args:
        held_out: Sets that classifiers are chosen or measured on, by name.
        setting: Where `pool` was named.
    """
    known, first = set(labelled.digests), {}
    for i, digest in enumerate(pool.digests):
        if digest not in known:
            first.setdefault(digest, i)
    for name, tiles in held_out.items():
        leaked = len(first.keys() & set(tiles.digests))
        if leaked:
            raise UserError(
                f"`{setting}` {pool.root}: {leaked} of its tiles are those of `{name}`"
                f" {tiles.root}, which must not be trained on; give other tiles"
            )
    if not first:
        raise UserError(f"`{setting}` {pool.root}: all its tiles are labelled; give other tiles")
    return list(first.values())
