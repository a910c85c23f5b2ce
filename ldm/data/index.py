"""The index of a corpus: what one scan found, so that training neither walks nor checks the tree.

A Parquet file with a row per tile. Columns: `root` (number of the root folder), `path` (name below
it), `file`, `offset`, `size` (where it is stored: see `ldm.data.storage.Place`; bytes), `file_size`
and `modified` (of the file, bytes and nanoseconds), `width` and `height` (pixels), `hash` (SHA-256
of the stored bytes), `group` (patient, slide or region), `label` (class name), `problem` and
`reason`. Rows with a problem are kept, so that the index knows every file, but are no tiles.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.data.storage import LAYOUTS, Layout, Place, find_files
from ldm.errors import UserError
from ldm.files import atomic_file, require_class_names

if TYPE_CHECKING:
    import pyarrow

COMMAND = "scripts/index_corpus.py"
VERSION = 1
METADATA = b"corpus_index"
SAMPLED = 64  # tiles per root whose file is looked at before training
COLUMNS = ("root", *Place._fields, "file_size", "modified", "width", "height", "hash", "group")
COLUMNS += ("problem", "reason")
TYPES = {"root": "int16", "width": "int32", "height": "int32"}
TYPES |= dict.fromkeys(("offset", "size", "file_size", "modified"), "int64")


def content_hash(content: Any) -> str:
    """SHA-256 of a tile's stored bytes, or of an array's."""
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class CorpusIndex:
    """The index of a corpus, as one scan found it."""

    path: Path  # of the Parquet file
    layout: str  # of all roots
    # Where the roots were when they were scanned, for a later scan only: whoever reads the index
    # gives the roots, since a corpus may be moved or mounted elsewhere.
    scanned: Sequence[str]
    folders: Sequence[dict[str, int]]  # for each root, times of change of its folders, ns
    table: "pyarrow.Table"  # a row per tile, sorted by root and path
    tiling: dict[str, Any] | None = None  # how slides were cut, see `ldm.data.slides.Tiling`

    @classmethod
    def read(cls, path: str | os.PathLike) -> "CorpusIndex":
        """Read an index."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"index {path} does not exist; make it with {COMMAND}")
        try:
            table = pq.read_table(path)
            record = json.loads((table.schema.metadata or {})[METADATA])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            raise UserError(f"index {path} was not written by {COMMAND}; make it again") from None
        if record.get("version") != VERSION or not set(COLUMNS) <= set(table.column_names):
            raise UserError(f"index {path} is of another version; make it again with {COMMAND}")
        require_class_names(sorted(pc.unique(table["label"].drop_null()).to_pylist()), str(path))
        for name in ("path", "file"):
            leaves = table.filter(pc.match_substring_regex(table[name], r"^/|(^|/)\.\.(/|$)"))
            if len(leaves):
                raise UserError(
                    f"index {path}: {leaves[name][0].as_py()} lies outside of its root; make the"
                    f" index again with {COMMAND}"
                )
        facts = (record[name] for name in ("layout", "scanned", "folders"))
        return cls(path, *facts, table, record.get("tiling"))

    @classmethod
    def of_roots(
        cls, path: str | os.PathLike, roots: Sequence[Path], layout: str | None = None
    ) -> "CorpusIndex":
        """Read the index of these folders and check that it still fits them."""
        index = cls.read(path)
        if layout not in (None, index.layout):
            raise UserError(
                f"index {path} is of layout {index.layout}, not {layout}; correct the layout or"
                " give another index"
            )
        index.check(roots)
        return index

    def write(self) -> None:
        """Write the file atomically."""
        record = {"version": VERSION, "layout": self.layout, "scanned": list(self.scanned)}
        record |= {"folders": list(self.folders), "tiling": self.tiling}
        write_table(self.path, self.table.replace_schema_metadata({METADATA: json.dumps(record)}))

    def rows(self, root: int) -> "pyarrow.Table":
        """Every row of one root, also those with a problem."""
        import pyarrow.compute as pc

        return self.table.filter(pc.equal(self.table["root"], root))

    def tiles(self, root: int) -> dict[str, list]:
        """The tiles of one root without a problem, a list per column, sorted by path."""
        rows = self.rows(root)
        found = rows.filter(rows["problem"].is_null())
        return {name: found[name].to_pylist() for name in (*Place._fields, "group")}

    def check(self, roots: Sequence[Path]) -> None:
        """Check that these folders are still as they were when they were indexed.

        Every folder's time of change is compared, and where one differs, the files; so those that
        were added, removed or renamed are noticed. Of some tiles, spread evenly, the file's size is
        compared and, where its time differs, the stored bytes. A corpus may thus be copied
        elsewhere.
        """
        if len(roots) != len(self.folders):
            raise UserError(
                f"index {self.path} is of {len(self.folders)} roots, not {len(roots)}; give the"
                f" same roots as to {COMMAND}, in the same order"
            )
        layout = LAYOUTS[self.layout]
        for number, (root, folders) in enumerate(zip(roots, self.folders, strict=True)):
            rows = self.rows(number)
            reason = _changed_folders(root, folders, rows, layout)
            if reason := reason or _changed_tiles(root, rows, layout):
                # Shards do not change by themselves: one that did is damaged.
                first = "write the shard again (scripts/write_shards.py), "
                raise UserError(
                    f"index {self.path} does not fit {root}: {reason};"
                    f" {first if self.layout == 'shards' else ''}run {COMMAND} again, or correct"
                    " the root"
                )


def _changed_folders(
    root: Path, known: dict[str, int], rows: "pyarrow.Table", layout: Layout
) -> str | None:
    """What was added to or removed from the folders, in words; None if nothing was."""
    try:
        if {name: os.stat(root / name).st_mtime_ns for name in known} == known:
            return None
        files = set(find_files(root, layout)[0])
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"the folder {error.filename} is gone"
    except UserError as error:
        return str(error)
    indexed = set(rows["file"].to_pylist())
    for what, names in (("are gone", indexed - files), ("were added", files - indexed)):
        if names:
            return f"{len(names)} files {what}, such as {root / min(names)}"
    return None


def _changed_tiles(root: Path, rows: "pyarrow.Table", layout: Layout) -> str | None:
    """Which of some tiles is not what it was, in words; None if all are."""
    rows = rows.filter(rows["problem"].is_null())
    if not len(rows):
        return None
    count = min(SAMPLED, len(rows))
    sample = sorted({i * (len(rows) - 1) // max(count - 1, 1) for i in range(count)})
    for row in rows.take(sample).to_pylist():
        file = root / row["file"]
        try:
            found = layout.state(root, row["file"])
        except (FileNotFoundError, NotADirectoryError):
            return f"{file} is gone"
        if found.st_size != row["file_size"]:
            return f"{file} has {found.st_size} bytes instead of {row['file_size']}"
        if found.st_mtime_ns != row["modified"]:
            place = place_of(row)
            if content_hash(layout.content(root, place)) != row["hash"]:
                return f"{root / place.path} has another content"
    return None


def place_of(row: dict[str, Any]) -> Place:
    """Where the tile of a row is stored."""
    return Place(*(row[name] for name in Place._fields))


def index_table(rows: Sequence[dict[str, Any]]) -> "pyarrow.Table":
    """The table of rows with all `COLUMNS`; they must be sorted by root and path."""
    return make_table({name: [row[name] for row in rows] for name in COLUMNS}, TYPES)


def make_table(columns: Mapping[str, Sequence], types: Mapping[str, str]) -> "pyarrow.Table":
    """A table of these columns; one whose type is not given holds texts."""
    import pyarrow as pa

    arrays = [pa.array(values, types.get(name, "string")) for name, values in columns.items()]
    return pa.table(arrays, names=list(columns))


def write_table(path: Path, table: "pyarrow.Table") -> None:
    """Write a Parquet file atomically."""
    import pyarrow.parquet as pq

    with atomic_file(path) as stream:
        pq.write_table(table, stream, compression="zstd")
