"""Tar shards of tiles in the layout of WebDataset (key.png, key.cls), from an indexed corpus.

Millions of small files wear out a cluster's file system; a few thousand tar files do not, and
`ldm.data.storage.ShardLayout` reads any tile in them directly. Which tile goes into which shard
follows from the index and the size alone, and a shard appears completely or not at all: an
interrupted run goes on with the shards that are missing.
"""

import io
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ldm.data.images import WHITE, declared_white, map_ahead
from ldm.data.index import COLUMNS, COMMAND, CorpusIndex, content_hash, index_table, place_of
from ldm.data.storage import (
    BLOCK,
    LAYOUTS,
    Layout,
    Place,
    path_order,
    read_content,
    read_place,
    top_folder,
)
from ldm.errors import UserError
from ldm.files import atomic_file, digest_of_text, remove_leftovers, require_space, write_text
from ldm.progress import Bar
from ldm.run import MadeFolder

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

NAME = "shard-{:06d}.tar"
RECORD = "shards.json"
VERSION = 1
AHEAD = 8  # tiles per thread that may wait to be written

Row = dict[str, Any]  # of an index, by column


def write_tar(stream: IO[bytes], members: Iterable[tuple[str, bytes]]) -> None:
    """Write members, name and content, as a tar file; the same members give the same bytes."""
    # GNU's format: names of any length, and no extended header in which a writer may put times.
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)  # time 0, owner 0, mode 644
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


class Report(NamedTuple):
    """What a call of `CorpusShards.write` did."""

    written: int  # shards made now
    present: int  # shards that were there
    tiles: int  # in all shards
    bytes: int  # of all shards


class CorpusShards:
    """The tar shards of the tiles of an index; tiles with a problem are left out.

    Image files are stored as they are; rows of arrays and tiles of slides become PNG files of the
    pixels that training would see. Labels are stored in KEY.cls, groups in the index of the shards.

    Args:
        index: Index of the corpus.
        roots: Folders of the corpus, in the order of the index.
        out: Folder of the shards; their index is written beside it, as OUT.parquet.
        size: Most bytes of a shard, unless a single tile is larger.
    """

    def __init__(self, index: CorpusIndex, roots: Sequence[Path], out: Path, size: int):
        index.check(roots)
        if index.path.resolve() == out.with_name(f"{out.name}.parquet").resolve():
            raise UserError(
                f"out={out}: the index of the shards would replace {index.path}; give another"
            )
        self.roots = list(roots)
        self.out = out
        self.layout: Layout = LAYOUTS[index.layout]
        good = index.table.filter(index.table["problem"].is_null())
        self._tiles: pyarrow.Table = good.select(list(COLUMNS))
        columns = (good[name].to_pylist() for name in ("root", "path"))
        self._paths = list(zip(*columns, strict=True))  # number of the root, path below it
        self._re_encodes = not self.layout.holds_images
        self._white = None if self._re_encodes else self._declared_white()
        self._names = self._member_names()
        self._sizes = self._most_bytes()
        self.starts = self._divide(size)  # of each shard, in tiles, and the end
        settings = {"version": VERSION, "size": size, "tiles": len(self._tiles)}
        settings |= {"shards": len(self), "corpus": self._identity(index)}
        settings |= {"white": self._white} if self._white else {}
        self._made = MadeFolder(out, settings, RECORD, key=None)
        self._made.exists()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def index_path(self) -> Path:
        return self.out.with_name(f"{self.out.name}.parquet")

    def path(self, number: int) -> Path:
        return self.out / NAME.format(number)

    def _identity(self, index: CorpusIndex) -> str:
        """SHA-256 over the tiles with their labels, wherever these are stored."""
        columns = (self._tiles[n].to_pylist() for n in ("root", "path", "label", "group", "hash"))
        parts = (f"{part}\0" for column in columns for part in column)
        return digest_of_text(chain([index.layout], parts))

    def _declared_white(self) -> float | None:
        """The value of white of the tiles that are not 8-bit, to be declared for the shards too."""
        folders = {(self.roots[root] / path).parent for root, path in self._paths}
        found = sorted({declared_white(folder) for folder in folders} - {None})
        if len(found) > 1:
            raise UserError(
                f"{self.roots[0]}: {WHITE} files say {found}; shards have one value of white, so"
                " index and pack these tiles apart"
            )
        return found[0] if found else None

    def _member_names(self) -> list[str]:
        """Names in the shards: those below the roots, with one dot, since the first ends the key
        in WebDataset's eyes."""
        taken, names = set(), []
        for root, path in self._paths:
            folder, _, base = path.rpartition("/")
            stem, extension = (base, ".png") if self._re_encodes else os.path.splitext(base)
            parts = (str(root) if len(self.roots) > 1 else "", folder, stem.replace(".", "_"))
            key = plain = "/".join(filter(None, parts))
            number = 1
            while key in taken:  # a.b.png beside a_b.png, or a.png beside a.jpg
                number += 1
                key = f"{plain}_{number}"
            taken.add(key)
            names.append(f"{key}{extension.lower()}")
        return names

    def _most_bytes(self) -> np.ndarray:
        """Bytes that each tile takes in a shard, at most, int64."""
        sizes = self._tiles["size"].to_numpy()
        if self._re_encodes:  # as PNG; hardly more than the pixels
            shape = (self._tiles[name].to_numpy() for name in ("width", "height"))
            width, height = (pixels.astype(np.int64) for pixels in shape)
            sizes = 3 * width * height + height + 1024
        headers = np.array([_headers(name) for name in self._names], np.int64)
        labelled = self._tiles["label"].is_valid().to_numpy()
        return headers + -(-sizes // BLOCK) * BLOCK + labelled * (headers + BLOCK)

    def _divide(self, size: int) -> list[int]:
        starts, used = [0], 0
        for i, needed in enumerate(self._sizes.tolist()):
            if used and _tar_size(used + needed) > size:
                starts.append(i)
                used = 0
            used += needed
        return [*starts, len(self._sizes)]

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Most bytes that these shards take on the disk."""
        sums = np.concatenate([[0], np.cumsum(self._sizes)])
        return sum(_tar_size(int(sums[self.starts[n + 1]] - sums[self.starts[n]])) for n in numbers)

    def write(self, workers: int, verify: bool = False) -> Report:
        """Write the shards that are missing or damaged, then their index.

        Args:
            workers: Number of threads that read.
            verify: Read all of the shards that are there, not only their lists of members.

        Raises:
            UserError: A tile is not what was indexed, or the disk is full.
        """
        tables = {}
        for number in range(len(self)):
            if self.path(number).exists():
                rows = self._rows_of(number, verify)
                if rows is None:
                    log.warning("%s is damaged; it is written again", self.path(number))
                else:
                    tables[number] = rows
        todo = [number for number in range(len(self)) if number not in tables]
        require_space(self.out, self.bytes_of(todo), "out: tar shards")
        self._made.begin()
        remove_leftovers(self.index_path)
        if self._white:
            write_text(self.out / WHITE, f"{self._white:g}\n")
        total = self.starts[-1]
        done = sum(len(rows) for rows in tables.values())
        with Bar(total=total, initial=done, unit="tile") as bar:
            for number in todo:
                with atomic_file(self.path(number)) as stream:
                    write_tar(stream, self._members(number, workers, bar))
                tables[number] = self._rows_of(number, verify=False)
        self._write_index(tables)
        size = sum(self.path(number).stat().st_size for number in range(len(self)))
        return Report(len(todo), len(self) - len(todo), total, size)

    def _part(self, number: int) -> list[tuple[Row, str]]:
        """The tiles that a shard holds: row of the corpus's index, name of the member."""
        part = slice(*self.starts[number : number + 2])
        return list(zip(self._tiles[part].to_pylist(), self._names[part], strict=True))

    def _read(self, row: Row) -> bytes:
        """The bytes to store of a tile."""
        root, place = self.roots[row["root"]], place_of(row)
        content = read_content(root, self.layout, place)
        if content_hash(content) != row["hash"]:
            raise UserError(
                f"{root / place.path} is not what was indexed; run {COMMAND} again, then this "
                "command with another folder out"
            )
        if not self._re_encodes:
            return content
        stream = io.BytesIO()
        Image.fromarray(self.layout.decode(root, place, content)).save(stream, "PNG")
        return stream.getvalue()

    def _members(self, number: int, workers: int, bar: Bar) -> Iterator[tuple[str, bytes]]:
        """Name and content of everything in a shard."""
        part = self._part(number)
        contents = map_ahead(self._read, (row for row, _ in part), workers, AHEAD)
        for (row, name), content in zip(part, contents, strict=True):
            yield name, content
            if row["label"] is not None:
                yield f"{os.path.splitext(name)[0]}.cls", row["label"].encode()
            bar.update()

    def _rows_of(self, number: int, verify: bool) -> "pyarrow.Table | None":
        """The index's rows of a shard that is there; None when it is not what it should be."""
        name, part, rows = NAME.format(number), self._part(number), []
        try:
            places = LAYOUTS["shards"].places(self.out, name)
        except UserError:
            return None
        if len(places) != len(part):
            return None
        with self.path(number).open("rb") as stream:
            state = os.fstat(stream.fileno())
            common = {"root": 0, "file_size": state.st_size, "modified": state.st_mtime_ns}
            for place, (row, member) in zip(places, part, strict=True):
                label = top_folder(member) if row["label"] is None else row["label"]
                same = (place.path, place.label) == (f"{name}/{member}", label)
                if not same or not (self._re_encodes or place.size == row["size"]):
                    return None
                new = place._asdict() | {"label": row["label"], "reason": None}
                if self._re_encodes or verify:
                    stream.seek(place.offset)
                    content = stream.read(place.size)
                    new["hash"] = content_hash(content)
                    if verify and not self._agrees(place, content, row):
                        return None
                rows.append(row | common | new)
        rows.sort(key=lambda row: path_order(row["path"]))
        return index_table(rows)  # not a list, since there may be millions of rows

    def _agrees(self, place: Place, content: bytes, row: Row) -> bool:
        """Whether the bytes in a shard are those of the tile."""
        if not self._re_encodes:
            return content_hash(content) == row["hash"]
        try:
            pixels = LAYOUTS["shards"].decode(self.out, place, content)
        except UserError:
            return False
        origin = read_place(self.roots[row["root"]], self.layout, place_of(row))
        return np.array_equal(pixels, origin)

    def _write_index(self, parts: "dict[int, pyarrow.Table]") -> None:
        import pyarrow as pa

        # Shards are numbered in the order of their names, so the table is sorted by path, too.
        table = pa.concat_tables([parts[number] for number in range(len(self))])
        folders = [{".": os.stat(self.out).st_mtime_ns}]
        scanned = [str(self.out.resolve())]
        CorpusIndex(self.index_path, "shards", scanned, folders, table).write()


def _tar_size(size: int) -> int:
    """Bytes of a tar file whose members take so many: two empty blocks, then up to a record."""
    return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _headers(name: str) -> int:
    """Bytes of a member's headers; GNU's format puts a long name into blocks of its own."""
    length = len(name.encode())
    return BLOCK if length <= 100 else 2 * BLOCK + -(-(length + 1) // BLOCK) * BLOCK
