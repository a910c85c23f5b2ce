"""How a corpus stores its tiles: a file each, rows of an array, or members of tar shards.

A layout finds the files of a corpus, lists the tiles in one file, and reads one tile by its place
(file, offset, size). Any tile is read directly, in any order, since a resumed run, several ranks
and a weighted pass all depend on that. The readers of the webdataset library run through a shard
from its start, so they are not used for this. Keys and extensions of members are split by that
library's rule, shards that it writes are read here, and a test compares what both of them see.
"""

import math
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from ldm.data.arrays import OPEN_FILES, TileArray, file_of, holds_arrays, is_array, open_arrays
from ldm.data.images import decode_tile, is_image, is_junk, to_levels, walk
from ldm.data.slides import EXTENSIONS, Tiling, chosen_tiles, read_window
from ldm.errors import UserError
from ldm.files import require_class_names

BLOCK = 512  # bytes, of which a tar file is made


class Place(NamedTuple):
    """The place where a tile is stored."""

    path: str  # the tile's name below the root of its corpus, with `/`
    file: str  # the file below the root that holds it
    offset: int  # bytes into a shard, row of an array, 0 in a file of its own
    size: int  # bytes; 0 in a file of its own, all of which is read
    label: str | None  # class name, where the corpus tells


def top_folder(path: str) -> str | None:
    """The first folder of a name below a root; None for one that lies in the root itself."""
    return path.split("/", 1)[0] if "/" in path else None


def split_member(name: str) -> tuple[str | None, str | None]:
    """Key and extension of a member of a tar shard; the first dot of its base name ends the key.

    Returns:
        (None, None) for a name without an extension, or one that begins with the dot.
    """
    match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", name)
    return (match[1], match[2]) if match else (None, None)


class Layout:
    """A way to store tiles: a file per tile, or what a subclass says.

    Files may lie in folders of any depth; the label is the first folder below the root.
    """

    kind = "image files"
    holds_images = True  # whether the stored bytes of a tile are an image file

    def holds_tiles(self, name: str) -> bool:
        """Whether a file of this name holds tiles."""
        return is_image(name)

    def places(self, root: Path, file: str) -> list[Place]:
        """The tiles in a file.

        Raises:
            UserError, OSError: The file is missing or damaged.
        """
        return [Place(file, file, 0, 0, top_folder(file))]

    def state(self, root: Path, file: str) -> os.stat_result:
        """Size and times of a file that `find_files` found."""
        return os.stat(root / file)

    def content(self, root: Path, place: Place) -> Any:
        """The stored bytes of a tile, or its row of an array."""
        return (root / place.file).read_bytes()

    def decode(self, root: Path, place: Place, content: Any) -> np.ndarray:
        """The pixels that `content` stands for, uint8 (H, W, 3)."""
        return decode_tile(content, str(root / place.path))


class ArrayLayout(Layout):
    """Rows of the arrays in .npy, .npz and HDF5 files, see `ldm.data.arrays`.

    A root may also be one such file, or FILE/PART, one of its arrays: pathmnist.npz/train.
    """

    kind = "arrays (images.npy, .npz, .h5)"
    holds_images = False

    def holds_tiles(self, name: str) -> bool:
        return not is_junk(name) and holds_arrays(name)

    def state(self, root: Path, file: str) -> os.stat_result:
        return os.stat(file_of(root / file))

    def places(self, root: Path, file: str) -> list[Place]:
        found = []
        for part, array in open_arrays(root / file).items():
            name = "/".join(filter(None, (file if file != "." else "", part)))
            size = array.rows.dtype.itemsize * math.prod(array.rows.shape[1:])
            found += [
                Place(f"{name}/{i:06d}" if name else f"{i:06d}", file, i, size, label)
                for i, label in enumerate(array.class_names())
            ]
        return found

    def _array(self, root: Path, place: Place) -> TileArray:
        name = place.path if place.file == "." else place.path.removeprefix(f"{place.file}/")
        return open_arrays(root / place.file)[name.rpartition("/")[0]]

    def content(self, root: Path, place: Place) -> np.ndarray:
        return self._array(root, place)[place.offset]

    def decode(self, root: Path, place: Place, content: Any) -> np.ndarray:
        name, array = str(root / place.path), self._array(root, place)
        return to_levels(content, name, array.white)


class ShardLayout(Layout):
    """Tar shards in the layout of WebDataset: every uncompressed .tar file below the root.

    The label of KEY.png is the text of KEY.cls beside it, or else the first folder in its name.
    """

    kind = "tar shards"

    def holds_tiles(self, name: str) -> bool:
        return name.lower().endswith(".tar") and not is_junk(name)

    def places(self, root: Path, file: str) -> list[Place]:
        path = root / file
        found: dict[str, Place] = {}
        classes: dict[str, str] = {}
        end = 0
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    if not member.isreg():
                        continue
                    name, parts = member.name, PurePosixPath(member.name).parts
                    if name.startswith("/") or ".." in parts:
                        raise UserError(f"{path}: member {name} leaves the shard; rename it")
                    key, extension = split_member(name)
                    if extension == "cls":
                        content = archive.extractfile(member).read()
                        classes[key] = content.decode(errors="replace").strip()
                    elif is_image(parts[-1]) and not any(map(is_junk, parts)):
                        if name in found:
                            raise UserError(f"{path}: two members {name}; rename one")
                        label, place = top_folder(name.removeprefix("./")), member.offset_data
                        found[name] = Place(f"{file}/{name}", file, place, member.size, label)
            with path.open("rb") as stream:
                stream.seek(end)
                # tarfile takes a file that ends between two members for a complete one.
                if stream.read(BLOCK) != bytes(BLOCK):
                    raise EOFError("its end is missing")
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path}: not a complete tar file ({error}); write it again") from None
        labels = {name: classes.get(split_member(name)[0], p.label) for name, p in found.items()}
        require_class_names(sorted(set(labels.values()) - {None}), str(path))
        return [place._replace(label=labels[name]) for name, place in found.items()]

    def content(self, root: Path, place: Place) -> bytes:
        shard = _open_shard(str(root / place.file))
        content = os.pread(shard.fileno(), place.size, place.offset)
        if len(content) < place.size:
            raise UserError(f"{root / place.path}: the shard is cut short; write it again")
        return content


class SlideLayout(Layout):
    """Whole-slide images, of which tiles are read on the fly, see `ldm.data.slides`.

    The label is the first folder below the root, the group is the slide.

    Args:
        tiling: Which tiles a slide has; None if an index knows.
    """

    kind = "slides"
    holds_images = False

    def __init__(self, tiling: Tiling | None = None):
        self.tiling = tiling

    def holds_tiles(self, name: str) -> bool:
        return not is_junk(name) and name.lower().endswith(EXTENSIONS)

    def places(self, root: Path, file: str) -> list[Place]:
        if self.tiling is None:
            raise UserError(
                f"{root}: slides need an index, which says what is tissue; make it with"
                f" scripts/index_corpus.py {root} --layout slides"
            )
        names = chosen_tiles(root / file, self.tiling)
        size = 3 * self.tiling.pixels**2
        return [Place(f"{file}/{name}", file, 0, size, top_folder(file)) for name in names]

    def content(self, root: Path, place: Place) -> np.ndarray:
        return read_window(root / place.file, place.path)

    def decode(self, root: Path, place: Place, content: Any) -> np.ndarray:
        return content


LAYOUTS = {
    "folder": Layout(),
    "array": ArrayLayout(),
    "shards": ShardLayout(),
    "slides": SlideLayout(),
}


def layout_of(root: Path) -> str:
    """The layout of tiles at `root`, where none is given: arrays if it is a file of these."""
    return "array" if is_array(root) else "folder"


def path_order(path: str) -> list[str]:
    """Sorting key of a name below a root: folder by folder, as paths are sorted."""
    return path.split("/")


def find_files(root: Path, layout: Layout) -> tuple[list[str], dict[str, int]]:
    """The files below `root` that hold tiles, sorted, and the time of change of every folder."""
    if layout_of(root) == "array" and layout is LAYOUTS["array"]:
        return ["."], {}
    if not root.is_dir():
        reason = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"corpus {root} {reason}; check the path")
    files: list[str] = []
    folders: dict[str, int] = {}
    for folder in walk(root, layout.holds_tiles):
        relative = folder.path.relative_to(root).as_posix()
        folders[relative] = folder.modified
        files += [name if relative == "." else f"{relative}/{name}" for name in folder.files]
    if not files:
        raise UserError(f"corpus {root} has no {layout.kind}; check the path and the layout")
    return sorted(files, key=path_order), folders


def read_content(root: Path, layout: Layout, place: Place) -> Any:
    """The content of a tile; UserError where it cannot be read."""
    try:
        return layout.content(root, place)
    except OSError as error:
        raise UserError(
            f"{root / place.file}: {error.strerror}; restore the file or index the corpus again"
        ) from error


def read_place(root: Path, layout: Layout, place: Place) -> np.ndarray:
    """One tile, uint8 (H, W, 3); UserError where it cannot be read or decoded."""
    return layout.decode(root, place, read_content(root, layout, place))


@lru_cache(OPEN_FILES)
def _open_shard(path: str) -> IO[bytes]:
    """An open file, which any thread can read with `os.pread`, also after a fork."""
    return open(path, "rb", buffering=0)
