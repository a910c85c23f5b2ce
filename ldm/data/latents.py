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

import copy
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.tiles import TileSet, Weighted, without_augmentation
from ldm.errors import UserError
from ldm.files import require_class_names
from ldm.modules.autoencoder import DiagonalGaussian
from ldm.progress import FIRST_SIGN, Bar

COMMAND = "scripts/cache_latents.py"
MANIFEST = "manifest.json"
VERSION = 1
DTYPES = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
STORED = {"float16": "F16", "float32": "F32"}  # names of the types in safetensors files
AGAIN = f"delete it and run {COMMAND} again as before, which makes what is missing"


@dataclass(frozen=True)
class Shards:
    """Files that hold the latents of a split."""

    folder: Path
    tiles: int  # N
    views: int  # V, of each tile
    moments: tuple[int, int, int]  # (2C, h, w), shape of a view
    dtype: str  # "float16" or "float32"
    shard_tiles: int  # tiles per shard; the last one may have fewer

    @classmethod
    def of(cls, root: Path, settings: dict[str, Any], split: str) -> "Shards":
        """The shards of a split in the cache `root`."""
        channels, height, width = settings["latent"]
        facts = settings["splits"][split]
        numbers = {name: facts[name] for name in ("tiles", "views", "shard_tiles")}
        moments = (2 * channels, height, width)
        return cls(folder=root / split, moments=moments, dtype=settings["dtype"], **numbers)

    def __len__(self) -> int:
        return math.ceil(self.tiles / self.shard_tiles)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def range(self, number: int) -> range:
        """The tiles of a shard."""
        first = number * self.shard_tiles
        return range(first, min(first + self.shard_tiles, self.tiles))

    def bytes_of(self, number: int) -> int:
        """Disk use of a shard, without its header (some 300 bytes)."""
        stored = math.prod(self.moments) * DTYPES[self.dtype].itemsize
        return len(self.range(number)) * self.views * (stored + 2 * 8 + 4)

    def open(self, number: int) -> dict[str, Any]:
        """Its moments, which are read when they are indexed, and its other arrays."""
        path = self.path(number)
        n = len(self.range(number))
        wanted = {
            "moments": (STORED[self.dtype], [n, self.views, *self.moments]),
            "sums": ("F64", [n, self.views, 2]),
            "crc": ("U32", [n, self.views]),
        }
        try:
            file = safe_open(path, framework="np")
            arrays = {name: file.get_slice(name) for name in wanted}
        except FileNotFoundError:
            raise UserError(f"{path} is missing; run {COMMAND} again as before") from None
        except (SafetensorError, OSError, KeyError):
            size = path.stat().st_size
            raise UserError(f"{path} is damaged ({size} bytes); {AGAIN}") from None
        for name, (dtype, shape) in wanted.items():
            found = arrays[name].get_dtype(), list(arrays[name].get_shape())
            if found != (dtype, shape):
                reason = f"its {name} are {found[0]} {found[1]}, not {dtype} {shape}"
                raise UserError(f"{path} is damaged ({reason}); {AGAIN}")
        return {"moments": arrays["moments"], "sums": arrays["sums"][:], "crc": arrays["crc"][:]}


class LatentTiles(TileSet):
    """Cached latents of tiles as a training set.

    An item is `dict(moments=(2C, h, w) float32, label=int, path=str)`: mean and log-variance of the
    posterior, stacked (`ldm.modules.autoencoder.DiagonalGaussian` takes them), so training draws
    z_0 anew each time. The seed of an item chooses the view.

    Args:
        shards: Files of the split.
        table: Columns of the split's Parquet file.
        classes: Class names in label order.
        corpora: (name, weight) of the corpora that the cache was made of.
    """

    def __init__(
        self,
        shards: Shards,
        table: dict[str, list],
        classes: Sequence[str] = (),
        corpora: Sequence[tuple[str, float]] = (),
    ):
        self.shards = shards
        self.classes = list(classes)
        self.relative_paths: list[str] = table["name"]
        self._paths: list[str] = table["path"]
        self.labels: list[int] = table["label"]
        self.groups: list[str] | None = table["group"] if None not in table["group"] else None
        self.corpora = [Weighted(name, weight) for name, weight in corpora]
        self._corpus_numbers = np.array(table["corpus"])
        self._views = shards.views
        self._open: dict[int, dict[str, Any]] = {}
        for number in range(len(shards)):
            shards.open(number)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process maps the files itself

    def path(self, index: int) -> str:
        return self._paths[index]

    def corpus_numbers(self) -> np.ndarray:
        return self._corpus_numbers

    def without_augmentation(self) -> "LatentTiles":
        plain = copy.copy(self)
        plain._views = 1  # view 0 is the tile as it is
        return plain

    def _shard(self, index: int) -> tuple[dict[str, Any], int]:
        """The shard that holds a tile, and the tile's place in it."""
        number, place = divmod(index, self.shards.shard_tiles)
        if number not in self._open:
            self._open[number] = self.shards.open(number)
        return self._open[number], place

    def moments(self, index: int, view: int = 0) -> np.ndarray:
        """The stored moments of a view, (2C, h, w)."""
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
        if self._views > 1:
            seed = int(torch.randint(2**62, ())) if seed is None else seed
            view = seed % self._views
        moments = torch.from_numpy(self.moments(index, view).astype(np.float32))
        return {"moments": moments, "label": self.labels[index], "path": self._paths[index]}

    def latent_sums(self, indices: Sequence[int]) -> Tensor:
        """Count, sum and sum of squares of the latents of view 0, see the function of this name."""
        count = len(indices) * math.prod(self.shards.moments) / 2  # half are means
        sums = np.zeros(2)
        for index in indices:
            shard, place = self._shard(index)
            sums += shard["sums"][place, 0]
        return torch.tensor([count, *sums], dtype=torch.float64)


Encode = Callable[[Tensor], DiagonalGaussian]  # from images, (B, 3, S, S), to their posterior


def latent_sums(dataset: Dataset, indices: Sequence[int], encode: Encode) -> Tensor:
    """Count, sum and sum of squares of the latents of these tiles, (3,) float64 on the CPU.

    Taken in expectation over the posterior, E[z^2] = mean^2 + variance, and without augmentation:
    nothing is drawn, and the sums do not depend on how the tiles are divided into batches or among
    processes. A cache of latents has stored its own.

    Args:
        dataset: A `TileSet`, or any set whose items have an `image`.
    """
    if isinstance(dataset, LatentTiles):
        return dataset.latent_sums(indices)
    sums = torch.zeros(3, dtype=torch.float64)
    for mean, variance in _posteriors(dataset, indices, encode):
        sums[0] += mean.numel()
        sums[1] += mean.sum()
        sums[2] += (mean.square() + variance).sum()
    return sums


def channel_sums(dataset: Dataset, indices: Sequence[int], encode: Encode, channels: int) -> Tensor:
    """As `latent_sums`, for each of C `channels` of its own, (3, C) float64 on the CPU."""
    sums = torch.zeros(3, channels, dtype=torch.float64)
    for mean, variance in _posteriors(dataset, indices, encode):
        sums[0] += mean.numel() / mean.shape[1]
        sums[1] += mean.sum(dim=(0, 2, 3))
        sums[2] += (mean.square() + variance).sum(dim=(0, 2, 3))
    return sums


@torch.no_grad()
def _posteriors(
    dataset: Dataset, indices: Sequence[int], encode: Encode, batch_size: int = 32
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and variance of the latents of tiles, each (B, C, h, w) float64, batch by batch."""
    dataset = without_augmentation(dataset)
    starts = range(0, len(indices), batch_size)
    for start in Bar(starts, "latent scale", unit="batch", delay=FIRST_SIGN, leave=False):
        items = [dataset[i] for i in indices[start : start + batch_size]]
        if "moments" in items[0]:
            posterior = DiagonalGaussian(torch.stack([item["moments"] for item in items]))
        else:
            posterior = encode(torch.stack([item["image"] for item in items]))
        yield posterior.mean.double().cpu(), posterior.logvar.double().exp().cpu()


def scale_from_sums(sums: Tensor) -> float:
    """1 / std of the latents behind `latent_sums`."""
    count, total, squares = sums.cpu().tolist()
    variance = squares / count - (total / count) ** 2
    if not variance > 1e-12:
        raise UserError(
            f"the autoencoder's latents have variance {variance:.3g} over {int(count)} values, so "
            "they carry no image; train the autoencoder first, and check that the tiles differ"
        )
    return variance**-0.5


@dataclass(frozen=True)
class LatentCache:
    """A finished cache."""

    root: Path
    settings: dict[str, Any]  # what decides the latents, see `ldm.data.caching.CachePlan`
    statistics: dict[str, Any]  # scale_factor = 1 / std, and what it was computed from
    train: LatentTiles
    validation: LatentTiles | None

    @classmethod
    def read(cls, root: str | os.PathLike, what: str = "latents") -> "LatentCache":
        """Open a cache, which errors call `what`."""
        root = Path(root).expanduser()
        manifest = read_manifest(root, what)
        if manifest is None:
            raise UserError(f"{what}: {root} holds no {MANIFEST}; make a cache with {COMMAND}")
        if not manifest["complete"]:
            raise UserError(
                f"{what}: {root} is unfinished; run {COMMAND} again as before, it goes on"
            )
        settings = manifest["settings"]
        classes = settings["classes"] or []
        require_class_names(classes, f"{what}: {root / MANIFEST}")
        corpora = {"train": settings["corpora"] or []}
        splits: dict[str, LatentTiles] = {}
        for name, split in settings["splits"].items():
            table = _read_table(root / f"{name}.parquet", split["tiles"])
            shards = Shards.of(root, settings, name)
            splits[name] = LatentTiles(shards, table, classes, corpora.get(name, ()))
        validation = splits.get("validation")
        return cls(root, settings, manifest["statistics"], splits["train"], validation)

    def require(self, fingerprint: str, what: str = "latents") -> None:
        """Check that this autoencoder made the latents; UserError otherwise."""
        own = self.settings["autoencoder"]
        if own != fingerprint:
            raise UserError(
                f"{what}: {self.root} was made by another autoencoder ({own[:12]}) than the model's"
                f" ({fingerprint[:12]}); give that one to {COMMAND}, or train on its latents"
            )


def read_manifest(root: Path, what: str) -> dict[str, Any] | None:
    """The manifest of a cache; None without one."""
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
    except (pa.ArrowException, OSError, ValueError):
        raise UserError(f"{path} is damaged; {AGAIN}") from None
    if (found := len(table.get("name", ()))) != tiles:
        raise UserError(f"{path} lists {found} tiles instead of {tiles}; {AGAIN}")
    return table
