"""A folder of sampled images: class folders, manifest, and a journal from which it is made.

    OUT/CLASS/000000.png      images
    OUT/settings.json         what decides them; another run must agree with it
    OUT/manifest.csv          one row per image; manifest.parquet is the same with types
    OUT/guidance.csv          what guidance did, by time step
    OUT/grid.png, README.md   the first images of each class; the data set's card
    OUT/.stages/CLASS/T.png   what the model expected of its first image at time step T
    OUT/shard-000000.tar      images in the layout of WebDataset: key.png, key.cls, key.json
    OUT/.parts/               the journal: a file per start and process, a line per finished batch

Every file appears completely or not at all, and an image before the line that lists it. So at
whatever moment a run is killed, the next one finds what is finished and makes the rest. Journals
are never rewritten: everything but the images can be made from them at any time.
"""

import csv
import io
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, TypeAdapter

from ldm.data.shards import NAME, write_tar
from ldm.data.tiles import read_tile, resize_tile
from ldm.errors import UserError
from ldm.files import Journal, read_journal, remove_leftovers, write_bytes, write_png
from ldm.run import MadeFolder
from ldm.synthesis.card import make_card
from ldm.synthesis.guidance_log import GuidanceLog
from ldm.synthesis.settings import UNCONDITIONAL

SETTINGS = "settings.json"
GRID_COLUMNS = 8
GRID_ROWS = 8  # of a grid without classes
JOURNAL, STAGES = ".parts", ".stages"

_COLUMNS = """class index file seed sampler steps eta scale interval_low interval_high
    guidance_on normalise clip temperature cfg_scale autoguidance_scale limit strength
    source_detail diffusion_sha256 classifier_sha256 autoguidance_sha256 first_stage_sha256
    start_from_sha256 prob entropy source made seconds"""
COLUMNS = tuple(_COLUMNS.split())  # of the manifest
_FLOATS = """eta scale clip temperature cfg_scale autoguidance_scale limit strength
    source_detail prob entropy seconds"""
TYPES = {  # of Arrow; columns that are not named hold texts
    **dict.fromkeys(_FLOATS.split(), "float64"),
    **dict.fromkeys(("index", "steps", "interval_low", "interval_high"), "int32"),
    **{"seed": "int64", "normalise": "bool"},
}
# Columns that manifests of earlier versions lack.
LATER = {"limit", "strength", "source_detail", "start_from_sha256", "source"}
DECIMALS = {"prob": 6, "entropy": 6, "seconds": 3}
VOLATILE = ("made", "seconds")  # what two runs of the same command differ in

Row = dict[str, Any]


class _Image(BaseModel):
    name: str = Field(alias="class")
    index: NonNegativeInt
    file: str
    prob: FiniteFloat | None
    entropy: FiniteFloat | None
    source: str | None = None  # journals of earlier versions know of none
    made: str
    seconds: FiniteFloat | None


# Columns of a row of the journal; the others are the same for all images, from the settings.
OF_IMAGE = tuple(one.alias or name for name, one in _Image.model_fields.items())
OF_FOLDER = tuple(name for name in COLUMNS if name not in OF_IMAGE)


class _Run(BaseModel):
    command: list[str]
    started: str
    processes: int
    device: str
    revision: str | None
    versions: dict[str, str]


class _Start(BaseModel):
    run: _Run


class _Batch(BaseModel):
    rows: list[_Image]
    guidance: list[tuple[float, float | None, float | None, float | None, int]]


LINE = TypeAdapter(_Start | _Batch)  # of a journal


class SampleFolder:
    """The folder OUT that this module describes.

    Args:
        root: Path of OUT.
        settings: What decides the images, see `ldm.synthesis.settings.make_settings`; compared with
            those in an existing OUT.
        facts: Facts about each model, by role, for the card.

    Attributes:
        rows: The finished images by (class, index).

    Raises:
        UserError: OUT holds images made with other settings, or files of something else.
    """

    def __init__(self, root: Path, settings: dict[str, Any], facts: dict[str, Any] | None = None):
        self.root = root
        self.settings = json.loads(json.dumps(settings))  # as it will be read back
        self.facts = facts or {}
        self.rows: dict[tuple[str, int], Row] = {}
        self.runs: list[dict[str, Any]] = []
        self.guidance_log = GuidanceLog()
        self.made = MadeFolder(root, self.settings, SETTINGS, key="images", name="outdir")
        if self.made.exists():
            self.read()

    # What is there

    def read(self) -> None:
        """Read the manifest and all journals; a row counts if its image is there."""
        self.rows, self.runs, self.guidance_log = {}, [], GuidanceLog()
        self._read_manifest()
        for path in sorted((self.root / JOURNAL).glob("*.jsonl")):
            read_journal(path, self._take)

    def _read_manifest(self) -> None:
        path = self.root / "manifest.csv"
        if not path.exists():
            return
        try:
            with path.open(newline="") as stream:
                reader = csv.DictReader(stream, strict=True)
                columns = tuple(reader.fieldnames or ())
                known = tuple(key for key in COLUMNS if key in columns or key not in LATER)
                if columns != known:
                    raise UserError(f"{path}: columns {reader.fieldnames} are not {list(COLUMNS)}")
                for cells in reader:
                    row: Row = {key: cells.get(key) or None for key in OF_IMAGE}
                    row["index"] = int(row["index"])
                    for key in DECIMALS:
                        row[key] = None if row[key] is None else float(row[key])
                    self._add([row])
        except (ValueError, TypeError, AttributeError, csv.Error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is damaged ({error}); remove it: it is made again of the journals in"
                f" {self.root / JOURNAL}, and images that they do not list are made again"
            ) from None

    def _take(self, entry: dict[str, Any]) -> None:
        """Count what a line of a journal says; ValueError, and nothing counts, if it is damaged."""
        LINE.validate_python(entry)
        if "run" in entry:
            self.runs.append(entry["run"])
            return
        self._add(entry["rows"])
        self.guidance_log.merge(entry["guidance"])

    def _add(self, rows: Sequence[Row]) -> None:
        """Count images as finished that are there; ValueError for a row that none can have."""
        for row in rows:
            name, index = row["class"], row["index"]
            if name not in (self.settings.get("classes") or [UNCONDITIONAL]):
                raise ValueError(f"{name!r} is no class of {SETTINGS}")
            if row["file"] != image_file(name, index):
                raise ValueError(f"{row['file']!r} is not the file of image {index} of {name}")
            datetime.fromisoformat(row["made"].replace("Z", "+00:00"))
        for row in rows:
            if (self.root / row["file"]).is_file():
                # Journals of earlier versions know of no source.
                self.rows[row["class"], row["index"]] = {"source": None} | row

    # Writing

    def start(self, alone: bool = True) -> None:
        """Write settings.json, before the first image, and remove what a killed run left.

        Args:
            alone: False leaves unfinished files there: other runs may be writing them.
        """
        self.made.begin({"models": self.facts}, alone)
        if alone:
            self._remove_partial()

    def _remove_partial(self) -> None:
        for folder in (self.root, *(path for path in self.root.iterdir() if path.is_dir())):
            remove_leftovers(folder)

    def journal(self, stamp: str, rank: int, run: dict[str, Any] | None) -> "Journal":
        """A new journal of this start and process; `run` describes the start, once for all."""
        journal = Journal(self.root / JOURNAL / f"{stamp}-{rank:04d}.jsonl")
        if run is not None:
            journal.add({"run": run})
        return journal

    def write_image(self, name: str, index: int, image: np.ndarray) -> str:
        """Write one image, uint8 (H, W, 3), at the size of the settings; returns its file."""
        file = image_file(name, index)
        (self.root / name).mkdir(exist_ok=True)
        size = self.settings.get("out_size")
        write_png(self.root / file, image if size is None else resize_tile(image, size))
        return file

    def write_stage(self, name: str, t: float, image: np.ndarray) -> None:
        """Write what the model expects of the first image of a class at time step t."""
        write_png(self.root / STAGES / name / f"{t:g}.png", image)

    def write_manifest(self) -> None:
        """manifest.csv and manifest.parquet, from `rows`."""
        low, high = self.settings.get("interval") or (None, None)
        known = self.settings | {"interval_low": low, "interval_high": high}
        constant = {key: known.get(key) for key in OF_FOLDER}
        rows = [constant | self.rows[key] for key in sorted(self.rows)]
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            digits = {k: f"{row[k]:.{n}f}" for k, n in DECIMALS.items() if row[k] is not None}
            writer.writerow((row | digits)[key] for key in COLUMNS)  # None is an empty cell
        write_if_changed(self.root / "manifest.csv", stream.getvalue().encode())
        write_if_changed(self.root / "manifest.parquet", _parquet(rows))

    def finish(self) -> None:
        """Write all files that are made from the journals, except those that would not change."""
        self._remove_partial()
        self.write_manifest()
        if self.guidance_log.sums:
            write_if_changed(self.root / "guidance.csv", self.guidance_log.table().encode())
        write_if_changed(self.root / "grid.png", self._grid())
        card = make_card(self.settings, self.facts, self.runs, list(self.rows.values()))
        write_if_changed(self.root / "README.md", card.encode())

    def _grid(self) -> bytes:
        """The first images, a row per class; one class alone fills several rows."""
        files: dict[str, list[Path]] = {}
        for name, index in sorted(self.rows, key=self._order):
            files.setdefault(name, []).append(self.root / self.rows[name, index]["file"])
        rows = [paths[:GRID_COLUMNS] for paths in files.values()]
        if len(files) == 1:
            (paths,) = files.values()
            starts = range(0, min(len(paths), GRID_ROWS * GRID_COLUMNS), GRID_COLUMNS)
            rows = [paths[start : start + GRID_COLUMNS] for start in starts]
        columns = max(len(paths) for paths in rows)
        height, width, _ = read_tile(rows[0][0]).shape
        # Each tile with two white pixels below and to the right, which the last ones lose.
        grid = np.full((len(rows), height + 2, columns, width + 2, 3), 255, dtype=np.uint8)
        for i, paths in enumerate(rows):
            for j, path in enumerate(paths):
                grid[i, :height, j, :width] = read_tile(path)
        grid = grid.reshape(len(rows) * (height + 2), columns * (width + 2), 3)[:-2, :-2]
        stream = io.BytesIO()
        Image.fromarray(grid).save(stream, "PNG")
        return stream.getvalue()

    def _order(self, key: tuple[str, int]) -> tuple[int, int]:
        """Classes in label order."""
        name, index = key
        return (self.settings.get("classes") or [name]).index(name), index


def image_file(name: str, index: int) -> str:
    """Where an image lies in its folder."""
    return f"{name}/{index:06d}.png"


def image_row(name: str, index: int, **facts: Any) -> Row:
    """A row of the journal for an image that was just written.

    Args:
        facts: Of `OF_IMAGE` file, prob, entropy, seconds, and source, which is the real tile that
            it started from, relative to `start_from`.
    """
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    row = {"class": name, "index": index, **facts, "made": made}
    # As the manifest will say it, so that both ways to read a row give the same.
    digits = {key: row[key] for key in DECIMALS if row[key] is not None}
    return row | {key: round(value, DECIMALS[key]) for key, value in digits.items()}


def write_if_changed(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it has this content already."""
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)


def _parquet(rows: Sequence[Row]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {key: pa.type_for_alias(TYPES.get(key, "string")) for key in COLUMNS}
    types["made"] = pa.timestamp("ms", tz="UTC")  # Parquet has no seconds
    made = [datetime.fromisoformat(row["made"].replace("Z", "+00:00")) for row in rows]
    columns = {key: [row[key] for row in rows] for key in COLUMNS} | {"made": made}
    schema = pa.schema(list(types.items()))
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), stream)
    return stream.getvalue()


def write_shards(folder: SampleFolder, size: int) -> list[Path]:
    """Pack the images into OUT/shard-000000.tar, ...; the same images give the same bytes.

    They lie beside the class folders: a folder of them would count as a class.

    The classes alternate, so each shard holds all of them as evenly as the counts allow.

    Args:
        size: Images per shard. One shard is held in memory.

    Returns:
        The shards. Others, of an earlier division, are removed.
    """
    keys = sorted(folder.rows, key=lambda key: (key[1], key[0]))
    shards = []
    for start in range(0, len(keys), size):
        path, stream = folder.root / NAME.format(len(shards)), io.BytesIO()
        members = (_members(folder, key) for key in keys[start : start + size])
        write_tar(stream, chain.from_iterable(members))
        write_if_changed(path, stream.getvalue())
        shards.append(path)
    for path in folder.root.glob("shard-*.tar"):
        if path not in shards:
            path.unlink()
    return shards


def _members(folder: SampleFolder, key: tuple[str, int]) -> Iterator[tuple[str, bytes]]:
    classes, row = folder.settings["classes"], folder.rows[key]
    stem = row["file"].removesuffix(".png")
    label = -1 if classes is None else classes.index(row["class"])
    about = {name: row[name] for name in OF_IMAGE if name not in VOLATILE}
    yield f"{stem}.png", (folder.root / row["file"]).read_bytes()
    yield f"{stem}.cls", str(label).encode()
    yield f"{stem}.json", json.dumps(about).encode()
