"""How a corpus stores its tiles: a file each, rows of an array, or members of tar shards.

A layout finds the files of a corpus, lists the tiles in one file, and reads one tile by its place
(file, offset, size). Any tile is read directly, in any order, since a resumed run, several ranks
and a weighted pass all depend on that. The readers of the webdataset library run through a shard
from its start, so they are not used for this. Keys and extensions of members are split by that
library's rule, shards that it writes are read here, and a test compares what both of them see.
"""

import io
import os
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm.data.images import decode_tile, float_to_uint8, is_image, walk, white_of
from ldm.errors import UserError
from ldm.files import require_class_names

OPEN_FILES = 64  # shards or arrays that a process keeps open
BLOCK = 512  # bytes, of which a tar file is made
ARRAY_NAME, TYPES_NAME = "images.npy", "types.npy"  # of PanNuke


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

    def holds_tiles(self, name: str) -> bool:
        """Whether a file of this name holds tiles."""
        return is_image(name)

    def places(self, root: Path, file: str) -> list[Place]:
        """The tiles in a file.

        Raises:
            UserError, OSError: The file is missing or damaged.
        """
        return [Place(file, file, 0, 0, top_folder(file))]

    def content(self, root: Path, place: Place) -> Any:
        """The stored bytes of a tile, or its row of an array."""
        return (root / place.file).read_bytes()

    def decode(self, root: Path, place: Place, content: Any) -> np.ndarray:
        """The pixels that `content` stands for, uint8 (H, W, 3)."""
        return decode_tile(io.BytesIO(content), str(root / place.path))


class ArrayLayout(Layout):
    """PanNuke's arrays: every images.npy below the root, (N, H, W, 3) uint8 or float.

    Arrays are memory-mapped. One of floats is taken to be in [0, 1] when no value in 16 rows spread
    over it exceeds 1, else in [0, 255]. The label of a row is that of types.npy beside it.
    """

    kind = f"arrays {ARRAY_NAME}"

    def holds_tiles(self, name: str) -> bool:
        return name == ARRAY_NAME

    def places(self, root: Path, file: str) -> list[Place]:
        rows = _open_array(str(root / file)).rows
        types = self._types(root / file, len(rows))
        return [
            Place(f"{file}/{i:06d}", file, i, rows[i].nbytes, types[i]) for i in range(len(rows))
        ]

    def _types(self, path: Path, count: int) -> list[str | None]:
        beside = path.with_name(TYPES_NAME)
        if not beside.is_file():
            return [None] * count
        try:
            types = np.load(beside, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise UserError(
                f"{beside}: no array of names (pickled arrays are not read); save it again with a"
                " text dtype, or remove it"
            ) from None
        if types.shape != (count,):
            raise UserError(f"{beside}: shape {types.shape} must be ({count},), a name per tile")
        require_class_names(sorted(set(map(str, types))), str(beside))
        return [str(name) for name in types]

    def content(self, root: Path, place: Place) -> np.ndarray:
        rows = _open_array(str(root / place.file)).rows
        if place.offset >= len(rows):
            raise UserError(f"{root / place.file} has {len(rows)} tiles, not {place.offset + 1}")
        return np.ascontiguousarray(rows[place.offset])

    def decode(self, root: Path, place: Place, content: Any) -> np.ndarray:
        if content.dtype == np.uint8:
            return content
        white = _open_array(str(root / place.file)).white
        return float_to_uint8(content, white, str(root / place.path))


class ShardLayout(Layout):
    """Tar shards in the layout of WebDataset: every uncompressed .tar file below the root.

    The label of KEY.png is the text of KEY.cls beside it, or else the first folder in its name.
    """

    kind = "tar shards"

    def holds_tiles(self, name: str) -> bool:
        return name.lower().endswith(".tar") and not name.startswith(".")

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
                    if member.name.startswith("/") or ".." in member.name.split("/"):
                        raise UserError(f"{path}: member {member.name} leaves the shard; rename it")
                    key, extension = split_member(member.name)
                    if extension == "cls":
                        content = archive.extractfile(member).read()
                        classes[key] = content.decode(errors="replace").strip()
                    elif is_image(member.name.rsplit("/", 1)[-1]):
                        if member.name in found:
                            raise UserError(f"{path}: two members {member.name}; rename one")
                        label = top_folder(member.name.removeprefix("./"))
                        found[member.name] = Place(
                            f"{file}/{member.name}", file, member.offset_data, member.size, label
                        )
            with path.open("rb") as stream:
                stream.seek(end)
                # tarfile takes a file that ends between two members for a complete one.
                complete = stream.read(BLOCK) == bytes(BLOCK)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{path}: not a complete tar file ({error}); write it again") from None
        if not complete:
            raise UserError(f"{path}: not a complete tar file (its end is missing); write it again")
        labels = [classes.get(split_member(name)[0], p.label) for name, p in found.items()]
        require_class_names(sorted(set(labels) - {None}), str(path))
        places = zip(found.values(), labels, strict=True)
        return [place._replace(label=label) for place, label in places]

    def content(self, root: Path, place: Place) -> bytes:
        content = _open_shard(str(root / place.file)).read(place.offset, place.size)
        if len(content) < place.size:
            raise UserError(f"{root / place.path}: the shard is cut short; write it again")
        return content


LAYOUTS = {"folder": Layout(), "array": ArrayLayout(), "shards": ShardLayout()}


def path_order(path: str) -> list[str]:
    """Sorting key of a name below a root: folder by folder, as paths are sorted."""
    return path.split("/")


def find_files(root: Path, layout: Layout) -> tuple[list[str], dict[str, int]]:
    """The files below `root` that hold tiles, sorted, and the time of change of every folder.

    Raises:
        UserError: The folder does not exist, or holds no tiles.
    """
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


def read_place(root: Path, layout: Layout, place: Place) -> np.ndarray:
    """One tile, uint8 (H, W, 3).

    Raises:
        UserError: The tile is missing or damaged.
    """
    try:
        content = layout.content(root, place)
    except OSError as error:
        raise UserError(
            f"{root / place.file}: {error.strerror}; restore the file or index the corpus again"
        ) from error
    return layout.decode(root, place, content)


class _Array:
    """A memory-mapped array of tiles, (N, H, W, 3)."""

    def __init__(self, path: str):
        try:
            self.rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: no complete numpy array ({reason}); write it again") from None
        shape, kind = self.rows.shape, self.rows.dtype
        if len(shape) != 4 or shape[3] != 3 or 0 in shape:
            raise UserError(f"{path}: shape {shape} must be (tiles, height, width, 3)")
        if kind != np.uint8 and kind.kind != "f":
            raise UserError(f"{path}: {kind} values must be uint8 or float; convert them")
        if kind.kind == "f":
            some = np.linspace(0, len(self.rows) - 1, 16).astype(int)
            # fmax looks past rows that are not finite; those are reported when they are read.
            self.white = white_of(np.fmax.reduce([self.rows[i].max() for i in some]))


class _Shard:
    """An open file, read at any place by any thread, also after a fork."""

    def __init__(self, path: str):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0 and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


_open_array = lru_cache(OPEN_FILES)(_Array)
_open_shard = lru_cache(OPEN_FILES)(_Shard)
