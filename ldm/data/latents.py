"""Cached latents: the posteriors of tiles, encoded once, as training sets.

Letters: N tiles, V views of a tile, C channels, h w latent size.

A cache is a folder that scripts/cache_latents.py writes:

    manifest.json          what it was made of and with, see `LatentCache`
    SPLIT.parquet          a row per tile: name, path, label, group, corpus
    SPLIT/000000.safetensors ...   of `shard_tiles` tiles each, in the order of the table:
        moments  (n, V, 2C, h, w) float16 or float32: mean and log-variance of the posterior
        sums     (n, V, 2) float64: sum of the mean, and of mean^2 + variance, before rounding
        crc      (n, V) uint32: CRC-32 of the stored moments

SPLIT is `train`, or `validation` where there is one. View 0 is the tile without augmentation.
"""

import json
import math
import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.corpora import Corpus
from ldm.errors import UserError

COMMAND = "scripts/cache_latents.py"
MANIFEST = "manifest.json"
VERSION = 1
DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
STORED = {"F16": DTYPES["float16"], "F32": DTYPES["float32"]}
STORED |= {"F64": np.dtype("<f8"), "U32": np.dtype("<u4")}
AGAIN = f"delete it and run {COMMAND} again as before, which makes what is missing"


@dataclass(frozen=True)
class Shards:
    """Where the latents of a split lie.

    Attributes:
        folder: Of the shards.
        tiles: N.
        views: V.
        moments: (2C, h, w).
        dtype: "float16" or "float32".
        shard_tiles: Tiles per shard; the last one may have fewer.
    """

    folder: Path
    tiles: int
    views: int
    moments: tuple[int, int, int]
    dtype: str
    shard_tiles: int

    def __len__(self) -> int:
        return math.ceil(self.tiles / self.shard_tiles)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def range(self, number: int) -> range:
        """The tiles of a shard."""
        first = number * self.shard_tiles
        return range(first, min(first + self.shard_tiles, self.tiles))

    def bytes_of(self, tiles: int) -> int:
        """Disk use of so many tiles, without the headers of the shards (some 300 bytes each)."""
        stored = math.prod(self.moments) * DTYPES[self.dtype].itemsize
        return tiles * self.views * (stored + 2 * 8 + 4)

    def open(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, mapped into memory.

        Raises:
            UserError: It is missing, cut short or of another shape.
        """
        path = self.path(number)
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                if size <= 8:
                    raise ValueError
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run {COMMAND} again as before") from None
        except ValueError:
            raise UserError(f"{path} is damaged ({size} bytes); {AGAIN}") from None
        n = len(self.range(number))
        wanted = {
            "moments": (DTYPES[self.dtype], (n, self.views, *self.moments)),
            "sums": (STORED["F64"], (n, self.views, 2)),
            "crc": (STORED["U32"], (n, self.views)),
        }
        try:
            # safetensors: length of the header, header (JSON), arrays at their offsets.
            start = 8 + int.from_bytes(mapped[:8], "little")
            header = json.loads(mapped[8:start])
            arrays = {}
            for name, (dtype, shape) in wanted.items():
                entry = header[name]
                if STORED[entry["dtype"]] != dtype or tuple(entry["shape"]) != shape:
                    raise ValueError(f"its {name} are {entry['dtype']} {entry['shape']}")
                first = start + entry["data_offsets"][0]
                flat = np.frombuffer(mapped, dtype, math.prod(shape), first)
                arrays[name] = flat.reshape(shape)
        except (ValueError, LookupError, TypeError) as error:
            reason = str(error) if str(error).startswith("its ") else f"{size} bytes"
            raise UserError(f"{path} is damaged ({reason}); {AGAIN}") from None
        return arrays


class LatentTiles(Dataset):
    """Cached tiles as a training set, in place of `ldm.data.tiles.Tiles`.

    An item is `dict(moments=(2C, h, w) float32, label=int, path=str)`: mean and log-variance of the
    posterior, stacked (`ldm.modules.autoencoder.DiagonalGaussian` takes them), so training draws
    z_0 anew each time. `tiles[index, seed]` is a view that the seed chooses, `tiles[index]` one
    that is drawn from torch.

    Attributes:
        classes, relative_paths, labels, groups: As for `ldm.data.tiles.Tiles`.
        paths: Where the tiles were stored.

    Args:
        shards: Of the split.
        table: Columns of the split's Parquet file.
        classes: Class names in label order.
        corpora: (name, weight) of the corpora it was made of; None for a plain set.

    Raises:
        UserError: A shard is missing or damaged.
    """

    def __init__(
        self,
        shards: Shards,
        table: dict[str, list],
        classes: Sequence[str] = (),
        corpora: Sequence[tuple[str, float]] | None = None,
    ):
        self.shards = shards
        self.classes = list(classes)
        self.relative_paths: list[str] = table["name"]
        self.paths: list[str] = table["path"]
        self.labels: list[int] = table["label"]
        self.groups: list[str] | None = table["group"] if None not in table["group"] else None
        self._corpora = None
        if corpora is not None:
            numbers = np.array(table["corpus"])
            self._corpora = [
                (Corpus(name, [], "folder", weight, None), np.flatnonzero(numbers == number))
                for number, (name, weight) in enumerate(corpora)
            ]
        self._open: dict[int, dict[str, np.ndarray]] = {}
        for number in range(len(shards)):
            shards.open(number)

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps the files itself

    def _shard(self, index: int) -> tuple[dict[str, np.ndarray], int]:
        """The arrays of the shard that holds a tile, and the tile's place in it."""
        number, place = divmod(index, self.shards.shard_tiles)
        if number not in self._open:
            self._open[number] = self.shards.open(number)
        return self._open[number], place

    def moments(self, index: int, view: int = 0) -> np.ndarray:
        """The stored moments of a view, (2C, h, w).

        Raises:
            UserError: They are not what was written.
        """
        shard, place = self._shard(index)
        stored = shard["moments"][place, view]
        if zlib.crc32(stored) != shard["crc"][place, view]:
            path = self.shards.path(index // self.shards.shard_tiles)
            raise UserError(
                f"{path} is damaged (checksum of {self.relative_paths[index]}); {AGAIN}"
            )
        return stored

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        view = 0
        if self.shards.views > 1:
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            view = seed % self.shards.views
        moments = torch.from_numpy(self.moments(index, view).astype(np.float32))
        return {"moments": moments, "label": self.labels[index], "path": self.paths[index]}

    def latent_sums(self, indices: Sequence[int]) -> Tensor:
        """See `ldm.models.diffusion.latent_sums`: (3,) float64, of view 0."""
        count = len(indices) * math.prod(self.shards.moments) / 2  # half are means
        sums = np.zeros(2)
        for index in indices:
            shard, place = self._shard(index)
            sums += shard["sums"][place, 0]
        return torch.tensor([count, *sums], dtype=torch.float64)

    def pass_length(self) -> int:
        """How many tiles a pass draws."""
        if self._corpora is None:
            return len(self)
        return sum(corpus.pass_length(len(members)) for corpus, members in self._corpora)

    def drawn(self, seed: int, epoch: int) -> np.ndarray:
        """As `ldm.data.tiles.Tiles.drawn`: by the weights of the corpora."""
        if self._corpora is None:
            return np.arange(len(self))
        parts = [
            members[corpus.drawn(len(members), seed, epoch)]
            for corpus, members in self._corpora
            if len(members)
        ]
        return np.concatenate(parts)


@dataclass(frozen=True)
class LatentCache:
    """A finished cache.

    Attributes:
        root: Its folder.
        settings: What decides the latents: `autoencoder` (fingerprint), `latent` (C, h, w), `dtype`
            `precision`, `views`, `seed`, `shard_tiles`, `classes`, `corpora` and `splits`.
        statistics: `scale_factor` = 1 / std over `tiles` tiles, and what it was computed from.
        train, validation: The tiles.
    """

    root: Path
    settings: dict[str, Any]
    statistics: dict[str, Any]
    train: LatentTiles
    validation: LatentTiles | None

    @classmethod
    def read(cls, root: str | os.PathLike, what: str = "latents") -> "LatentCache":
        """Open a cache.

        Args:
            what: How messages call it, for example `--latents`.

        Raises:
            UserError: There is none, it is unfinished or of another version, or a file is damaged.
        """
        root = Path(root).expanduser()
        manifest = read_manifest(root, what)
        if manifest is None:
            raise UserError(f"{what}: {root} holds no {MANIFEST}; make a cache with {COMMAND}")
        if not manifest["complete"]:
            raise UserError(
                f"{what}: {root} is unfinished; run {COMMAND} again as before, it goes on"
            )
        settings = manifest["settings"]
        splits: dict[str, LatentTiles] = {}
        for name, split in settings["splits"].items():
            shards = shards_of(root, settings, name)
            table = _read_table(root / f"{name}.parquet", split["tiles"])
            corpora = settings["corpora"] if name == "train" else None
            splits[name] = LatentTiles(shards, table, settings["classes"], corpora)
        return cls(
            root, settings, manifest["statistics"], splits["train"], splits.get("validation")
        )

    def require(self, fingerprint: str, what: str = "latents") -> None:
        """See that the latents are of the autoencoder with this fingerprint.

        Raises:
            UserError: They are of another one.
        """
        own = self.settings["autoencoder"]
        if own != fingerprint:
            raise UserError(
                f"{what}: {self.root} was made by another autoencoder ({own[:12]}) than the model's"
                f" ({fingerprint[:12]}); give that one to {COMMAND}, or train on its latents"
            )


def shards_of(root: Path, settings: dict[str, Any], split: str) -> Shards:
    """The shards of a split in the cache `root`."""
    channels, height, width = settings["latent"]
    return Shards(
        folder=root / split,
        tiles=settings["splits"][split]["tiles"],
        views=settings["splits"][split]["views"],
        moments=(2 * channels, height, width),
        dtype=settings["dtype"],
        shard_tiles=settings["splits"][split]["shard_tiles"],
    )


def read_manifest(root: Path, what: str) -> dict[str, Any] | None:
    """The manifest of a cache; None without one.

    Raises:
        UserError: It cannot be read, or is of another version.
    """
    path = root / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError):
        raise UserError(
            f"{what}: {path} is damaged; delete {root} and run {COMMAND} again"
        ) from None
    if version != VERSION:
        raise UserError(f"{what}: {path} is of version {version}; make the cache again")
    return manifest


def _read_table(path: Path, tiles: int) -> dict[str, list]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A file object: of a path, pyarrow would take folder names as columns.
        with open(path, "rb") as stream:
            table = pq.read_table(stream).to_pydict()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; run {COMMAND} again as before") from None
    except pa.ArrowException:
        raise UserError(f"{path} is damaged; {AGAIN}") from None
    if len(table["name"]) != tiles:
        raise UserError(f"{path} lists {len(table['name'])} tiles instead of {tiles}; {AGAIN}")
    return table
