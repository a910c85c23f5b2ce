"""The image files of a set of tiles, with their classes: listed, compared and told apart.

Nothing is decoded, and torch is not imported: a command that only looks at files starts at once.

Letters: N files, K classes.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.data.images import EXTENSIONS, class_folders, is_image, list_images
from ldm.data.storage import top_folder
from ldm.errors import UserError
from ldm.files import digest_of_text, file_sha256

if TYPE_CHECKING:
    from ldm.data.index import CorpusIndex

log = logging.getLogger(__name__)

OVERVIEW = "grid.png"  # what sample_diffusion.py draws beside its class folders
ALL = "all"

# Lines of which `TileFiles.sha256` is taken. They differ by the file that records the digest: a
# changed line would make every digest that was recorded before differ from that of the same files.
EVALUATION_LINE = "{digest} {name}\n"  # results of eval.py, copy checks, references of fidelity
FEATURES_LINE = "{name}\0{digest}\n"  # files of features and of centroids, selections
SUBSET_LINE = "{name} {digest}\n"  # subsets that include another folder


@dataclass(frozen=True)
class TileFiles:
    """The image files of a set.

    They are sorted within each class, and classes follow in label order: the order that every
    training set, table and file of features has them in.

    Attributes:
        root: Folder of the set.
        relative_paths: Paths of the N files below the folder, with `/`.
        labels: Class of each file, an index into `classes`; -1 in a set without classes.
        classes: K class names in label order; empty for a set without classes.
        part: Which of the tiles in the folder these are, for people.
        groups: Patient, slide or region of each file (its own path where unknown), from an index;
            None without one.
    """

    root: Path
    relative_paths: list[str]
    labels: list[int]
    classes: list[str]
    part: str = ALL
    groups: list[str] | None = None

    @classmethod
    def below(
        cls,
        root: str | os.PathLike,
        labelled: bool | None = True,
        classes: Sequence[str] | None = None,
        index: "CorpusIndex | None" = None,
        number: int = 0,
    ) -> "TileFiles":
        """List the images of a folder.

        Args:
            root: Folder of the set; of a labelled one, ROOT/CLASS/** holds the images.
            labelled: Whether folders directly below `root` are classes. Images beside them are
                then reported and left out. None: where there are such folders.
            classes: The classes there must be, in label order. Default: the folders' names, sorted.
            index: Index of the folder, which is then not walked; tiles with a problem are left out.
            number: Number of the folder among the roots of the index.

        Raises:
            UserError: The folder, its classes or the images of a class are missing, or the classes
                are not those that there must be.
        """
        root = Path(root).expanduser()
        require_tile_folder(root)
        if index is not None:
            names, loose, group_of = _listed(root, bool(labelled), index, number)
        else:
            if labelled is None:
                labelled = bool(class_folders(root))
            names, loose, group_of = *_found(root, labelled), None
        if labelled:
            if loose:
                log.warning("%s: %d images beside the class folders are not used", root, loose)
            chosen = _matching_classes(root, sorted(names), classes)
        else:
            chosen = [""]
        paths, labels = [], []
        for label, name in enumerate(chosen):
            if not names[name]:
                what = "class folder" if labelled else "tile folder"
                raise UserError(
                    f"{what} {root / name} has no images ({' '.join(sorted(EXTENSIONS))}); add some"
                )
            paths += names[name]
            labels += [label if labelled else -1] * len(names[name])
        groups = None if group_of is None else [group_of[path] or path for path in paths]
        return cls(root, paths, labels, chosen if labelled else [], groups=groups)

    @cached_property
    def paths(self) -> list[Path]:
        """The N files."""
        return [self.root / path for path in self.relative_paths]

    @property
    def class_names(self) -> list[str]:
        """Class of each file by name; empty for a set without classes."""
        return [self.classes[label] for label in self.labels] if self.classes else []

    @property
    def counts(self) -> dict[str, int]:
        """Number of files of each class."""
        return {name: self.labels.count(label) for label, name in enumerate(self.classes)}

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of the content of each file; files are read when this is first asked for."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(file_sha256, self.paths))

    def sha256(self, line: str = EVALUATION_LINE) -> str:
        """SHA-256 over paths and contents, which tells whether two sets are the same files.

        Args:
            line: What is hashed for each file: EVALUATION_LINE, FEATURES_LINE or SUBSET_LINE.
        """
        rows = zip(self.relative_paths, self.digests, strict=True)
        return digest_of_text(line.format(name=name, digest=digest) for name, digest in rows)

    def stamp(self, with_status: bool = False) -> str:
        """SHA-256 over paths, sizes and times of the files, which are not read.

        As long as it is the same, so are the files.

        Args:
            with_status: Include the time of the last change of status, which no program can set
                back, but which a new hard link to the file changes too.
        """
        lines = []
        for name, path in zip(self.relative_paths, self.paths, strict=True):
            state = os.stat(path)
            line = f"{name}\0{state.st_size}\0{state.st_mtime_ns}"
            lines.append(f"{line}\0{state.st_ctime_ns}\n" if with_status else f"{line}\n")
        return digest_of_text(lines)

    def subset(self, indices: Iterable[int], part: str | None = None) -> "TileFiles":
        """The files at `indices`.

        Args:
            part: What they are of the folder, for people; by default as these.
        """
        indices = list(indices)
        chosen = replace(
            self,
            relative_paths=[self.relative_paths[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            groups=None if self.groups is None else [self.groups[i] for i in indices],
            part=self.part if part is None else part,
        )
        if "digests" in self.__dict__:  # known already; a file is not read twice
            chosen.__dict__["digests"] = [self.digests[i] for i in indices]
        return chosen

    def distinct(self) -> "TileFiles":
        """These files without byte-identical repetitions; the first of each is kept."""
        first = {digest: i for i, digest in reversed(list(enumerate(self.digests)))}
        return self.subset(sorted(first.values()))

    def __len__(self) -> int:
        return len(self.relative_paths)


def require_tile_folder(root: Path) -> None:
    """Check that a folder exists; UserError otherwise."""
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"tile folder {root} {reason}; check the path")


def _found(root: Path, labelled: bool) -> tuple[dict[str, list[str]], int]:
    """Paths of the images below a folder by class ("" without classes), and of how many beside."""

    def below(folder: Path) -> list[str]:
        return [path.relative_to(root).as_posix() for path in list_images(folder)]

    if not labelled:
        return {"": below(root)}, 0
    loose = [path for path in root.iterdir() if is_image(path.name) and path.is_file()]
    names = {name: below(root / name) for name in class_folders(root)}
    return names, sum(path.name != OVERVIEW for path in loose)


def _listed(
    root: Path, labelled: bool, index: "CorpusIndex", number: int
) -> tuple[dict[str, list[str]], int, dict[str, str]]:
    """As `_found`, from an index, with the group of each path."""
    table = index.tiles(number)
    group_of = dict(zip(table["path"], table["group"], strict=True))
    if not labelled:
        return {"": table["path"]}, 0, group_of
    names: dict[str, list[str]] = {}
    for path in table["path"]:
        names.setdefault(top_folder(path) or "", []).append(path)
    return names, len(names.pop("", [])), group_of


def _matching_classes(root: Path, found: list[str], wanted: Sequence[str] | None) -> list[str]:
    """The classes in label order, if the class folders are those that there must be."""
    if not found:
        raise UserError(f"{root}: no class folders; a labelled set is {root}/CLASS/image files")
    classes = list(wanted or found)
    missing = sorted(set(classes) - set(found))
    extra = sorted(set(found) - set(classes))
    if missing or extra:
        raise UserError(
            f"{root}: class folders {found} differ from the classes {classes}"
            f" (missing {missing}, extra {extra}); rename, add or remove folders"
        )
    return classes
